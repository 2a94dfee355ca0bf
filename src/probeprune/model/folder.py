"""What the files in a model's folder say, read and checked before anything is built from them.

Nothing outside the folder is opened, and no pickle. Knows nothing of architectures.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from probeprune.errors import UsageError, first_line
from probeprune.foreign.reading import parse_json

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"

OBJECTS = (
    CONFIG,
    INDEX,
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
"""Files that transformers reads if they are there; each holds one JSON object."""

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
"""Files that are read once, by the tokenizer: they are large."""

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Stored:
    """A tensor as the header of its file describes it."""

    file: Path
    dtype: str
    """In the words of safetensors, such as `BF16`."""
    shape: tuple[int, ...]

    @property
    def size(self) -> tuple[torch.dtype, int]:
        """Its dtype for torch, and its bytes. Raises `KeyError` for numbers that are not ordinary ones."""
        dtype = _FLOATS[self.dtype]
        return dtype, math.prod(self.shape) * dtype.itemsize

    @property
    def is_float(self) -> bool:
        """Whether its numbers are ordinary floating-point ones, which need no scale."""
        return self.dtype in _FLOATS


def check_regular(file: Path) -> None:
    """Raise `UsageError` for a directory, a pipe and the like."""
    if not file.is_file():
        raise UsageError(f"'{file}' is no regular file; get the checkpoint again.")


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises `UsageError` if there is anything else in it."""
    check_regular(file)
    try:
        value = parse_json(file.read_bytes().decode("utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"'{file}' is not JSON ({first_line(error)}); get the checkpoint again.") from error
    if not isinstance(value, dict):
        raise UsageError(
            f"'{file}' holds a {type(value).__name__}, not a JSON object; get the checkpoint again."
        )
    return value


def check_files(folder: Path) -> None:
    """Raise `UsageError` for the first of these files that is there and not as it should be.

    `OBJECTS` are read as JSON; of `VOCABULARIES` only the place is checked.
    """
    for name in (*OBJECTS, *VOCABULARIES):
        file = folder / name
        if file.exists() or file.is_symlink():
            check_inside(file)
            if name in OBJECTS:
                read_object(file)
            else:
                check_regular(file)


def check_inside(file: Path) -> None:
    """Raise `UsageError` for a symlink that leads out of its folder.

    In the hub's cache, files of a snapshot are symlinks into `blobs` of the same model.
    """
    try:
        home, target = file.parent.resolve(), file.resolve()
    except (OSError, RuntimeError) as error:
        raise UsageError(f"'{file}' is a symlink that leads nowhere; get the checkpoint again.") from error
    homes = [home]
    if home.parent.name == "snapshots":
        homes.append((home.parent.parent / "blobs").resolve())
    if not any(target.is_relative_to(h) for h in homes):
        raise UsageError(
            f"'{file}' is a symlink to '{target}', outside of its folder; put the file itself there."
        )


def weight_names(folder: Path) -> list[str]:
    """The names of a checkpoint's weight files, in the order in which transformers looks for them.

    They need not be there yet. Empty if neither a weight file nor an index is in the folder.

    Raises:
        UsageError: a name that is no plain `*.safetensors` name, or an index without names.
    """
    config = folder / CONFIG
    named = read_object(config).get("transformers_weights")
    if named is not None:
        return _plain_names([named], config)
    if (folder / WEIGHTS).exists():
        return [WEIGHTS]
    index = folder / INDEX
    if not index.exists():
        return []
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UsageError(f"'{index}' has no weight_map with the names of weight files; get it again.")
    return _plain_names(weight_map.values(), index)


def _plain_names(names: Iterable[object], source: Path) -> list[str]:
    """The distinct names, sorted. Raises `UsageError` for anything that could lie outside of the folder."""
    plain: set[str] = set()
    for name in names:
        if not isinstance(name, str) or not name.endswith(".safetensors") or set(name) & set("/\\\0"):
            raise UsageError(
                f"'{source}' names {name!r} as a weight file, and only a *.safetensors file in the same "
                "folder is opened; get the checkpoint again."
            )
        plain.add(name)
    return sorted(plain)


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a checkpoint. Raises `UsageError` if there are none, or one is not there."""
    files = [folder / name for name in weight_names(folder)]
    if not files:
        raise UsageError(
            f"model '{folder}' has no safetensors weights, and pickled ones can run any code when opened; "
            "convert it to safetensors first."
        )
    for file in files:
        check_inside(file)
        if not file.is_file():
            raise UsageError(
                f"the weights of model '{folder}' are incomplete: there is no file '{file.name}'; get the "
                "checkpoint again."
            )
    return files


def stored_sizes(folder: Path) -> list[tuple[torch.dtype, int]]:
    """Dtype and bytes of each weight of a checkpoint. Tensors of integers are masks, which nobody opens."""
    return [t.size for t in stored_tensors(weight_files(folder)).values() if t.is_float]


def stored_tensors(files: Iterable[Path]) -> dict[str, Stored]:
    """All tensors of some safetensors files by name, from the headers alone.

    Raises `UsageError` for a file that is damaged, and for a tensor that two files hold.
    """
    found: dict[str, Stored] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    header = opened.get_slice(name)
                    tensor = Stored(file, header.get_dtype(), tuple(header.get_shape()))
                    if name in found:
                        raise UsageError(
                            f"'{found[name].file}' and '{file}' both hold the tensor '{name}'; get the "
                            "checkpoint again."
                        )
                    found[name] = tensor
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(
                f"'{file}' is damaged or no safetensors file ({first_line(error)}); get the checkpoint again."
            ) from error
    return found
