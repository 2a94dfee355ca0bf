"""Work in the dtype that it names, whatever autocast region a caller is in."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_DEVICES = ("cpu", "cuda", "xpu")


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
