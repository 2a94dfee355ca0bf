"""Allocation: how many units each block keeps, so that the whole model loses the requested share.

Budgets are counted in parameters of the model's blocks, which for linear maps is the same share of the FLOPs
per token. The ratio is a share of all blocks, including those in skipped first layers. An allocation is a
function from a `Request` to the widths of all blocks; to add one, give it a row in `ALLOCATIONS`. Nothing
here reads a batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from probeprune.errors import UsageError
from probeprune.model.experts import Stack
from probeprune.strategies import Part
from probeprune.strategies.least_damage import least_damage, least_damage_even, least_damage_heads
from probeprune.strategies.widths import (
    Prunable,
    Request,
    candidates,
    check_alive,
    check_even,
    nearest_width,
    step_of,
    times,
)

MISSED = 0.01
"""Difference between a ratio and what was removed beyond which it is said; smaller ones are rounding."""


def uniform(request: Request) -> list[int]:
    """The same share from every pruned block, exact in total.

    Attention loses `int(r' * units)` units. The steps of a few heads are coarse, so MLPs and experts lose as
    many units as it takes for the total to reach the ratio. Widths of MLPs are the nearest multiples of
    `round_to`.
    """
    blocks = request.blocks
    pruned, share = candidates(request)
    kept = [b.units for b in blocks]
    mlps = [i for i in pruned if blocks[i].kind != "attention"] or pruned
    left = request.ratio * sum(b.parameters for b in blocks)
    left -= _cut_heads(blocks, [i for i in pruned if i not in mlps], share, kept)
    to_come = sum(blocks[i].parameters for i in mlps)
    for i in mlps:
        # The rest is spread over the blocks still to come, so that rounding errors do not add up.
        kept[i] = nearest_width(blocks[i], left * blocks[i].parameters / to_come, request.round_to)
        left -= (blocks[i].units - kept[i]) * blocks[i].unit_parameters
        to_come -= blocks[i].parameters
    return kept


def even(request: Request) -> list[int]:
    """As `uniform`, but with one width for all layers, as a plain config needs: the common MLP width (a
    multiple of `round_to`) that comes closest to the budget. An MLP whose width a plain config takes from
    that of the experts beside it follows them.

    One that a plain config makes twice as wide as the others stays so.

    Raises `UsageError` where layers are skipped or already differ.
    """
    blocks = request.blocks
    check_even(request)
    pruned, share = candidates(request)
    kept = [b.units for b in blocks]
    mlps = [i for i in pruned if blocks[i].kind != "attention"]
    left = request.ratio * sum(b.parameters for b in blocks)
    left -= _cut_heads(blocks, [i for i in pruned if i not in mlps], share, kept)
    led = next((i for i in mlps if isinstance(blocks[i], Stack) and blocks[i].fine), None)
    mixture = any(isinstance(b, Stack) for b in blocks)
    followers = {i for i in mlps if mixture and _follows(blocks[i])}
    alive = [i for i in mlps if i not in followers or led is not None]
    total = sum(blocks[i].parameters for i in alive)
    for i in alive:
        if i not in followers:
            step = request.round_to * times(blocks[i])
            kept[i] = nearest_width(blocks[i], left * blocks[i].parameters / total, step)
    if led is not None:
        for i in followers:
            kept[i] = _follows(blocks[i]) * kept[led]
    return kept


def _follows(block: Prunable) -> int:
    """Channels for each channel of an expert in a plain config; 0 for a block with a width of its own."""
    return 0 if isinstance(block, Stack) else block.follows


def nominal(request: Request) -> list[int]:
    """The research code's rounding, block by block.

    `r'` is rounded to two decimals, `int(r' * units)` units are removed, and MLP widths are rounded up to a
    multiple of `round_to`.
    """

    def keep(block: Prunable, share: float) -> int:
        gone = _floor(share * block.units) if block.fine else _heads(block, share)
        return block.units - gone

    return _each_alone(request, keep)


def nominal_kept(request: Request) -> list[int]:
    """LLM-Pruner's rounding: as `nominal`, but the number of kept channels is rounded down.

    Of C channels, `C - int(C (1 - r'))` are removed; for attention, this is rounded down again to whole
    heads.
    """

    def keep(block: Prunable, share: float) -> int:
        if block.kind == "experts" and not block.fine:
            return block.units - _heads(block, share)
        if block.kind == "attention":
            channels = block.width - _floor(block.width * (1 - share))
            return block.units - _heads(block, channels / block.width)
        return _floor(block.units * (1 - share))

    return _each_alone(request, keep)


def _each_alone(request: Request, keep: Callable[[Prunable, float], int]) -> list[int]:
    """Widths by a rule that looks at one block at a time, given the share to remove."""
    pruned, share = candidates(request)
    kept = [b.units for b in request.blocks]
    for i in pruned:
        block = request.blocks[i]
        kept[i] = keep(block, round(share, 2))
        if block.fine:
            step = step_of(block, request.round_to)
            kept[i] = min(-(-kept[i] // step) * step, block.units)
        check_alive(block, kept[i])
    return kept


def _cut_heads(blocks: Sequence[Prunable], which: Sequence[int], share: float, kept: list[int]) -> int:
    """Subtract the share of these attention blocks from `kept`; return the number of parameters removed."""
    gone = 0
    for i in which:
        heads = _heads(blocks[i], share)
        kept[i] -= heads
        gone += heads * blocks[i].unit_parameters
    return gone


def _heads(block: Prunable, share: float) -> int:
    """Number of coarse units to remove: the share rounded down, within each part for heads of equal
    groups."""
    return block.parts * _floor(share * block.units / block.parts)


def global_threshold(request: Request) -> list[int]:
    """FLAP's allocation: one threshold over the scores of all blocks.

    Scores must be comparable between blocks (FLAP standardises them within each). Units are removed from the
    least important one on, until their parameters add up to the ratio; a head and an MLP channel thus count
    by their size. A block always keeps its best unit, a router as many experts as it takes; `balanced` units
    are removed in steps of one per group.
    """
    blocks, scores = request.blocks, request.scores
    pruned, _ = candidates(request)
    budget = request.ratio * sum(b.parameters for b in blocks)
    flat = torch.cat([scores[i].float().cpu() for i in pruned])
    owner = torch.cat(
        [torch.full((blocks[i].units,), i, dtype=torch.long, device="cpu") for i in pruned]
    ).tolist()
    kept = [b.units for b in blocks]
    for index in flat.argsort(stable=True).tolist():
        block = blocks[owner[index]]
        if budget < block.unit_parameters / 2:
            break
        if kept[owner[index]] > block.least:
            kept[owner[index]] -= 1
            budget -= block.unit_parameters
    else:
        raise UsageError(
            f"ratio {request.ratio:g} cannot be reached while every block keeps a unit; lower it."
        )
    for i, block in enumerate(blocks):
        if isinstance(block, Stack) and block.fine:
            step = step_of(block, request.round_to)
            kept[i] = min(max(round(kept[i] / step), 1) * step, block.units)
        else:
            kept[i] = -(-kept[i] // block.parts) * block.parts
    return kept


@dataclass(frozen=True)
class Allocation:
    """A rule for the widths of all blocks, and its needs."""

    widths: Callable[[Request], list[int]]
    """Number of units that each block keeps. Raises `UsageError` for an impossible ratio."""
    description: str
    needs: frozenset[Part] = frozenset()
    """Parts of `Statistics` that it needs."""
    needs_scores: bool = False
    """Whether it compares the scores of all blocks."""
    equal_widths: str = "even"
    """Name of the same allocation with one width for all layers."""
    equal_heads: str = "uniform"
    """Name of the same allocation with one width for all attention blocks, where no layer is skipped."""
    unmeasured: str | None = None
    """Name of an allocation for the same layers that needs no measurement, to try out a cut first; None where
    this one needs none."""


ALLOCATIONS: dict[str, Allocation] = {
    "uniform": Allocation(uniform, "the same share from every block, exact in total"),
    "even": Allocation(even, "the same, with one width for all layers"),
    "nominal": Allocation(nominal, "the research code's rounding, block by block"),
    "nominal-kept": Allocation(nominal_kept, "LLM-Pruner's rounding"),
    "global": Allocation(
        global_threshold, "one threshold over the scores of all blocks (FLAP)", needs_scores=True
    ),
    "damage": Allocation(
        least_damage,
        "the widths with the least measured damage",
        frozenset({"damages"}),
        equal_widths="damage-even",
        equal_heads="damage-heads",
        unmeasured="uniform",
    ),
    "damage-even": Allocation(
        least_damage_even,
        "the same, with one width for all layers",
        frozenset({"damages"}),
        equal_widths="damage-even",
        equal_heads="damage-heads",
        unmeasured="even",
    ),
    "damage-heads": Allocation(
        least_damage_heads,
        "the same, with one width for all attention blocks",
        frozenset({"damages"}),
        equal_widths="damage-even",
        equal_heads="damage-heads",
        unmeasured="uniform",
    ),
}
"""Allocations by name."""


def chosen_by_group(block: Prunable) -> bool:
    """Whether every group of a block keeps as many units as the others, whatever their scores."""
    return block.parts > 1


def choose_units(scores: torch.Tensor, keep: int, block: Prunable) -> torch.Tensor:
    """Ids of the `keep` most important units, ascending: LongTensor (keep,); of scores (experts, channels),
    of each expert's own: (experts, keep). Ties go to the lower id."""
    if scores.ndim == 2:
        return scores.argsort(dim=1, descending=True, stable=True)[:, :keep].sort(dim=1).values
    if chosen_by_group(block):
        groups = scores.view(block.parts, -1)
        best = groups.argsort(dim=1, descending=True, stable=True)[:, : keep // block.parts]
        first = torch.arange(block.parts, device=scores.device)[:, None] * groups.shape[1]
        return (best + first).flatten().sort().values
    return scores.argsort(descending=True, stable=True)[:keep].sort().values


def removed_share(blocks: Sequence[Prunable], kept: Sequence[int]) -> float:
    """The achieved share: parameters that these widths remove, over those of all blocks."""
    return removed_parameters(blocks, kept) / sum(b.parameters for b in blocks)


def missed_ratio(ratio: float, removed: float) -> str | None:
    """A sentence where the removed share of the parameters misses the ratio by more than `MISSED`; else None.

    Widths come in whole heads and multiples of `round_to`, so a small or half pruned model may be far off.
    """
    if abs(removed - ratio) <= MISSED:
        return None
    return (
        f"asked for {ratio:.1%} of the blocks' parameters, removed {removed:.1%}: widths come in whole heads "
        "and multiples of round_to; another ratio or a smaller round_to may come closer."
    )


def removed_parameters(blocks: Sequence[Prunable], kept: Sequence[int]) -> int:
    """Number of parameters that these widths remove."""
    return sum((b.units - k) * b.unit_parameters for b, k in zip(blocks, kept, strict=True))


def _floor(x: float) -> int:
    """`int(x)`, but 0.2 * 30 / 27 * 9 is 2, not 1.9999999."""
    return int(x + 1e-9)
