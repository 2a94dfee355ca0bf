"""What an allocation is given, and the steps that allocations have in common."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm

import torch

from probeprune.errors import UsageError
from probeprune.model.blocks import Block
from probeprune.model.experts import Stack
from probeprune.ranges import check

KINDS = ("attention", "mlp", "experts")

ALIGNED = 8
"""Widths of experts are multiples of this: the kernels that multiply all experts at once ask for rows of
whole 16 bytes, in bfloat16 too."""

Prunable = Block | Stack
"""What an allocation gives a width to."""


@dataclass(frozen=True, eq=False)
class Damage:
    """The damage of cutting a block to any width, and the saving: parameters, FLOPs or nanoseconds."""

    curve: torch.Tensor
    """Nats per token, (units + 1,), by the number of units removed (`calibration/damage.py`)."""
    saving: int
    """Saving of removing one unit."""
    whole: int
    """Cost of the whole block, in the same quantity."""


@dataclass(frozen=True)
class Request:
    """The input of an allocation."""

    blocks: Sequence[Prunable]
    """All blocks and stacks of experts of the model, in order."""
    ratio: float
    """Share of the budget to remove, in [0, 1)."""
    skip_layers: int = 0
    """Number of first layers that stay dense."""
    round_to: int = 1
    """Widths of MLPs, and of experts whose channels go, are multiples of this."""
    kinds: Sequence[str] = KINDS
    """Which kinds of blocks are pruned."""
    scores: Sequence[torch.Tensor] = ()
    """Scores of the units of every block, (units,) each; only for an allocation that needs scores."""
    damages: Sequence[Damage] = ()
    """Damages of every block; only for an allocation that needs damages."""


def candidates(request: Request) -> tuple[list[int], float]:
    """Indices of the blocks that may lose units, and the share of their parameters to remove.

    For equal layers the share is `r' = r L / (L - skipped)` (Probe Pruning, section 5). Raises `UsageError`
    where nothing would be left.
    """
    blocks, ratio, skipped = request.blocks, request.ratio, request.skip_layers
    check(ratio=ratio)
    layers = 1 + max(b.layer for b in blocks)
    if ratio and skipped >= layers:
        raise UsageError(
            f"skip_layers={skipped} leaves none of the model's {layers} layers to prune; lower it."
        )
    pruned = [i for i, b in enumerate(blocks) if b.layer >= skipped and may_lose_units(b, request)]
    prunable = sum(blocks[i].parameters for i in pruned)
    total = sum(b.parameters for b in blocks)
    share = ratio * total / max(prunable, 1)
    if share >= 1:
        kinds = dict.fromkeys(blocks[i].kind for i in pruned)
        raise UsageError(
            f"ratio {ratio:g} of all blocks would remove everything that may be pruned "
            f"({' and '.join(kinds)} behind the first {skipped} layers); use at most "
            f"{prunable / total - 0.01:.2f}, or a smaller skip_layers."
        )
    return pruned, share


def may_lose_units(block: Prunable, request: Request) -> bool:
    """Whether the request takes units from blocks of this kind, and the block can lose some."""
    return block.kind in request.kinds and block.whole is None


def nearest_width(block: Prunable, parameters: float, round_to: int) -> int:
    """The number of units a block keeps so that about `parameters` go, in the steps that its widths come in.

    Raises `UsageError` where no unit would stay.
    """
    step = step_of(block, round_to)
    keep = block.units - max(parameters, 0) / block.unit_parameters
    kept = min(max(round(keep / step), keep >= 1) * step, block.units)
    check_alive(block, kept)
    return kept


def step_of(block: Prunable, round_to: int) -> int:
    """The steps that the widths of a block come in."""
    if not block.fine:
        return block.parts
    return lcm(round_to, ALIGNED) if isinstance(block, Stack) else round_to


def check_alive(block: Prunable, keep: int) -> None:
    """Raise `UsageError` where a block would keep no unit, or fewer experts than its router takes."""
    if isinstance(block, Stack) and keep < block.least and block.unit == "expert":
        groups = f" from {block.groups_per_token} of {block.groups} groups" if block.groups > 1 else ""
        raise UsageError(
            f"the ratio leaves {block.name} with {max(keep, 0)} of {block.experts} experts, and its router "
            f"takes {block.per_token} for a token{groups}, so at least {block.least} must stay; lower the "
            "ratio, or take channels of experts (experts='channel')."
        )
    if keep < 1:
        raise UsageError(
            f"the ratio leaves {block.name} without units; lower the ratio or skip_layers, or choose finer "
            "attention units."
        )


def check_even(request: Request) -> None:
    """Raise `UsageError` where layers cannot all have the same width."""
    blocks = [b for b in request.blocks if may_lose_units(b, request)]
    if request.ratio and request.skip_layers:
        raise UsageError("allocations 'even' and 'damage-even' give all layers one width: skip_layers=0.")
    sizes = {(role(b), b.units / times(b), b.parameters / times(b)) for b in blocks}
    if len(sizes) > len({role(b) for b in blocks}):
        raise UsageError("this model's layers differ in width already; use an allocation that is not even.")


def times(block: Prunable) -> int:
    """How many times the width that a plain config says for all blocks like it is a block's own."""
    return 1 if isinstance(block, Stack) else block.times


def role(block: Prunable) -> str:
    """What a block is in its layer, alike in all layers: its kind and the end of its name."""
    return f"{block.kind} {block.name.partition(f'.{block.layer}.')[2]}"
