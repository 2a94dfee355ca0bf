"""Hidden states of many batches between two layers, in memory or in files.

Knows nothing of the work that they belong to.
"""

import secrets
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file

from probeprune.errors import UsageError, first_line
from probeprune.model.scratch import Scratch
from probeprune.places import full_disk, sync


@dataclass(frozen=True)
class Room:
    """Where hidden states go: those that find none in memory into files."""

    memory: int
    """Bytes that one set of them may take in memory."""


class HiddenStates:
    """One tensor for each batch. Those that find no room in memory are kept in files until they are gone.

    A file is written once and never changed: other states of the same batch go to another one. It is deleted
    when nobody holds it any more. Files are read and written whole, not mapped: what is not in use takes no
    memory.
    """

    def __init__(self, room: Room, count: int, home: Path | None = None, name: str = "states") -> None:
        """No states yet, for `count` batches.

        Args:
            room: how many of them stay in memory.
            count: number of batches.
            home: folder of the files, made with the first one; None for one of temporary files.
            name: what the names of the files begin with.
        """
        self._room, self._left = room, room.memory
        self._kept: list[torch.Tensor | None] = [None] * count
        self._files: list[StatesFile | None] = [None] * count
        self._home, self._name = home, name
        self._scratch: Scratch | None = None

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, batch: int) -> torch.Tensor:
        kept, file = self._kept[batch], self._files[batch]
        if kept is not None:
            return kept
        assert file is not None
        return file.read()

    def __setitem__(self, batch: int, states: torch.Tensor) -> None:
        del self[batch]
        if states.nbytes <= self._left:
            self._left -= states.nbytes
            self._kept[batch] = states
        else:
            self._files[batch] = self._write(batch, states)

    def __delitem__(self, batch: int) -> None:
        """Forget the states of a batch, if there are any."""
        kept = self._kept[batch]
        self._left += 0 if kept is None else kept.nbytes
        self._kept[batch] = self._files[batch] = None

    def holds(self, batch: int) -> bool:
        """Whether there are states of a batch."""
        return self._kept[batch] is not None or self._files[batch] is not None

    @property
    def nbytes(self) -> int:
        """Bytes of all states, wherever they are."""
        return sum(
            kept.nbytes if kept is not None else 0 if file is None else file.nbytes
            for kept, file in zip(self._kept, self._files, strict=True)
        )

    @property
    def unwritten(self) -> int:
        """Bytes of the states that are in no file."""
        return sum(
            kept.nbytes
            for kept, file in zip(self._kept, self._files, strict=True)
            if kept is not None and file is None
        )

    def check_disk(self, size: int) -> None:
        """Raise `UsageError` unless there is room for `size` more bytes of states, in memory or on disk."""
        folder = Path(tempfile.gettempdir()) if self._home is None else self._home.parent
        size, free = max(size - self._left, 0), shutil.disk_usage(folder).free
        if free < size:
            raise UsageError(
                f"the hidden states of {len(self)} batches take {size / 2**30:.2f} GiB of disk, and that of "
                f"{folder} has {free / 2**30:.2f} GiB left; free some space, give fewer windows, or set "
                "TMPDIR to a folder on another disk."
            )

    def check_disk_for_copies(self, nbytes: int) -> None:
        """Raise `UsageError` unless there is room for so many bytes in other sets like this one."""
        HiddenStates(self._room, len(self), self._home).check_disk(nbytes)

    def beside(self) -> "HiddenStates":
        """A set for as many batches with as much room, whose files are temporary ones."""
        return HiddenStates(self._room, len(self))

    def take(self, other: "HiddenStates") -> None:
        """Become the same states as another set; setting one leaves the other. Files are shared."""
        for i in range(len(self)):
            kept = other._kept[i]
            if kept is not None:
                self[i] = kept
            else:
                del self[i]
            self._files[i] = self._files[i] or other._files[i]

    def write(self) -> "list[StatesFile | None]":
        """Write all states that are in no file, keep what memory holds, and wait until they are on disk.

        Returns the file of each batch; None where it has no states. These files are the caller's to delete.
        """
        for i, kept in enumerate(self._kept):
            if kept is not None and self._files[i] is None:
                self._files[i] = self._write(i, kept)
        for file in self._files:
            if file is not None:
                file.keep()
        return list(self._files)

    def read_from(self, files: "Sequence[StatesFile | None]") -> None:
        """Hold the states in these files, as `write` returned them."""
        self._files = list(files)

    def _write(self, batch: int, states: torch.Tensor) -> "StatesFile":
        if self._home is None and self._scratch is None:
            self._scratch = Scratch("probeprune-states")
        folder = self._home or self._scratch.path  # type: ignore[union-attr]
        folder.mkdir(exist_ok=True)
        file = StatesFile(
            folder / f"{self._name}-{batch}-{secrets.token_hex(4)}.safetensors",
            states.nbytes,
            states.device,
            self._scratch,
        )
        with full_disk(folder):
            save_file({"states": states.detach().cpu().contiguous()}, file.path)
        return file


class StatesFile:
    """The states of one batch in a file, which is deleted with this object unless `keep` was called.

    Attributes:
        path: a safetensors file.
        nbytes: bytes of the states in it.
    """

    def __init__(self, path: Path, nbytes: int, device: torch.device, scratch: Scratch | None = None) -> None:
        """A file to be written, or one that lies there; its states come to `device`."""
        self.path, self.nbytes = path, nbytes
        self._device = device
        self._scratch = scratch  # it lives as long as the file
        self._end = weakref.finalize(self, path.unlink, missing_ok=True)
        self._end.atexit = False  # work that a process leaves unfinished stays

    @classmethod
    def found(cls, path: Path, device: torch.device) -> "StatesFile":
        """A file that another process wrote; raises `OSError` or `SafetensorError` unless it is whole."""
        with safe_open(path, framework="pt") as stored:
            tensor = stored.get_slice("states")
            assert tensor.get_shape()
        found = cls(path, path.stat().st_size, device)
        found._end.detach()
        return found

    def keep(self) -> None:
        """Leave the file where it is, for good: wait until it is on disk."""
        if self._end.detach() is not None:
            sync(self.path)

    def read(self) -> torch.Tensor:
        """The states. Raises `UsageError` for a file that has gone or was changed."""
        try:
            states = load(self.path.read_bytes())["states"]
        except (OSError, SafetensorError, KeyError) as error:
            raise UsageError(
                f"{self.path}, which holds hidden states of the work under way, cannot be read: "
                f"{first_line(error)}; start again, and leave the files of a process that works alone."
            ) from error
        # A copy, aligned as torch aligns: kernels round by the alignment of what they get.
        return states.to(self._device, copy=True)
