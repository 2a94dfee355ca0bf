"""Where the weights of a model go: all in memory, or its decoder layers on disk, by the room there is.

What work takes beside the weights is told by whoever asked for the model; knows nothing of what that work is.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import psutil
import torch
from torch import nn

from probeprune.errors import Notice, UsageError
from probeprune.model.blocks import find_layers
from probeprune.model.families import find_family
from probeprune.model.footprint import Batch, Phase, Rehearsal, Weights, measuring, weights_of
from probeprune.model.hidden_states import Room
from probeprune.model.joined import are_joined
from probeprune.processes import on_this_machine

_SHARE = 0.8
"""Share of the free memory that a model takes where no limit is given."""

_PLENTY = 8
"""Times its weights at which a model fits whatever is done on it, so that nothing need be rehearsed."""

RETAINED = 100 << 20
"""Bytes that a run on a CPU ends up with beside what it holds: libraries that are loaded late, tokenised
text, what the C library keeps of freed memory (benchmarks/plans.py)."""

Work = Callable[[Any, torch.dtype, torch.device], Sequence[Phase]]
"""The parts of the work that a model is opened for, from the model without numbers, the dtype and the device
that it will have."""


@dataclass(frozen=True)
class Opening:
    """Bytes of a model's weights, and what opening it takes."""

    weights: Weights
    """In the dtype to compute in."""
    stored: int
    """Of all weight files."""
    mapped: bool
    """Whether the weights in memory are the files themselves: what a cut makes comes on top of them then."""
    on_the_way: int
    """What is held of the largest tensor of a layer while it is read, beside the layer."""

    def in_memory(self, phases: Sequence[Phase]) -> list[tuple[str, int]]:
        """What each part of the work takes with all weights in memory, its name first."""
        found = [("opening", self.weights.all + (0 if self.mapped else self.stored))]
        for phase in phases:
            made = phase.cut if self.mapped else 0
            held = made + phase.copies + phase.bytes + phase.states
            found.append((phase.name, self.weights.all + held))
        return found

    def by_layer(self, phases: Sequence[Phase]) -> list[tuple[str, int]]:
        """The same a layer at a time, with all hidden states in files."""
        found = [("opening", self.weights.rest)]
        for phase in phases:
            layers = phase.layers * self.weights.largest + (self.on_the_way if phase.layers else 0)
            copies = min(phase.copies, self.weights.largest)  # of the experts of one layer
            found.append((phase.name, self.weights.rest + layers + copies + phase.bytes))
        return found


@dataclass(frozen=True)
class Placing:
    """Where the weights of a model go whose layers stay on disk.

    Attributes:
        places: a `device_map` for transformers.
        room: where the hidden states of many batches go.
    """

    places: dict[str, str]
    room: Room


def reading(shape: Any, dtype: torch.dtype, device: torch.device) -> list[Phase]:
    """The work that is assumed where nobody says: measuring perplexity on 16 windows of 512 tokens."""
    return measuring(Rehearsal(shape, dtype, device), Batch(), Batch().size)


def place(
    name: str,
    shape: nn.Module,
    dtype: torch.dtype,
    device: torch.device,
    memory: int | None,
    work: Work | None = None,
    stored: Iterable[tuple[torch.dtype, int]] = (),
    later: int = 0,
) -> Placing | None:
    """Decide where the weights of a model go; None for all in memory, on its device.

    Args:
        name: what the model was opened by, for messages.
        shape: the model without numbers.
        dtype: the dtype to compute in.
        device: where it runs.
        memory: bytes that this process, or its part of an accelerator, may take; None for what is free.
        work: what the model is opened for; None for `reading`.
        stored: dtype and bytes of each tensor on disk.
        later: bytes that will be in use and are not yet.

    Raises:
        UsageError: less memory than one layer at a time takes, or than all do where the work needs all.
    """
    opening = opening_of(shape, dtype, device, stored)
    weights = opening.weights
    used, free = in_use(device)
    limit = used + int(_SHARE * free) if memory is None else memory
    room_to_spare = used + _PLENTY * weights.all <= limit
    fits = used + weights.all <= limit
    if not weights.layers or (memory is None and (room_to_spare or (fits and work is None))):
        return None
    phases = (work or reading)(shape, dtype, device)
    used += retained(device) + later
    needed = used + max(size for _, size in opening.in_memory(phases))
    if needed <= limit:
        return None
    if whole := next((p.name for p in phases if p.whole), None):
        raise UsageError(
            f"model {name[:200]!r} takes {gib(needed)} with all layers in memory, which {whole} need, and "
            f"there are {gib(limit)}; {_more(memory, needed)}, or choose a method that works layer by layer."
        )
    most, least = max(opening.by_layer(phases), key=lambda part: part[1])
    least += used
    if limit < least:
        raise UsageError(
            f"model {name[:200]!r} takes {gib(least)} even a layer at a time ({gib(weights.rest)} of "
            f"embeddings and output head, {gib(weights.largest)} the largest layer, most of the rest for "
            f"{most}), and there are {gib(limit)}; {_more(memory, least)}, or make batches or windows "
            "smaller."
        )
    warnings.warn(
        f"the weights take {gib(weights.all)}, and there is room for {gib(limit - used)} with what is done "
        "on them: the layers stay on disk and come into memory one at a time",
        Notice,
        stacklevel=3,
    )
    layers = f"{find_family(shape).layers}."
    others = (n for n, _ in shape.named_modules() if not n.startswith(layers))
    places = {n: str(device) for n in others if n and not layers.startswith(f"{n}.")}
    places |= {f"{layers}{i}": "disk" for i in range(len(find_layers(shape)))}
    return Placing(places, Room((limit - least) // max(phase.sets for phase in phases)))


def _more(memory: int | None, least: int) -> str:
    """What to do about a limit that is too small."""
    return "free some memory" if memory is None else f"give memory of {gib(least)} or more"


def opening_of(
    shape: nn.Module, dtype: torch.dtype, device: torch.device, stored: Iterable[tuple[torch.dtype, int]]
) -> Opening:
    """What a model's weights take; arguments as in `place`."""
    tensors = list(stored)
    joined = are_joined(shape)
    mapped = device.type == "cpu" and not joined and all(own == dtype for own, _ in tensors)
    size = sum(size for _, size in tensors) if device.type == "cpu" else 0
    times = 1 if mapped else 2
    if joined:  # pages of the files, what they are stacked to, and what that is joined to, in their dtype
        wide = max((own.itemsize for own, _ in tensors), default=dtype.itemsize) / dtype.itemsize
        times = ceil(max(3 * wide - 1, wide + 1))
    weights = weights_of(shape, dtype)
    return Opening(weights, size, mapped, times * weights.tensor)


def in_use(device: torch.device) -> tuple[int, int]:
    """Bytes in use by this process, and bytes that are free, where the model runs."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), torch.cuda.mem_get_info(device)[0]
    return psutil.Process().memory_info().rss, psutil.virtual_memory().available // on_this_machine()


def retained(device: torch.device) -> int:
    """Bytes to allow for beside what a run holds, on its device."""
    return RETAINED if device.type == "cpu" else 0


def gib(size: int) -> str:
    """A size in GiB, rounded up, so that a limit of what it says is enough."""
    return f"{ceil(size / 2**30 * 100) / 100:.2f} GiB"
