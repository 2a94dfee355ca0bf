"""JSON, tensors and directories on disk; everything written appears under its name only when complete."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from probeprune.errors import BadValue, quoted

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


# -- directories and JSON --------------------------------------------------------------------------


@contextmanager
def writing(target: Path) -> Iterator[Path]:
    """Write to a temporary directory, renamed to `target` on success and deleted on failure.

    `target` must not exist or must be an empty directory.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        yield partial
        partial.chmod(0o777 & ~_umask())  # mkdtemp lets only the user read it
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def write_json(file: Path, value: object) -> None:
    """Write a JSON file, and its directory if it is missing."""
    with _replacing(file, file.with_name(f".{file.name}.{os.getpid()}.tmp")) as partial:
        partial.write_text(json.dumps(value) + "\n", encoding="utf-8")


def read_lines(
    raw: bytes, check: Callable[[Any], None]
) -> tuple[list[tuple[int, Any]], list[tuple[int, ValueError]]]:
    """Read JSON lines: the usable lines and the errors of the others, each with its line number from 1.

    Blank lines are skipped.

    Args:
        raw: content of the file.
        check: raises `ValueError` for JSON that is no result line.
    """
    rows, errors = [], []
    for number, line in enumerate(raw.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            check(row)
        except ValueError as error:
            errors.append((number, error))
        else:
            rows.append((number, row))
    return rows, errors


# -- tensors ---------------------------------------------------------------------------------------


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write tensors and metadata as a safetensors file."""
    with _replacing(path, path.with_suffix(f".{os.getpid()}.tmp")) as partial:
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

    Without a path, `make` is always called and nothing is stored.
    """
    stored = None if path is None else load_tensors(path)
    if stored is not None:
        return stored[0]
    made = make()
    if path is not None:
        save_tensors(path, made, {})
    return made


@contextmanager
def _replacing(file: Path, partial: Path) -> Iterator[Path]:
    """Write to `partial`, which replaces `file` on success and is deleted on failure."""
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
