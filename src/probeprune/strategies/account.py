"""When a probe pays: batches earn the time that pruning saves them, and probes are paid from it.

Decisions follow from the shapes of batches and from measured costs alone, so a run with the same costs makes
the same ones again. Nothing here looks at a tensor. `runtime/measuring.py` measures the costs.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from probeprune.algebra.moments import Tokens
from probeprune.errors import UsageError
from probeprune.strategies.probe import Probe, probe_size

MARGIN = 1.25
"""Price of a probe over its measured time: times that were measured are a fifth off on a busy machine."""


@dataclass(frozen=True)
class Costs:
    """What batches cost one model under one method on one machine, in seconds of its pruned layers.

    Costs of other sizes lie on the straight lines between the measured ones. Below the smallest they are
    those of the smallest; beyond the largest they grow as between the last two, or in proportion to one.

    Raises `UsageError` for lists of different lengths, sizes that do not grow, and times that are no numbers
    from 0.
    """

    tokens: tuple[int, ...]
    """Sizes of the batches measured, in tokens, ascending."""
    dense: tuple[float, ...]
    """Seconds of a batch of each size, dense."""
    pruned: tuple[float, ...]
    """Seconds of the same batch pruned, with units and consumers at hand."""
    probe_tokens: tuple[int, ...]
    """Sizes of the probes measured, in tokens, ascending."""
    probe: tuple[float, ...]
    """Seconds that probing, and all that follows from it (scores, swaps, refits), adds to a batch."""

    def __post_init__(self) -> None:
        for sizes, *times in ((self.tokens, self.dense, self.pruned), (self.probe_tokens, self.probe)):
            wrong = not sizes or any(len(t) != len(sizes) for t in times)
            wrong = wrong or any(not isinstance(s, int) or s < 1 for s in sizes)
            wrong = wrong or any(b <= a for a, b in pairwise(sizes))
            if wrong or not all(isinstance(s, int | float) and 0 <= s < math.inf for t in times for s in t):
                raise UsageError(
                    "costs are lists of seconds, one for each size, and sizes that grow from at least 1 "
                    "token; take them from a handle (`handle.costs`)."
                )
        for name, value in asdict(self).items():
            object.__setattr__(self, name, tuple(value))

    def earned(self, tokens: int) -> float:
        """Seconds that pruning saves a batch of this many tokens, at least 0."""
        return max(_at(tokens, self.tokens, self.dense) - _at(tokens, self.tokens, self.pruned), 0.0)

    def probing(self, tokens: int) -> float:
        """Seconds that a probe of this many tokens adds to a batch."""
        return max(_at(tokens, self.probe_tokens, self.probe), 0.0)

    def record(self) -> dict[str, Any]:
        """As JSON values; `Costs(**record)` gives them back."""
        return {name: list(value) for name, value in asdict(self).items()}


def _at(size: int, sizes: Sequence[int], times: Sequence[float]) -> float:
    """The time at a size, from those at measured sizes."""
    if size <= sizes[0]:
        return times[0]
    if len(sizes) == 1:
        return times[0] * size / sizes[0]
    right = min(bisect_right(sizes, size), len(sizes) - 1)
    slope = (times[right] - times[right - 1]) / (sizes[right] - sizes[right - 1])
    return times[right - 1] + slope * (size - sizes[right - 1])


class Account:
    """An account of time, in seconds.

    Every batch adds what pruning saves it. A probe is made where the balance covers it, and is paid from it,
    at `MARGIN` times what it was measured to cost. The balance never exceeds the price of a probe of the last
    batch: large batches do not pay for a long run of small ones that would each be slower than dense.
    """

    def __init__(self, costs: Costs, probe: Probe) -> None:
        self.costs, self.balance = costs, 0.0
        self._probe = probe

    def pays(self, tokens: Tokens) -> bool:
        """Enter a batch; returns whether it is probed. Padding counts: it takes as long as text."""
        samples, positions = probe_size(self._probe, tokens.batch, tokens.length)
        price = MARGIN * self.costs.probing(samples * positions)
        self.balance += self.costs.earned(tokens.batch * tokens.length)
        probed = self.balance >= price
        self.balance = min(self.balance - price if probed else self.balance, price)
        return probed
