"""Several processes that train together, as `torchrun` or `accelerate launch` start them; one is the rule."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list


def join(device: str = "auto") -> None:
    """Meet the other processes, on CUDA each on a GPU of its own; needed before a model is loaded.

    Args:
        device: where the models will be; `auto`: CUDA where there is one, else CPU.
    """
    PartialState(cpu=device == "cpu" or (device == "auto" and not torch.cuda.is_available()))


def count() -> int:
    """How many processes train together."""
    return int(PartialState().num_processes)


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return bool(PartialState().is_main_process)


def wait() -> None:
    """Go on when all are here."""
    PartialState().wait_for_everyone()


@contextmanager
def one_writer() -> Iterator[bool]:
    """True in the process that writes; all leave together."""
    try:
        yield is_first()
    finally:
        wait()


def agreed(value: Any) -> Any:
    """What the first process has for this value, in all of them."""
    values = [value]
    if count() > 1:
        broadcast_object_list(values)
    return values[0]
