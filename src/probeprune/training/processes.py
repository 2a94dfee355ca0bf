"""Processes that train together, as `torchrun` or `accelerate launch` start them; without these, just one."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list


def join(device: str = "auto") -> None:
    """Connect to the other processes; call this before loading a model, as each takes a GPU of its own.

    Args:
        device: where the models will be; `auto` means CUDA if available, else CPU.
    """
    PartialState(cpu=device == "cpu" or (device == "auto" and not torch.cuda.is_available()))


def count() -> int:
    """Number of processes that train together."""
    return int(PartialState().num_processes)


def is_first() -> bool:
    """Whether this is the process that prints and writes."""
    return bool(PartialState().is_main_process)


def wait() -> None:
    """Wait until all processes have come here."""
    PartialState().wait_for_everyone()


@contextmanager
def one_writer() -> Iterator[bool]:
    """Yields True in the process that writes; the others wait at the end until it is done."""
    try:
        yield is_first()
    finally:
        wait()


def agreed(value: Any) -> Any:
    """The first process's value, in all processes."""
    values = [value]
    if count() > 1:
        broadcast_object_list(values)
    return values[0]
