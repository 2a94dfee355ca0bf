"""Processes that work together, as `torchrun` or `accelerate launch` start them; without these, just one.

Says who writes and who waits; `shares.py` shares work out. Knows nothing of models or text.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import distributed

from probeprune.errors import UsageError, first_line

_PATIENCE = timedelta(days=1)
"""How long a process waits for another one; one that ends is noticed at once."""

_TOLD = "_probeprune_told"
"""Attribute of an error that all processes raise, so that one of them need say it."""


def join(device: str = "auto") -> None:
    """Connect to the other processes; call this before loading a model, as each takes a GPU of its own.

    Does nothing where there is one process.

    Args:
        device: device of the models; `auto` means CUDA if available, else CPU.
    """
    if _launched() and not is_connected():
        on_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
        PartialState(cpu=on_cpu, timeout=_PATIENCE)


def is_connected() -> bool:
    """Whether `join`, or another library, has connected this process to others."""
    return distributed.is_available() and distributed.is_initialized()


def count() -> int:
    """Number of processes that work together."""
    if is_connected():
        return distributed.get_world_size()
    return int(os.environ["WORLD_SIZE"]) if _launched() else 1


def rank() -> int:
    """The number of this process, from 0."""
    if is_connected():
        return distributed.get_rank()
    return int(os.environ.get("RANK", "0")) if _launched() else 0


def on_this_machine() -> int:
    """Number of processes that work together on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if _launched() else 1


def is_first() -> bool:
    """Whether this is the process that prints and writes."""
    return rank() == 0


def wait() -> None:
    """Wait until all processes have called this. Raises `UsageError` where another one has ended."""
    if count() > 1:
        with exchanging():
            PartialState().wait_for_everyone()


@contextmanager
def one_writer() -> Iterator[bool]:
    """Yield True in the process that writes; the others wait at the end until it is done."""
    try:
        yield is_first()
    finally:
        wait()


def agreed(value: Any) -> Any:
    """The first process's value, in all processes. Raises `UsageError` where another one has ended."""
    values = [value]
    if count() > 1:
        with exchanging():
            broadcast_object_list(values)
    return values[0]


@contextmanager
def exchanging() -> Iterator[None]:
    """Around every exchange: `UsageError` where it breaks off, above all because a process has ended."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # gloo has no class of its own for it
        raise UsageError(
            f"the {count()} processes have lost each other, one may have ended ({_reason(error)}); what is "
            "stored stays, and the same command goes on from there."
        ) from error


def _reason(error: RuntimeError) -> str:
    """The part of a message of gloo or NCCL that says what happened, without the place in its source."""
    line = first_line(error)
    if line.startswith("["):
        line = line.partition("] ")[2]
    return line.partition(". ")[0]


def mark_told(error: BaseException) -> None:
    """Note on an error that all processes raise it."""
    setattr(error, _TOLD, True)


def is_told(error: BaseException) -> bool:
    """Whether all processes raise this error."""
    return getattr(error, _TOLD, False)


def says(error: BaseException) -> bool:
    """Whether this process is to say its error: of one that all raise, as for what was typed, the first."""
    return is_first() or (is_connected() and not is_told(error))


def _launched() -> bool:
    """Whether this process is one of several that a launcher started, connected or not."""
    size = os.environ.get("WORLD_SIZE", "")
    return "LOCAL_RANK" in os.environ and size.isdigit() and int(size) > 1
