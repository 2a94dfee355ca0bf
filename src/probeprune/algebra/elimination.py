"""Structured optimal brain surgery: the order in which units leave a linear map at the least cost.

At each step the unit leaves whose loss costs least after all remaining ones have been refitted to compensate
for it (Hassibi and Stork 1993; for blocks of columns Kurtic et al. 2023, ZipLM). Tensors in, tensors out.
Knows nothing of models, blocks or text.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from probeprune.algebra.factors import factorised, root

LOOKS = 64
"""Number of times that scores are computed for a block by default; units leave together in between."""
_CACHE = 2**20
"""Numbers that a CPU works on at a time: small enough for its cache."""


@dataclass(frozen=True, eq=False)
class Elimination:
    """The order in which units leave, and its cost.

    Attributes:
        order: LongTensor (gone,), ids of the units that have left; the first to leave comes first.
        damage: (gone + 1,), float64, never decreasing. Entry i is the squared error per token after the
            first i units have left and the rest has been refitted; weighted by the metric if there is one.
        stay: LongTensor, ids of the units that were to stay, ascending.
    """

    order: torch.Tensor
    damage: torch.Tensor
    stay: torch.Tensor

    @property
    def scores(self) -> torch.Tensor:
        """(units,), float32: the rank of each unit in the order; the last to leave is the most important.
        Units that stay share the highest rank."""
        gone = len(self.order)
        ranks = torch.full((gone + len(self.stay),), gone, dtype=torch.float32, device=self.order.device)
        ranks[self.order] = torch.arange(gone, dtype=torch.float32, device=self.order.device)
        return ranks


@torch.no_grad()
def eliminate(
    moment: torch.Tensor,
    weight: torch.Tensor,
    width: int = 1,
    *,
    metric: torch.Tensor | None = None,
    at_once: int | None = None,
    keep: int = 0,
) -> Elimination:
    """Remove units from `W z` until `keep` are left.

    Losing the unit with columns `U` costs `tr(W_U' M W_U (P_UU)^-1)`, where `P` is the inverse of the second
    moment over the remaining columns and `W` the weight refitted to them. For what it takes see
    `eliminate_from`; factor and inverse take n^3 / 2 multiplications more.

    Args:
        moment: second moment of `z` per token (n, n), damped so that it can be inverted; all work is in its
            dtype.
        weight: `W` (d, n), already fitted to the whole of `z`.
        width: columns per unit.
        metric: `M` (d, d), the weighting of output errors; None for the identity.
        at_once: units that leave after each computation of the scores; None for `LOOKS` computations in all.
        keep: number of units that stay, at which the work ends.

    Raises:
        FloatingPointError: a moment that is not finite or cannot be factorised, a metric that is not finite.
    """
    inverse = torch.cholesky_inverse(factorised(moment))
    return eliminate_with(inverse, weight, width, metric=metric, at_once=at_once, keep=keep)


@torch.no_grad()
def eliminate_with(
    inverse: torch.Tensor,
    weight: torch.Tensor,
    width: int = 1,
    *,
    metric: torch.Tensor | None = None,
    at_once: int | None = None,
    keep: int = 0,
) -> Elimination:
    """As `eliminate`, from the inverse `P` (n, n) of the moment; all work is in its dtype. The metric takes
    d^2 n multiplications."""
    rows = weight.to(inverse).T
    if metric is None:
        rows = rows.clone(memory_format=torch.contiguous_format)
    else:
        rows = rows @ root(metric, inverse)
    return eliminate_from(inverse, rows, width, at_once=at_once, keep=keep)


@torch.no_grad()
def eliminate_fitted(
    inverse: torch.Tensor,
    right: torch.Tensor,
    width: int = 1,
    *,
    metric: torch.Tensor | None = None,
    at_once: int | None = None,
    keep: int = 0,
) -> Elimination:
    """As `eliminate`, of the weight that solves normal equations: `W = right P`.

    That takes d n^2 multiplications more, and the metric d^2 n.

    Args:
        inverse: `P` (n, n); all work is in its dtype.
        right: (d, n), as `least_squares.Equations.right`.
        width, metric, at_once, keep: as in `eliminate`.
    """
    rows = right.T if metric is None else right.T @ root(metric, inverse)
    return eliminate_from(inverse, inverse @ rows, width, at_once=at_once, keep=keep)


@torch.no_grad()
def eliminate_from(
    inverse: torch.Tensor, rows: torch.Tensor, width: int = 1, *, at_once: int | None = None, keep: int = 0
) -> Elimination:
    """As `eliminate`, from the inverse moment, and from the fitted weight with the metric multiplied in.

    If a share x of the columns leaves, it takes `n^3 (x^2 / 2 - x^3 / 3) + d n^2 (x - x^2 / 2)`
    multiplications, nearly all in matrix products, and room for `x n^2 + d n` numbers.

    Args:
        inverse: `P` (n, n).
        rows: `W' F` (n, d) with `M = F F'`, contiguous: its rows belong to the columns of `W`. Changed in
            place.
        width, at_once, keep: as in `eliminate`.
    """
    leaving = _Leaving(inverse, rows, width, keep)
    at_once = at_once or max(leaving.units // LOOKS, 1)
    while leaving.alive > keep:
        leaving.look(min(at_once, leaving.alive - keep))
    return leaving.found()


class _Leaving:
    """Units on their way out: those that remain are in front, in any order, and change places with the rest.

    `P` itself is never updated. With the units that have left in front it has a Cholesky factor `C`, one row
    for each of their columns, and what is left of it for the others is `P - C' C`: of that, scores need the
    blocks on the diagonal alone, and a look the columns of the units that leave at it.

    Attributes:
        units: number of all units.
        alive: number of those that remain.
        at: LongTensor (units,), the id of the unit at each position.
        factor: `C'` (n, columns that leave), by position; columns are filled from the left.
        rows: `W' F` (n, d), by position, refitted to what remains.
        inner: (units, width, width), the blocks of each unit on the diagonal of what is left of `P`.
        outer: (units, width, width), the same of `W' M W`.
    """

    def __init__(self, inverse: torch.Tensor, rows: torch.Tensor, width: int, keep: int) -> None:
        self.inverse, self.width = inverse, width
        self.units = self.alive = len(inverse) // width
        self.at = torch.arange(self.units, device=inverse.device)
        self.rows = rows
        self.factor = inverse.new_empty(len(inverse), (self.units - keep) * width)
        blocks = inverse.view(self.units, width, self.units, width).diagonal(dim1=0, dim2=2)
        self.inner = blocks.permute(2, 0, 1).clone()
        self.outer = torch.empty_like(self.inner)
        for part in self._parts():
            self.outer[part] = _products(self.rows, part, width)
        self.order: list[torch.Tensor] = []
        self.damage = [torch.zeros(1, dtype=torch.float64, device=inverse.device)]

    def found(self) -> Elimination:
        """What has left and what stays."""
        nothing = self.at[:0]
        return Elimination(
            torch.cat([nothing, *self.order]), torch.cat(self.damage), self.at[: self.alive].sort().values
        )

    def look(self, count: int) -> None:
        """Let the `count` units leave that cost least."""
        places, costs = self._cheapest(count)
        self.order.append(self.at[places])
        self._to_the_end(places)
        done = (self.units - self.alive) * self.width
        channels = _columns(self.at[: self.alive], self.width)
        self.alive -= count
        kept = self.alive * self.width
        leave = slice(kept, len(channels))
        # The rows of what is left of P that belong to the units that leave.
        left = self.inverse[channels[leave]].index_select(1, channels)
        before = self.factor[: len(channels), :done]
        left.addmm_(before[leave], before.T, alpha=-1)
        corner = factorised(left[:, leave])
        lost = torch.linalg.solve_triangular(corner, self.rows[leave], upper=False)
        self.damage.append(self.damage[-1][-1] + _shares(costs) * lost.double().square().sum())
        new = self.factor[:kept, done : done + len(lost)]
        new.copy_(torch.linalg.solve_triangular(corner, left[:, :kept], upper=False).T)
        for part in self._parts():
            own = _rows(part, self.width)
            self.rows[own].addmm_(new[own], lost, alpha=-1)
            self.inner[part] -= _products(new, part, self.width)
            self.outer[part] = _products(self.rows, part, self.width)

    def _cheapest(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Places of the units that cost least, the least first; ties go to the lower id. And their costs."""
        inner, outer = self.inner[: self.alive], self.outer[: self.alive]
        if self.width == 1:
            costs = (outer / inner).flatten()
        else:
            # Not linalg.solve: MKL's LU of a batch, in several threads, was seen to return no pivots.
            costs = torch.cholesky_solve(outer, factorised(inner)).diagonal(dim1=1, dim2=2).sum(1)
        by_id = self.at[: self.alive].argsort()
        places = by_id[costs[by_id].argsort(stable=True)[:count]]
        return places, costs[places].double()

    def _to_the_end(self, places: torch.Tensor) -> None:
        """Let units change places with the last of those that remain."""
        first = self.alive - len(places)
        staying = torch.ones(len(places), dtype=torch.bool, device=places.device)
        staying[places[places >= first] - first] = False
        holes, last = places[places < first], staying.nonzero().flatten() + first
        here, there = torch.cat([holes, last]), torch.cat([last, holes])
        for each in (self.at, self.inner, self.outer):
            each[here] = each[there]
        here, there = _columns(here, self.width), _columns(there, self.width)
        done = (self.units - self.alive) * self.width
        for each in (self.rows, self.factor[:, :done]):
            each[here] = each[there]

    def _parts(self) -> Iterator[slice]:
        """The units that remain, as many at a time as a CPU's cache takes."""
        some = max(_CACHE // (self.rows.shape[1] * self.width), 1)
        step = some if self.rows.device.type == "cpu" else max(self.alive, 1)
        return (slice(i, min(i + step, self.alive)) for i in range(0, self.alive, step))


def _products(matrix: torch.Tensor, units: slice, width: int) -> torch.Tensor:
    """`X_U X_U'` for the rows `U` of each unit: (units, width, width)."""
    rows = matrix[_rows(units, width)].unflatten(0, (-1, width))
    if width == 1:
        return rows.square().sum(2, keepdim=True)
    return rows @ rows.mT


def _shares(costs: torch.Tensor) -> torch.Tensor:
    """Cumulative shares of a common cost, in proportion to the cost of each unit alone: (units,)."""
    total = costs.clamp_min(0).cumsum(0)
    even = torch.arange(1, len(total) + 1, dtype=total.dtype, device=total.device) / len(total)
    return torch.where(total[-1] > 0, total / total[-1].clamp_min(1e-300), even)


def _columns(units: torch.Tensor, width: int) -> torch.Tensor:
    return (units[:, None] * width + torch.arange(width, device=units.device)).flatten()


def _rows(units: slice, width: int) -> slice:
    return slice(units.start * width, units.stop * width)
