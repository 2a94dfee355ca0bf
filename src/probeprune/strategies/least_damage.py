"""Allocations by measured damage: the widths that save the budget at the least damage, a knapsack problem.

The damage of every width is measured beforehand (`calibration/damage.py`).
"""

from collections.abc import Sequence

from probeprune.algebra import knapsack
from probeprune.algebra.knapsack import Choice
from probeprune.errors import UsageError
from probeprune.strategies.widths import Prunable, Request, check_even, may_lose_units, role, times


def least_damage(request: Request) -> list[int]:
    """The widths that save at least the ratio of the budget with the least total damage, a knapsack problem
    solved exactly. Every block keeps at least one unit.

    The ratio is a share of the sum of `Damage.whole`. Widths of MLPs are multiples of `round_to`, and of
    about 1/48 of the block. Raises `UsageError` where the ratio is out of reach.
    """
    each = [[i] for i in range(len(request.blocks))]
    free = [b.layer >= request.skip_layers and may_lose_units(b, request) for b in request.blocks]
    return _solve_grouped(request, each, free)


def least_damage_even(request: Request) -> list[int]:
    """As `least_damage`, but with one width for all attention blocks and one for all MLPs, as a plain config
    needs.

    Raises `UsageError` where the ratio is out of reach, layers are skipped or already differ.
    """
    check_even(request)
    roles = dict.fromkeys(role(b) for b in request.blocks)
    alike = [[i for i, b in enumerate(request.blocks) if role(b) == own] for own in roles]
    free = [all(may_lose_units(request.blocks[i], request) for i in group) for group in alike]
    return _solve_grouped(request, alike, free)


def least_damage_heads(request: Request) -> list[int]:
    """As `least_damage`, but with one width for all attention blocks.

    Raises `UsageError` where the ratio is out of reach, layers are skipped or differ in their heads already.
    """
    blocks = request.blocks
    if request.ratio and request.skip_layers:
        raise UsageError("allocation 'damage-heads' cuts all attention blocks alike: skip_layers=0.")
    attention = [i for i, b in enumerate(blocks) if b.kind == "attention"]
    if len({(blocks[i].units, blocks[i].parameters) for i in attention}) > 1:
        raise UsageError("this model's layers differ in their heads already; use allocation 'damage'.")
    mlps = [[i] for i, b in enumerate(blocks) if b.kind != "attention"]
    groups = [attention, *mlps]
    free = [all(may_lose_units(blocks[i], request) for i in group) for group in groups]
    return _solve_grouped(request, groups, free)


def _solve_grouped(request: Request, groups: Sequence[Sequence[int]], free: Sequence[bool]) -> list[int]:
    """Widths such that all blocks of a group, given by index, have the same width, or a fixed number of times
    it; the first is the narrowest. A group that is not free stays whole."""
    blocks, damages = request.blocks, request.damages

    def own(group: Sequence[int], i: int, keep: int) -> int:
        return keep * times(blocks[i]) // times(blocks[group[0]])

    def choice(group: Sequence[int], keep: int) -> Choice:
        gone = [(damages[i], blocks[i].units - own(group, i, keep)) for i in group]
        return Choice(sum(n * d.saving for d, n in gone), sum(float(d.curve[n]) for d, n in gone))

    options = [
        _widths(blocks[group[0]], request.round_to) if may else [blocks[group[0]].units]
        for group, may in zip(groups, free, strict=True)
    ]
    choices = [[choice(group, k) for k in widths] for group, widths in zip(groups, options, strict=True)]
    kept = [b.units for b in blocks]
    budget = round(request.ratio * sum(d.whole for d in damages))
    for group, widths, index in zip(groups, options, knapsack.solve(choices, budget), strict=True):
        for i in group:
            kept[i] = own(group, i, widths[index])
    return kept


def _widths(block: Prunable, round_to: int) -> list[int]:
    """The widths of a block that the knapsack may choose from, widest first."""
    step = max(round_to, block.units // 48 // round_to * round_to) if block.fine else block.parts
    return [block.units, *range(block.units - (block.units % step or step), 0, -step)]
