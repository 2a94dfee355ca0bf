"""Files and directories that appear under their name only when complete: a kill leaves all or nothing."""

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

RESULTS = "results.jsonl"


@contextmanager
def writing(target: Path) -> Iterator[Path]:
    """A directory to write to; it takes the target's name when all went well, else it is gone.

    The target must not exist, or be an empty directory.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        yield partial
        partial.chmod(0o777 & ~_umask())  # mkdtemp's own is for one user alone
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_json(file: Path, value: object) -> None:
    """Write a JSON file; its directory is made where it is missing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        beside.write_text(json.dumps(value) + "\n", encoding="utf-8")
        beside.replace(file)
    finally:
        beside.unlink(missing_ok=True)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a cache entry; it appears under its name only when complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        save_file({k: t.cpu().contiguous() for k, t in tensors.items()}, beside, metadata=metadata)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def cached_tensors(path: Path | None, make: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A cache entry, made and written where there is none yet; without a path made every time."""
    found = None if path is None else load_tensors(path)
    if found is not None:
        return found[0]
    made = make()
    if path is not None:
        save_tensors(path, made, {})
    return made


def load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]] | None:
    """A cache entry and its metadata; one that cannot be read is a miss and will be written again."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            return {k: file.get_tensor(k) for k in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError):
        return None


def read_lines(
    raw: bytes, check: Callable[[Any], None]
) -> tuple[list[tuple[int, Any]], list[tuple[int, ValueError]]]:
    """The lines that can be used and those that cannot, each with its number from 1; blank ones are neither.

    Args:
        raw: the file's content.
        check: raises `ValueError` for what is JSON but no line of results.
    """
    rows, wrong = [], []
    for number, line in enumerate(raw.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            check(row)
        except ValueError as error:
            wrong.append((number, error))
        else:
            rows.append((number, row))
    return rows, wrong
