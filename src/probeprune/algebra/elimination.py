"""Structured optimal brain surgery: the order in which units leave a linear map at the least cost.

At each step the unit leaves whose loss costs least after all remaining ones have been refitted to compensate
for it (Hassibi and Stork 1993; for blocks of columns Kurtic et al. 2023, ZipLM). Tensors in, tensors out.
Knows nothing of models, blocks or text.
"""

from dataclasses import dataclass

import torch

LOOKS = 64
"""Number of times that scores are computed for a block by default; units leave together in between."""


@dataclass(frozen=True, eq=False)
class Elimination:
    """The order in which units leave, and its cost.

    Attributes:
        order: LongTensor (units,), unit ids; the first to leave comes first.
        damage: (units + 1,), float64, never decreasing. Entry i is the squared error per token after the
            first i units have left and the rest has been refitted; weighted by the metric if there is one.
    """

    order: torch.Tensor
    damage: torch.Tensor

    @property
    def scores(self) -> torch.Tensor:
        """(units,), float32: the rank of each unit in the order; the last to leave is the most important."""
        return torch.empty_like(self.order).scatter_(0, self.order, _range(self.order)).float()


@torch.no_grad()
def eliminate(
    moment: torch.Tensor,
    weight: torch.Tensor,
    width: int = 1,
    *,
    metric: torch.Tensor | None = None,
    at_once: int | None = None,
) -> Elimination:
    """Remove units from `W z` until none is left.

    Losing the unit with columns `U` costs `tr(W_U' M W_U (P_UU)^-1)`, where `P` is the inverse of the second
    moment over the remaining columns and `W` the weight refitted to them. Takes 8 (3 n^2 + 2 d n) bytes
    (float64) and about n^3 (2 + 2 / 3) multiplications.

    Args:
        moment: second moment of `z` per token (n, n), damped so that it can be inverted.
        weight: `W` (d, n), already fitted to the whole of `z`.
        width: columns per unit.
        metric: `M` (d, d), the weighting of output errors; None for the identity.
        at_once: units that leave after each computation of the scores; None for `LOOKS` computations in all.

    Raises:
        FloatingPointError: a moment that is not finite or cannot be factorised.
    """
    factor, failed = torch.linalg.cholesky_ex(moment.double())
    if failed or not torch.isfinite(factor).all():
        raise FloatingPointError("the second moment of its inputs cannot be factorised")
    inverse = torch.cholesky_inverse(factor)
    w = weight.double()
    m = None if metric is None else metric.double()
    alive = torch.arange(len(moment) // width, device=moment.device)
    at_once = at_once or max(len(alive) // LOOKS, 1)
    order: list[torch.Tensor] = []
    damage = [torch.zeros(1, dtype=w.dtype, device=w.device)]
    while len(alive):
        # Everything is narrowed to the remaining columns, so that each step is cheaper than the last.
        costs, count = _costs(inverse, w, width, m), min(at_once, len(alive))
        leaving = costs.argsort(stable=True)[:count]
        columns = _columns(leaving, width)
        rows = inverse[columns]
        inner = rows[:, columns]
        removed = w[:, columns]
        order.append(alive[leaving])
        damage.append(damage[-1][-1] + _shares(costs[leaving]) * _cost_together(inner, removed, m))
        stay = torch.ones(len(alive), dtype=torch.bool, device=alive.device).index_fill_(0, leaving, False)
        kept = _columns(stay.nonzero().flatten(), width)
        update = torch.linalg.solve(inner, rows[:, kept])
        w = w[:, kept] - removed @ update
        inverse = inverse[kept][:, kept] - rows[:, kept].T @ update
        alive = alive[stay]
    return Elimination(torch.cat(order), torch.cat(damage))


def _costs(
    inverse: torch.Tensor, weight: torch.Tensor, width: int, metric: torch.Tensor | None
) -> torch.Tensor:
    """The cost of losing each unit alone: (units,)."""
    measured = weight if metric is None else metric @ weight
    if width == 1:
        return (measured * weight).sum(0) / inverse.diagonal()
    units = len(inverse) // width
    inner = inverse.view(units, width, units, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    product = torch.einsum("dui,duj->uij", measured.view(-1, units, width), weight.view(-1, units, width))
    return torch.linalg.solve(inner, product).diagonal(dim1=1, dim2=2).sum(1)


def _cost_together(inner: torch.Tensor, removed: torch.Tensor, metric: torch.Tensor | None) -> torch.Tensor:
    """The cost of losing several units together: ()."""
    measured = removed if metric is None else metric @ removed
    return torch.linalg.solve(inner, measured.T @ removed).trace().clamp_min(0)


def _shares(costs: torch.Tensor) -> torch.Tensor:
    """Cumulative shares of a common cost, in proportion to the cost of each unit alone: (units,)."""
    total = costs.clamp_min(0).cumsum(0)
    return torch.where(
        total[-1] > 0, total / total[-1].clamp_min(1e-300), _range(total).double().add(1) / len(total)
    )


def _columns(units: torch.Tensor, width: int) -> torch.Tensor:
    return (units[:, None] * width + torch.arange(width, device=units.device)).flatten()


def _range(like: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(like), device=like.device)
