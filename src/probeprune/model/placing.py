"""Where the weights of a model go: all in memory, or its decoder layers on disk, by the room there is."""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import psutil
import torch
from torch import nn

from probeprune.errors import Notice, UsageError
from probeprune.model.blocks import find_layers
from probeprune.model.families import find_family
from probeprune.model.hidden_states import Room
from probeprune.processes import on_this_machine

_WORK, _NARROW_WORK = 3, 5
"""Memory that work on one layer takes, in layers: its weights, what they become, what is computed. In a dtype
narrower than float32, gradients take its weights and what is computed in float32."""

_SHARE = 0.8
"""Share of the free memory that a model takes where no limit is given."""


@dataclass(frozen=True)
class Weights:
    """Bytes of a model's weights."""

    layers: int
    """All decoder layers."""
    largest: int
    """The largest layer."""
    rest: int
    """Everything else: embeddings, the last norm, the output head; tied weights once."""


@dataclass(frozen=True)
class Placing:
    """Where the weights of a model go whose layers stay on disk.

    Attributes:
        places: a `device_map` for transformers.
        room: where the hidden states of many batches go.
    """

    places: dict[str, str]
    room: Room


def weights_of(model: nn.Module, dtype: torch.dtype) -> Weights:
    """The sizes of a model's weights in a dtype; of a model without numbers too.

    A family that is not supported has no layers to tell apart.
    """

    def size(parameters: Iterable[nn.Parameter]) -> int:
        return sum(p.numel() * dtype.itemsize for p in parameters)

    whole = size(model.parameters())
    try:
        layers = [size(layer.parameters()) for layer in find_layers(model)]
    except UsageError:
        return Weights(0, 0, whole)
    return Weights(sum(layers), max(layers), whole - sum(layers))


def place(
    name: str, shape: nn.Module, dtype: torch.dtype, device: torch.device, memory: int | None
) -> Placing | None:
    """Decide where the weights of a model go; None for all in memory, on its device.

    Args:
        name: what the model was opened by, for messages.
        shape: the model without numbers.
        dtype: the dtype to compute in.
        device: where it runs.
        memory: bytes that this process, or its part of an accelerator, may take; None for what is free.

    Raises:
        UsageError: less memory than one layer at a time takes.
    """
    sizes = weights_of(shape, dtype)
    used, free = _memory(device)
    limit = used + int(_SHARE * free) if memory is None else memory
    if used + sizes.layers + sizes.rest <= limit or not sizes.layers:
        return None
    work = _WORK if dtype.itemsize >= 4 else _NARROW_WORK
    least = used + sizes.rest + work * sizes.largest
    if limit < least:
        raise UsageError(
            f"model {name[:200]!r} takes {_gib(least)} even a layer at a time ({_gib(sizes.rest)} of "
            f"embeddings and output head, {_gib(sizes.largest)} the largest layer), and there are "
            f"{_gib(limit)}; "
            + ("free some memory." if memory is None else f"give memory of {_gib(least)} or more.")
        )
    warnings.warn(
        f"the weights take {_gib(sizes.layers + sizes.rest)}, and there is room for {_gib(limit - used)}: "
        "the layers stay on disk and come into memory one at a time",
        Notice,
        stacklevel=3,
    )
    layers = f"{find_family(shape).layers}."
    others = (n for n, _ in shape.named_modules() if not n.startswith(layers))
    places = {n: str(device) for n in others if n and not layers.startswith(f"{n}.")}
    places |= {f"{layers}{i}": "disk" for i in range(len(find_layers(shape)))}
    return Placing(places, Room((limit - least) // 4))


def _memory(device: torch.device) -> tuple[int, int]:
    """Bytes in use by this process, and bytes that are free, where the model runs."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), torch.cuda.mem_get_info(device)[0]
    return psutil.Process().memory_info().rss, psutil.virtual_memory().available // on_this_machine()


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
