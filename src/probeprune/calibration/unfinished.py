"""Work that goes layer by layer, on disk: a run that was killed goes on at the layer it was at.

After a layer, what it gave is stored beside the final result, and the hidden states that the next one needs.
Finished layers are not run through again: their weights would have to be read once more, and a refit's second
stream runs through layers that are cut. Knows nothing of what is computed.
"""

import json
import secrets
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from probeprune import processes
from probeprune.calibration import stored
from probeprune.calibration.stored import Codec
from probeprune.errors import Notice
from probeprune.files import stored_json, write_json
from probeprune.model.hidden_states import HiddenStates, StatesFile
from probeprune.model.offloading import device_of, room_of
from probeprune.model.shared_kv import Carried
from probeprune.places import discard, held
from probeprune.processes import shares
from probeprune.strategies import Part

_FORMAT = 1
_INDEX = "index.json"
_ENDING = ".unfinished"

EVERY = 30.0
"""Least number of seconds between two writes."""
COST = 20.0
"""Least work before a write, in times of what the write takes."""
_SPEED = 200e6
"""Bytes per second that a disk is taken to write until it has shown."""
_TELLING = 64 << 20
"""Bytes of a write that shows the disk's speed."""
_FORGOTTEN = 7 * 24 * 3600.0
"""Age in seconds at which work that nobody went on with is deleted."""


class Unfinished:
    """What one pass over the layers has computed so far, and the hidden states that it is at.

    Attributes:
        done: number of finished steps, as given to `step`.
        results: what finished steps gave, by name; the pass adds to it, and changes nothing in it.
    """

    def __init__(
        self,
        model: nn.Module,
        folder: Path | None = None,
        codec: Codec = stored.TENSORS,
        settings: Any = None,
    ) -> None:
        """Work from its beginning, or from where `folder` says.

        Args:
            model: decides which hidden states are in memory, and where they are needed.
            folder: what is stored goes there; None stores nothing.
            codec: of the results.
            settings: a JSON value: work with others begins anew.
        """
        self._model, self._folder, self._codec, self._settings = model, folder, codec, [_FORMAT, settings]
        self._streams: dict[str, HiddenStates] = {}
        self._last, self._took, self._speed = time.monotonic(), 0.0, _SPEED
        self._begin()
        if folder is not None and folder.is_dir():
            self._find(folder)
        if len({*shares.gathered([self.done])}) > 1:  # a kill came when not all processes had written
            self._begin()

    def _begin(self) -> None:
        """Nothing is done yet."""
        self.done = 0
        self.results: dict[str, Any] = {}
        self._result_files: list[str] = []
        self._known: set[str] = set()
        self._files: dict[str, list[StatesFile | None]] = {}

    def stream(self, name: str, count: int) -> HiddenStates:
        """Hidden states of `count` batches that the next step needs, with those that were stored."""
        states = HiddenStates(room_of(self._model), count, self._folder, name)
        if name in self._files:
            states.read_from(self._files[name])
        self._streams[name] = states
        return states

    def has(self, name: str) -> bool:
        """Whether a stream of this name was stored."""
        return name in self._files

    def step(self, done: int) -> None:
        """Say that so many steps are done; stores them where that is cheap beside the work in between.

        Everything that `results` has gained is final then, and the streams are what the next step needs.
        """
        self.done = done
        now = time.monotonic()
        if not shares.agreed(self._folder is not None and now - self._last >= EVERY):
            return
        assert self._folder is not None  # all processes have one, or none has (`resumed`)
        new = {name: value for name, value in self.results.items() if name not in self._known}
        size = sum(states.unwritten for states in self._streams.values())
        size += sum(tensor.nbytes for tensor in self._codec.pack(new)[0].values())
        if not shares.agreed(now - self._last >= COST * max(size / self._speed, self._took)):
            return
        with shares.alike():
            self._store(self._folder, new)
        self._last = time.monotonic()
        self._took = self._last - now
        if size > _TELLING:
            self._speed = size / self._took

    def _store(self, folder: Path, new: Mapping[str, Any]) -> None:
        """Write what is in no file, then the index; files that it names no more are deleted behind it."""
        folder.mkdir(exist_ok=True)
        if new:
            file = f"results-{self.done}-{secrets.token_hex(4)}.safetensors"
            stored.store(folder / file, self._codec, new)
            self._result_files.append(file)
            self._known |= new.keys()
        streams = {name: [f and f.path.name for f in s.write()] for name, s in self._streams.items()}
        index = {
            "settings": self._settings,
            "done": self.done,
            "results": self._result_files,
            "streams": streams,
        }
        write_json(folder / _INDEX, index)
        _delete_others(folder, index)

    def _find(self, folder: Path) -> None:
        """Take up what `folder` holds; where it is damaged, say so and begin anew."""
        index = stored_json(folder / _INDEX)
        if index is not None and index.get("settings") != json.loads(json.dumps(self._settings)):
            index = None
        try:
            if index is not None:
                self._read(folder, index)
        except (AttributeError, KeyError, OSError, SafetensorError, TypeError, ValueError):
            index = None
            warnings.warn(
                f"what a run that was stopped left in {folder} is damaged: this one begins anew",
                Notice,
                stacklevel=4,
            )
        _delete_others(folder, index)

    def _read(self, folder: Path, index: Mapping[str, Any]) -> None:
        """Take up what an index names."""
        results: dict[str, Any] = {}
        for name in index["results"]:
            found = stored.read(folder / Path(name).name, self._codec)
            if found is None:
                raise ValueError(name)
            results |= found
        device = device_of(self._model)
        files = {
            name: [None if f is None else StatesFile.found(folder / Path(f).name, device) for f in each]
            for name, each in index["streams"].items()
        }
        self.done, self.results, self._known = int(index["done"]), results, set(results)
        self._result_files, self._files = list(index["results"]), files


