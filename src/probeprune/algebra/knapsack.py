"""The cheapest way to give up a budget: one width for every block, the least damage in all.

A knapsack with one choice a block, solved exactly by dynamic programming over what has been saved.
Numbers in, numbers out. Knows nothing of models.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

import numpy as np

from probeprune.errors import UsageError

STATES = 20_000
"""Most amounts of savings told apart. Exact where savings have so large a common divisor; else each is
rounded down to a multiple of the budget's `STATES`-th part, so that the budget is never missed."""


@dataclass(frozen=True)
class Choice:
    """One width a block may have."""

    saving: int
    """What it saves: parameters, FLOPs, nanoseconds."""
    damage: float
    """What it costs."""


def solve(choices: Sequence[Sequence[Choice]], budget: int) -> list[int]:
    """For each block the index of its choice, so that savings reach `budget` at the least damage in all.

    Raises `UsageError` where all of the largest
    savings together are too small.
    """
    most = sum(max(c.saving for c in block) for block in choices)
    if most < budget:
        raise UsageError(
            f"the budget cannot be met: at most {most / max(budget, 1):.1%} of it can be saved while every "
            "block keeps what it must; lower the ratio."
        )
    step = gcd(budget, *(c.saving for block in choices for c in block)) or 1
    if budget // step > STATES:
        step = -(-budget // STATES)
    wanted = -(-budget // step)
    tables = [
        np.full(wanted + 1, np.inf)
    ]  # by state: the least damage of the blocks before; the last saves enough
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
        ways = []
        for index, c in enumerate(block):
            steps = min(c.saving // step, wanted)
            if state < steps:
                continue
            # Enough is enough: whoever saves the rest or more leads there too.
            last = state - steps + 1 if state < wanted else wanted + 1
            source = state - steps + int(before[state - steps : last].argmin())
            ways.append((float(before[source]) + c.damage, index, source))
        _, index, state = min(ways)
        picked.append(index)
    return picked[::-1]
