"""Work in the dtype that it names, whatever autocast region a caller is in."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_DEVICES = ("cpu", "cuda", "xpu")
_FAST_DOUBLE = ((6, 0), (7, 0), (8, 0), (9, 0), (10, 0))
"""Compute capabilities of GPUs that do at least a third as many float64 as float32 operations; others do a
32nd or less."""
_DAMPED = 0.05
"""Least damping with which moments are factorised in float32."""


def solving_dtype(device: torch.device, damping: float) -> torch.dtype:
    """The dtype in which damped moments on a device are factorised and solved.

    float64, but float32 on GPUs that have hardly any float64 units, if the damping, a share of every
    channel's own second moment, bounds what rounding can do (docs/best.md#time).
    """
    if device.type != "cuda" or torch.version.hip is not None or damping < _DAMPED:
        return torch.float64
    fast = torch.cuda.get_device_capability(device) in _FAST_DOUBLE
    return torch.float64 if fast else torch.float32


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
