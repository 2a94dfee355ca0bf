"""Work that may run beside the model's own: on CUDA on a second stream, elsewhere in order.

Python runs in order either way, so whatever is decided on the host needs no lock.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class SideStream:
    """A second queue of a device, where it has one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def run(self, read: torch.Tensor) -> Iterator[None]:
        """What is queued inside starts when all that was queued before is done, and holds nothing up.

        `read` is what it reads of the model's own, so that its memory is not used again too early.
        """
        if self._stream is None:
            yield
            return
        read.record_stream(self._stream)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """What is queued from here on starts when all that ran beside is done."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
