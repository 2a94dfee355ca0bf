"""Hidden states of many batches between two layers, in memory or in files."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from probeprune.errors import UsageError


@dataclass(frozen=True)
class Room:
    """Where hidden states go: those that find none in memory into files in the folder for temporary files."""

    memory: int
    """Bytes that one set of them may take in memory."""


class HiddenStates:
    """One tensor for each batch. Those that find no room in memory are kept in files until they are gone.

    Files are read and written whole, not mapped: what is not in use takes no memory.
    """

    def __init__(self, room: Room, count: int) -> None:
        self._room, self._left = room, room.memory
        self._kept: list[torch.Tensor | _Stored | None] = [None] * count
        self._folder: TemporaryDirectory[str] | None = None

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, batch: int) -> torch.Tensor:
        kept = self._kept[batch]
        assert kept is not None
        return kept.read() if isinstance(kept, _Stored) else kept

    def __setitem__(self, batch: int, states: torch.Tensor) -> None:
        old = self._kept[batch]
        size = states.numel() * states.element_size()
        if isinstance(old, torch.Tensor):
            self._left += old.numel() * old.element_size()
        if size <= self._left:
            self._left -= size
            self._kept[batch] = states
            return
        if self._folder is None:
            self._folder = TemporaryDirectory(prefix="probeprune-states-")
            self._check_disk(size * (len(self) - batch))
        self._kept[batch] = _Stored.write(Path(self._folder.name) / f"{batch}.bin", states)

    def _check_disk(self, size: int) -> None:
        assert self._folder is not None
        free = shutil.disk_usage(self._folder.name).free
        if free < size:
            raise UsageError(
                f"the hidden states of {len(self)} batches take {size / 2**30:.2f} GiB, and the disk of "
                f"{self._folder.name} has {free / 2**30:.2f} GiB left; free some space, give fewer windows, "
                "or set TMPDIR to a folder on another disk."
            )

    def copy(self) -> "HiddenStates":
        """The same states; setting one leaves the other."""
        copied = HiddenStates(self._room, len(self))
        for i, states in enumerate(self):
            copied[i] = states
        return copied


@dataclass(frozen=True)
class _Stored:
    """One tensor in a file."""

    file: Path
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def write(cls, file: Path, states: torch.Tensor) -> "_Stored":
        with torch.inference_mode(False):
            raw = states.detach().cpu().contiguous().flatten().view(torch.uint8)
        raw.numpy().tofile(file)
        return cls(file, states.shape, states.dtype, states.device)

    def read(self) -> torch.Tensor:
        raw = torch.from_numpy(np.fromfile(self.file, dtype=np.uint8))
        return raw.view(self.dtype).view(self.shape).to(self.device)
