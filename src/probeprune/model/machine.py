"""What this machine has: its devices, the dtype that is fast on them, the cache folder."""

import ctypes
import logging
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear

from probeprune.errors import UsageError, unknown
from probeprune.files import stored_json, write_json
from probeprune.places import check_writable
from probeprune.provenance import dtype_name

logger = logging.getLogger(__name__)

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def choose_device(device: str) -> torch.device:
    """The device of that name; for `auto`, CUDA if available and otherwise the CPU.

    Raises `UsageError` for a device that this machine does not have.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
        # Torch takes any number of a CPU, and `meta`, which holds no values.
        if (target.type == "cpu" and target.index) or target.type == "meta":
            raise AssertionError
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"this machine has no device '{device}' for torch; use auto or cpu.") from error
    return target


def check_dtype(dtype: str) -> None:
    """Raise `UsageError` unless this is the name of a dtype, or `auto`."""
    if dtype != "auto" and dtype not in DTYPES:
        raise UsageError(unknown("dtype", dtype, ["auto", *DTYPES]))


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype of that name; for `auto`, the fastest one on this machine.

    The fastest dtype of a CPU is measured once and kept in the cache: a run that is resumed must use the
    same.
    """
    check_dtype(dtype)
    if dtype != "auto":
        return DTYPES[dtype]
    if device.type != "cpu":
        return fastest_dtype(device)
    file = cache_dir() / "fastest-dtype.json"
    machine = f"{platform.node()} {os.cpu_count()} torch {torch.__version__}"
    try:
        stored = DTYPES[stored_json(file)[machine]]
    except (KeyError, TypeError):
        chosen = fastest_dtype(device)
    else:
        logger.info("dtype %s, measured before: %s", dtype_name(stored), file)
        return stored
    # If the cache cannot be written, the next call measures again.
    with suppress(UsageError):
        write_json(file, {machine: dtype_name(chosen)})
    return chosen


def fastest_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which this device multiplies matrices fastest.

    CUDA: bfloat16 if the GPU supports it, otherwise float16. MPS: float16. CPU: bfloat16 or float32,
    whichever is faster for a linear map of a small MLP's shape. This is measured, because no flag shows it:
    with AMX or AVX-512-BF16, bfloat16 is about five times as fast as float32; without them it is emulated and
    about eight times as slow (AVX2 EPYC, two cores: 18 against 140 GFLOP/s). Takes about 0.2 s at worst.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type != "cpu":
        return torch.float16
    # A near tie goes to float32, so that noise does not decide the precision.
    return (
        torch.bfloat16
        if 1.25 * product_seconds(torch.bfloat16) < product_seconds(torch.float32)
        else torch.float32
    )


PRODUCT_FLOP = 2 * 256 * 576 * 1536
"""Operations of the linear map that is timed."""


def product_seconds(dtype: torch.dtype, device: torch.device | str = "cpu") -> float:
    """Median time of a 576 -> 1536 linear map of 256 tokens, the weight laid out as in models.

    The layout matters: with the transposed weight, emulated bfloat16 is another ten times slower.
    """
    tokens, weight = (torch.ones(n, 576, dtype=dtype, device=device) for n in (256, 1536))
    linear(tokens, weight)  # the first call sets up threads and kernels
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        linear(tokens, weight)[0, 0].item()  # waits for a GPU
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[2]


def release_freed() -> None:
    """Give memory that is free back to the system, where glibc would keep it.

    Tensors of less than 32 MB leave holes in its heap: SmolLM2-135M held 150 MB more than was in use.

    Takes some milliseconds. Does nothing with another C library.
    """
    trim = _from_libc("malloc_trim")
    if trim is not None:
        trim(0)


_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -2, -3, -4
"""Options of `mallopt`, from malloc.h."""

_KEEPING = {_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 256 << 20}
_USUAL = {_MMAP_MAX: 1 << 16, _MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20, _TOP_PAD: 128 << 10}
"""What glibc's own adjustment ends at, which the first call of `mallopt` switches off."""


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Let glibc keep freed memory for the next tensor inside the context; behind it all goes back.

    By default every tensor of more than 32 MB gets pages from the system and gives them back: in a training
    step, all that are as large as the logits. A step of distillation on SmolLM2-135M spent a third of its
    time on this. Holes in the heap make the peak larger, by some per cent.

    Does nothing with another C library.
    """
    option = _from_libc("mallopt")
    if option is None:
        yield
        return
    for name, value in _KEEPING.items():
        option(name, value)
    try:
        yield
    finally:
        for name, value in _USUAL.items():
            option(name, value)
        release_freed()


@cache
def _from_libc(name: str) -> Any:
    """A function of glibc; None with another C library, or where it has none of this name."""
    try:
        found = getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError, TypeError):
        return None
    return found if platform.libc_ver()[0] == "glibc" else None


def cache_dir() -> Path:
    """The folder for converted models: $PROBEPRUNE_CACHE, or probeprune/ in the user's cache folder."""
    configured = os.environ.get("PROBEPRUNE_CACHE")
    if configured:
        return Path(configured).expanduser()
    user_cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(user_cache) / "probeprune"


def check_cache() -> None:
    """Raise `UsageError` if `cache_dir()` cannot be written."""
    try:
        check_writable(cache_dir())
    except UsageError as error:
        raise UsageError(
            f"the cache '{cache_dir()}' cannot be written; set PROBEPRUNE_CACHE to a folder that can."
        ) from error
