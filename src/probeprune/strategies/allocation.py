"""Allocation: how many units each block keeps, so that the whole model loses what was asked for.

Budgets are counted in parameters of the model's blocks, which for linear maps is the same share of FLOPs a
token. The ratio is over all blocks, those in skipped first layers included. Nothing here looks at a batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from probeprune.algebra import knapsack
from probeprune.algebra.knapsack import Choice
from probeprune.errors import UsageError
from probeprune.model.blocks import Block

ALLOCATIONS = ("uniform", "even", "nominal", "nominal-kept", "global", "damage", "damage-even")
KINDS = ("attention", "mlp")


def check_ratio(ratio: float) -> None:
    """Raise `UsageError` unless `ratio` lies in [0, 1)."""
    if not 0 <= ratio < 1:
        raise UsageError(f"pruning ratio {ratio:g} is outside [0, 1); 0.4 prunes 40 % of the model's blocks.")


def candidates(
    blocks: Sequence[Block], ratio: float, skip_layers: int, kinds: Sequence[str] = KINDS
) -> tuple[list[int], float]:
    """Which blocks may lose units, and what share of their parameters must go.

    For equal layers the share is `r' = r L / (L - skipped)` (Probe Pruning, section 5). Raises `UsageError`
    where nothing would be left.
    """
    check_ratio(ratio)
    layers = 1 + max(b.layer for b in blocks)
    if ratio and skip_layers >= layers:
        raise UsageError(
            f"skip_layers={skip_layers} leaves none of the model's {layers} layers to prune; lower it."
        )
    pruned = [i for i, b in enumerate(blocks) if b.layer >= skip_layers and b.kind in kinds]
    prunable = sum(blocks[i].parameters for i in pruned)
    total = sum(b.parameters for b in blocks)
    share = ratio * total / max(prunable, 1)
    if share >= 1:
        raise UsageError(
            f"ratio {ratio:g} of all blocks would remove everything that may be pruned "
            f"({' and '.join(kinds)} behind the first {skip_layers} layers); use at most "
            f"{prunable / total - 0.01:.2f}, or skip fewer."
        )
    return pruned, share


def uniform(
    blocks: Sequence[Block],
    ratio: float,
    *,
    skip_layers: int = 3,
    round_to: int = 1,
    kinds: Sequence[str] = KINDS,
) -> list[int]:
    """Every pruned block loses the same share, and the whole adds up; returns the units each block keeps.

    Attention loses `int(r' * units)` units; MLPs lose whatever makes the whole add up to `ratio`, since few
    heads make coarse steps. Widths of MLPs are the nearest multiples of `round_to`.
    """
    pruned, share = candidates(blocks, ratio, skip_layers, kinds)
    kept = [b.units for b in blocks]
    fine = [i for i in pruned if blocks[i].kind == "mlp"] or pruned
    left = ratio * sum(b.parameters for b in blocks)
    left -= _cut_heads(blocks, [i for i in pruned if i not in fine], share, kept)
    to_come = sum(blocks[i].parameters for i in fine)
    for i in fine:
        # What is still to go is spread over the blocks still to come: rounding errors do not add up.
        kept[i] = _nearest(blocks[i], left * blocks[i].parameters / to_come, round_to)
        left -= (blocks[i].units - kept[i]) * blocks[i].unit_parameters
        to_come -= blocks[i].parameters
    return kept


def even(
    blocks: Sequence[Block],
    ratio: float,
    *,
    skip_layers: int = 0,
    round_to: int = 1,
    kinds: Sequence[str] = KINDS,
) -> list[int]:
    """As `uniform`, but one width for all layers, as a plain config needs: the budget is hit as near as one
    common MLP width (a multiple of `round_to`) can.

    Raises `UsageError` where layers are skipped or differ already.
    """
    _check_even(blocks, ratio, skip_layers)
    pruned, share = candidates(blocks, ratio, skip_layers, kinds)
    kept = [b.units for b in blocks]
    mlps = [i for i in pruned if blocks[i].kind == "mlp"]
    left = ratio * sum(b.parameters for b in blocks)
    left -= _cut_heads(blocks, [i for i in pruned if i not in mlps], share, kept)
    for i in mlps:
        kept[i] = _nearest(blocks[i], left / len(mlps), round_to)
    return kept


def _check_even(blocks: Sequence[Block], ratio: float, skip_layers: int) -> None:
    """Raise `UsageError` where layers cannot have one width."""
    if ratio and skip_layers:
        raise UsageError("allocations 'even' and 'damage-even' give all layers one width: skip_layers=0.")
    if len({b.units for b in blocks}) > 2 or len({b.parameters for b in blocks}) > 2:
        raise UsageError("this model's layers differ in width already; use an allocation that is not even.")


def nominal(
    blocks: Sequence[Block],
    ratio: float,
    *,
    skip_layers: int = 3,
    round_to: int = 1,
    kinds: Sequence[str] = KINDS,
    floor_kept: bool = False,
) -> list[int]:
    """The research code's rounding, each block on its own; returns the units each block keeps.

    `r'` is rounded to two decimals, `int(r' * units)` units go, MLP widths are rounded up to a multiple of
    `round_to`. With `floor_kept` (LLM-Pruner's code) what stays is rounded down instead: of C channels
    `C - int(C (1 - r'))` go, in whole heads rounded down again.
    """
    pruned, share = candidates(blocks, ratio, skip_layers, kinds)
    share = round(share, 2)
    kept = [b.units for b in blocks]
    for i in pruned:
        block = blocks[i]
        if block.kind == "attention":
            channels = block.width - _floor(block.width * (1 - share))
            kept[i] -= _heads(block, channels / block.width if floor_kept else share)
        else:
            keep = (
                _floor(block.units * (1 - share)) if floor_kept else block.units - _floor(share * block.units)
            )
            kept[i] = min(-(-keep // round_to) * round_to, block.units)
        _check_alive(block, kept[i])
    return kept


def _cut_heads(blocks: Sequence[Block], which: Sequence[int], share: float, kept: list[int]) -> int:
    """Take the share of these attention blocks off `kept`; returns the parameters that go with it."""
    gone = 0
    for i in which:
        heads = _heads(blocks[i], share)
        kept[i] -= heads
        gone += heads * blocks[i].unit_parameters
    return gone


def _heads(block: Block, share: float) -> int:
    """Attention units that go: the share rounded down, for `balanced` units in each group alike."""
    parts = block.kv_heads if block.unit_kind == "balanced" else 1
    return parts * _floor(share * block.units / parts)


def _nearest(block: Block, parameters: float, round_to: int) -> int:
    """Units a block keeps so that about so many parameters go."""
    step = round_to if block.kind == "mlp" else block.kv_heads if block.unit_kind == "balanced" else 1
    keep = block.units - max(parameters, 0) / block.unit_parameters
    kept = min(max(round(keep / step), keep >= 1) * step, block.units)
    _check_alive(block, kept)
    return kept


def _check_alive(block: Block, keep: int) -> None:
    if keep < 1:
        raise UsageError(
            f"the ratio leaves {block.name} without units; lower the ratio or skip_layers, or choose finer "
            "attention units."
        )


def global_threshold(
    blocks: Sequence[Block],
    scores: Sequence[torch.Tensor],
    ratio: float,
    *,
    skip_layers: int = 3,
    kinds: Sequence[str] = KINDS,
) -> list[int]:
    """FLAP's allocation: one threshold over the scores of all blocks; returns the units each block keeps.

    Scores must be comparable between blocks (FLAP standardises them within each). From the least important
    unit on, units go until their parameters, which weigh a head against MLP channels, add up to `ratio` of
    all. A block always keeps its best unit; `balanced` units go in steps of one from every group.
    """
    pruned, _ = candidates(blocks, ratio, skip_layers, kinds)
    budget = ratio * sum(b.parameters for b in blocks)
    flat = torch.cat([scores[i].float().cpu() for i in pruned])
    owner = torch.cat([torch.full((blocks[i].units,), i) for i in pruned]).tolist()
    kept = [b.units for b in blocks]
    for index in flat.argsort(stable=True).tolist():
        block = blocks[owner[index]]
        if budget < block.unit_parameters / 2:
            break
        if kept[owner[index]] > 1:
            kept[owner[index]] -= 1
            budget -= block.unit_parameters
    else:
        raise UsageError(f"ratio {ratio:g} cannot be reached while every block keeps a unit; lower it.")
    for i, block in enumerate(blocks):
        if block.unit_kind == "balanced" and block.kind == "attention":
            kept[i] = -(-kept[i] // block.kv_heads) * block.kv_heads
    return kept


@dataclass(frozen=True, eq=False)
class Damage:
    """What cutting a block to any width costs, and what it saves of parameters, FLOPs or nanoseconds."""

    curve: torch.Tensor
    """(units + 1,), nats a token by how many of its units leave (`damage.damages`)."""
    saving: int
    """What one unit saves."""
    whole: int
    """What the whole block takes."""


def least_damage(
    blocks: Sequence[Block],
    ratio: float,
    damages: Sequence[Damage],
    *,
    skip_layers: int = 0,
    round_to: int = 1,
    kinds: Sequence[str] = KINDS,
) -> list[int]:
    """The widths that save at least `ratio` of what all blocks take at the least damage in all, a knapsack
    solved exactly; returns the units each block keeps, at least one.

    Args:
        blocks: all of the model.
        ratio: share of the sum of `Damage.whole`.
        damages: of each block.
        skip_layers, kinds: as in `candidates`.
        round_to: widths of MLPs are multiples of this, and of 1/48 of the block.

    Raises `UsageError` where the ratio is out of reach.
    """
    each = [[i] for i in range(len(blocks))]
    free = [b.layer >= skip_layers and b.kind in kinds for b in blocks]
    return _together(each, free, blocks, ratio, damages, round_to)


def least_damage_even(
    blocks: Sequence[Block],
    ratio: float,
    damages: Sequence[Damage],
    *,
    skip_layers: int = 0,
    round_to: int = 1,
    kinds: Sequence[str] = KINDS,
) -> list[int]:
    """As `least_damage`, but one width for all attention blocks and one for all MLPs: a plain config's.

    Raises `UsageError` where the ratio is out of reach, layers are to be skipped or differ already.
    """
    _check_even(blocks, ratio, skip_layers)
    alike = [[i for i, b in enumerate(blocks) if b.kind == kind] for kind in KINDS]
    return _together(alike, [kind in kinds for kind in KINDS], blocks, ratio, damages, round_to)


def _together(
    groups: Sequence[Sequence[int]],
    free: Sequence[bool],
    blocks: Sequence[Block],
    ratio: float,
    damages: Sequence[Damage],
    round_to: int,
) -> list[int]:
    """Units each block keeps, where the blocks of a group, by index, have one width; whole unless free."""

    def choice(group: Sequence[int], keep: int) -> Choice:
        gone = [(damages[i], blocks[i].units - keep) for i in group]
        return Choice(sum(n * d.saving for d, n in gone), sum(float(d.curve[n]) for d, n in gone))

    widths = [
        _widths(blocks[group[0]], round_to) if may else [blocks[group[0]].units]
        for group, may in zip(groups, free, strict=True)
    ]
    choices = [[choice(group, k) for k in own] for group, own in zip(groups, widths, strict=True)]
    kept = [b.units for b in blocks]
    budget = round(ratio * sum(d.whole for d in damages))
    for group, own, index in zip(groups, widths, knapsack.solve(choices, budget), strict=True):
        for i in group:
            kept[i] = own[index]
    return kept


def _widths(block: Block, round_to: int) -> list[int]:
    """The widths of a block that are told apart, widest first."""
    if block.kind == "attention":
        step = block.kv_heads if block.unit_kind == "balanced" else 1
    else:
        step = max(round_to, block.units // 48 // round_to * round_to)
    return [block.units, *range(block.units - (block.units % step or step), 0, -step)]


def choose_units(scores: torch.Tensor, keep: int, block: Block) -> torch.Tensor:
    """Ids of the `keep` most important units, ascending: LongTensor (keep,). Ties go to the lower id."""
    if block.unit_kind == "balanced" and block.kind == "attention":
        groups = scores.view(block.kv_heads, block.group_size)
        best = groups.argsort(dim=1, descending=True, stable=True)[:, : keep // block.kv_heads]
        first = torch.arange(block.kv_heads, device=scores.device)[:, None] * block.group_size
        return (best + first).flatten().sort().values
    return scores.argsort(descending=True, stable=True)[:keep].sort().values


def removed_share(blocks: Sequence[Block], kept: Sequence[int]) -> float:
    """The share of all blocks' parameters that these widths really remove."""
    return removed_parameters(blocks, kept) / sum(b.parameters for b in blocks)


def removed_parameters(blocks: Sequence[Block], kept: Sequence[int]) -> int:
    """How many parameters these widths remove."""
    return sum((b.units - k) * b.unit_parameters for b, k in zip(blocks, kept, strict=True))


def _floor(x: float) -> int:
    """`int(x)`, but 0.2 * 30 / 27 * 9 is 2, not 1.9999999."""
    return int(x + 1e-9)