def _delete_others(folder: Path, index: Mapping[str, Any] | None) -> None:
    """Delete the files in a folder that its index does not name."""
    named = set[str]()
    if index is not None:
        named = {_INDEX, *index["results"], *(f for each in index["streams"].values() for f in each if f)}
    for path in folder.iterdir():
        if path.name not in named and path.is_file():
            path.unlink(missing_ok=True)


def resumed(
    path: Path | None,
    part: Part | Codec,
    model: nn.Module,
    make: Callable[[Unfinished], dict[str, Any]],
    *,
    states: int = 0,
    settings: Any = None,
) -> dict[str, Any]:
    """The results stored at `path`; if there are none, those of `make`, stored.

    Args:
        path: a safetensors file, named after the content; None stores nothing.
        part: which results.
        model: the model that is worked on.
        make: does the work, from where the `Unfinished` is that it gets.
        states: bytes of the hidden states that are stored between two steps.
        settings: a JSON value: work that was begun with others is not gone on with.

    Raises what `make` raises. What is stored stays, and the next call goes on there, but behind a
    `FloatingPointError`, which would come again.
    """
    if path is None:
        return make(Unfinished(model))
    # Each process has hidden states of its own.
    share = f"-{processes.rank()}-of-{processes.count()}" if shares.active() else ""
    folder = path.with_name(f".{path.stem}{share}{_ENDING}")
    entry = stored.read_by_first(path, part)
    if entry is not None:
        if folder.exists():  # a kill came between the result and the end of the folder
            with held(folder):
                pass
        return entry
    with ExitStack() as lock:
        with shares.alike():
            if shares.leads():
                _forget(path.parent)
        with shares.alike():
            mine = lock.enter_context(held(folder)) and _has_room(folder, states)
        mine = all(shares.gathered([mine]))  # of hidden states that some have, nobody could go on
        unfinished = Unfinished(model, folder if mine else None, stored.codec(part), settings)
        try:
            made = make(unfinished)
        except FloatingPointError:
            if mine and folder.exists():
                discard(folder)
            raise
        with shares.alike():  # nobody deletes hidden states before the result is there
            if shares.leads():
                stored.store(path, part, made)
        return made


def states_bytes(model: Any, windows: torch.Tensor) -> int:
    """Bytes of the hidden states of windows (count, length) between two layers, in the model's dtype."""
    size: int = windows.numel() * Carried(model).width * model.dtype.itemsize
    return size


def _has_room(folder: Path, states: int) -> bool:
    """Whether the disk takes the hidden states, old and new; where it does not, says what that means."""
    free = shutil.disk_usage(folder.parent).free
    if free >= 2 * states:
        return True
    warnings.warn(
        f"the disk of {folder.parent} has {free / 2**30:.2f} GiB left, and to go on where a run was stopped "
        f"takes {2 * states / 2**30:.2f} GiB: if this one is stopped, it begins anew",
        Notice,
        stacklevel=4,
    )
    return False


def _forget(cache: Path) -> None:
    """Delete unfinished work that nobody has gone on with for a week, and locks without work."""
    for path in cache.glob(f".*{_ENDING}*"):
        folder = path.with_name(path.name.removesuffix(".lock"))
        if folder.suffix != _ENDING:
            continue
        age = _FORGOTTEN
        with suppress(FileNotFoundError):
            age = time.time() - folder.stat().st_mtime
        if age >= _FORGOTTEN:
            with held(folder):
                pass
