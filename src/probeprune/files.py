"""JSON, tensors and directories on disk; everything written appears under its name only when complete."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

RESULTS = "results.jsonl"
"""Name of the file with result lines in an experiment's folder."""


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
    write_text(file, json.dumps(value) + "\n")


def write_text(file: Path, text: str) -> None:
    """Write a text file as UTF-8, and its directory if it is missing."""
    with _replacing(file, file.with_name(f".{file.name}.{os.getpid()}.tmp")) as partial:
        partial.write_text(text, encoding="utf-8")


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
