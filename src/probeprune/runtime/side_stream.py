"""Work in parallel with the model's own: on CUDA on a second stream, elsewhere in order.

Python runs in order either way, so decisions on the host need no lock.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class SideStream:
    """A second stream of a device, if it has streams."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def run(self, read: torch.Tensor) -> Iterator[None]:
        """Work queued inside waits for everything queued so far, without blocking the main stream.

        `read` is the tensor of the main stream that this work reads; its memory is not reused before.
        """
        if self._stream is None:
            yield
            return
        read.record_stream(self._stream)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """Make work queued from here on wait for all work on the second stream."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
