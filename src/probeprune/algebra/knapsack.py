"""Choose one width per block so that a budget is saved at the least total damage.

A knapsack problem with one choice per block, solved exactly by dynamic programming over the amount saved.
Numbers in, numbers out. Knows nothing of models.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

import numpy as np

from probeprune.errors import UsageError

STATES = 20_000
"""The most amounts of savings that are distinguished. If the savings have a large enough common divisor, the
solution is exact. Otherwise each is rounded down to a multiple of budget / `STATES`, so that the budget is
always met."""


@dataclass(frozen=True)
class Choice:
    """One width a block may have."""

    saving: int
    """Parameters, FLOPs or nanoseconds saved."""
    damage: float
    """Its cost."""


def solve(choices: Sequence[Sequence[Choice]], budget: int) -> list[int]:
    """Choose for each block, so that the savings reach `budget` at the least total damage.

    Args:
        choices: the choices of each block.
        budget: total to save, in the unit of the savings.

    Returns:
        The index of the choice of each block.

    Raises:
        UsageError: a budget above the sum of the largest savings.
    """
    most = sum(max(c.saving for c in block) for block in choices)
    if most < budget:
        raise UsageError(
            f"the budget cannot be met: at most {most / max(budget, 1):.1%} of it can be saved while every "
            "block keeps its smallest width; lower the ratio."
        )
    step = gcd(budget, *(c.saving for block in choices for c in block)) or 1
    if budget // step > STATES:
        step = -(-budget // STATES)
    wanted = -(-budget // step)
    # For each number of blocks, the least damage by amount saved in steps. The last entry means "enough".
    tables = [np.full(wanted + 1, np.inf)]
    tables[0][0] = 0
    for block in choices:
        reached = np.full(wanted + 1, np.inf)
        for c in block:
            steps = min(c.saving // step, wanted)
            reached[steps:] = np.minimum(reached[steps:], tables[-1][: wanted + 1 - steps] + c.damage)
            reached[wanted] = min(reached[wanted], tables[-1][wanted - steps :].min() + c.damage)
        tables.append(reached)
    if not np.isfinite(tables[-1][wanted]):
        raise UsageError("the budget cannot be met once savings are rounded; lower the ratio a little.")
    state, picked = wanted, []
    for block, before in zip(reversed(choices), reversed(tables[:-1]), strict=True):
        options = []
        for index, c in enumerate(block):
            steps = min(c.saving // step, wanted)
            if state < steps:
                continue
            # The last entry means "at least the budget", so any larger amount leads there too.
            last = state - steps + 1 if state < wanted else wanted + 1
            source = state - steps + int(before[state - steps : last].argmin())
            options.append((float(before[source]) + c.damage, index, source))
        _, index, state = min(options)
        picked.append(index)
    return picked[::-1]
