"""Work in the dtype that it names, whatever autocast region a caller is in."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_DEVICES = ("cpu", "cuda", "xpu")
_FAST_DOUBLE = ((6, 0), (7, 0), (8, 0), (9, 0), (10, 0))
"""Compute capabilities of GPUs that do at least a third as many float64 as float32 operations; others do a
32nd or less."""
_DAMPED = 0.05
"""Least damping, a share of every channel's own second moment, with which rounding to float32 is harmless."""


def choosing_dtype(damping: float) -> torch.dtype:
    """The dtype in which units are chosen from moments with this damping: float32, twice as fast, if it keeps
    the units that float64 keeps (docs/best.md#time)."""
    return torch.float32 if damping >= _DAMPED else torch.float64


def solving_dtype(device: torch.device, damping: float) -> torch.dtype:
    """The dtype in which weights are fitted to moments with this damping: float64, but `choosing_dtype` on
    GPUs that have hardly any float64 units."""
    if device.type != "cuda" or torch.version.hip is not None:
        return torch.float64
    fast = torch.cuda.get_device_capability(device) in _FAST_DOUBLE
    return torch.float64 if fast else choosing_dtype(damping)


@contextmanager
def exact() -> Iterator[None]:
    """Switch autocast off inside the context; also a decorator.

    Statistics, refits and compensations are sums in float32 or float64, which autocast would round to half
    precision without a word.
    """
    with ExitStack() as regions:
        for device in _DEVICES:
            if torch.is_autocast_enabled(device):
                regions.enter_context(torch.autocast(device, enabled=False))
        yield
