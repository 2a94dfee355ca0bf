"""Text, JSON and tensors in files, which appear under their names only when complete."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from probeprune.errors import BadValue, quoted
from probeprune.places import replacing
from probeprune.processes import shares

RESULTS = "results.jsonl"
"""Name of the file with result lines in an experiment's folder."""


LONGEST_NAME = 200
"""Bytes of a name that becomes the name of a file: file systems take 255, and endings are added."""


def check_file_name(field: str, name: str) -> None:
    """Raise `BadValue` unless a file can be named after `name` in any folder without leaving it.

    Args:
        field: the parameter or field that holds the name.
        name: the name.
    """
    bad = not name.strip() or name.startswith(".") or "/" in name or "\\" in name
    # Surrogates cannot be encoded, but they are not printable either.
    if bad or not name.isprintable() or len(name.encode()) > LONGEST_NAME:
        raise BadValue(
            field,
            f"{field} {quoted(name)} cannot name a file: use 1 to {LONGEST_NAME} printable "
            "characters, no slashes, and no dot in front.",
        )


# -- text and JSON ---------------------------------------------------------------------------------


def write_text(file: Path, text: str) -> None:
    """Write a text file, and its folder if it is missing. Raises `UsageError` if that is not possible."""
    with replacing(file) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(file: Path, value: object) -> None:
    """Write a JSON file, and its folder if it is missing. Raises `UsageError` if that is not possible."""
    write_text(file, json.dumps(value) + "\n")


def stored_json(file: Path) -> Any:
    """The content of a JSON file; None if it is missing or no JSON."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


# -- tensors ---------------------------------------------------------------------------------------


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write tensors and metadata as a safetensors file. Raises `UsageError` if that is not possible."""
    with replacing(path) as partial:
        save_file({k: t.cpu().contiguous() for k, t in tensors.items()}, partial, metadata=metadata)


def load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]] | None:
    """The tensors and metadata of a safetensors file; None if it is missing or cannot be read."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            return {k: file.get_tensor(k) for k in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError):
        return None


def cached_tensors(path: Path | None, make: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The tensors stored at `path`. If there are none, call `make` and store its result.

    Without a path, `make` is always called and nothing is stored. Where work is shared out, the first process
    reads and writes, and all get what it has.
    """
    stored = load_tensors(path) if path is not None and shares.leads() else None
    if shares.agreed(stored is not None):
        return shares.agreed_tensors(stored[0] if stored is not None else {})
    made = make()
    if path is not None and shares.leads():
        save_tensors(path, made, {})
    return made
