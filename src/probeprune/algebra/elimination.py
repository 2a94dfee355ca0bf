"""Order by structured optimal brain surgery: which units a refitted linear map misses least.

The unit that goes is the one whose loss costs least after all others have been refitted to make up for it;
then the next, on what is left (Hassibi and Stork 1993; in blocks of columns Kurtic et al. 2023, ZipLM).
Tensors in, tensors out. Knows nothing of models, blocks or text.
"""

from dataclasses import dataclass

import torch

LOOKS = 64
"""How often scores are looked at while a block is taken apart: in between, units leave together."""


@dataclass(frozen=True, eq=False)
class Elimination:
    """The order in which units leave, and what it costs.

    Attributes:
        order: LongTensor (units,), ids, the first to leave first.
        damage: (units + 1,), float64, squared error a token after the first i of them have left and the
            rest has been refitted; never falls. In the metric's units where there is one.
    """

    order: torch.Tensor
    damage: torch.Tensor

    @property
    def scores(self) -> torch.Tensor:
        """(units,), float32: the place of each unit in the order; the last to leave is the most important."""
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
    """Take units out of `W z` one after the other until none is left.

    A unit `u` owns the columns `U`. Its loss costs `tr(W_U' M W_U (P_UU)^-1)`, where `P` is the inverse of
    the second moment over the columns still there, and `W` the weight refitted to them. Float64: 8 (3 n^2 +
    2 d n) bytes, and about n^3 (2 + 2 / 3) multiplications.

    Args:
        moment: second moment of `z` a token (n, n), damped so that it can be inverted.
        weight: `W` (d, n), already the best there is for the whole of `z`.
        width: columns a unit owns.
        metric: `M` (d, d), what an error of the output counts; None for the identity.
        at_once: units that leave between two looks at the scores; None for as many as make `LOOKS` looks.

    Raises:
        FloatingPointError: a moment that is not finite or cannot be inverted.
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
        # What is left is kept together: columns of units that have gone are not carried on.
        costs, count = _costs(inverse, w, width, m), min(at_once, len(alive))
        leaving = costs.argsort(stable=True)[:count]
        columns = _columns(leaving, width)
        rows = inverse[columns]
        inner = rows[:, columns]
        gone = w[:, columns]
        order.append(alive[leaving])
        damage.append(damage[-1][-1] + _shares(costs[leaving]) * _cost(inner, gone, m))
        stay = torch.ones(len(alive), dtype=torch.bool, device=alive.device).index_fill_(0, leaving, False)
        kept = _columns(stay.nonzero().flatten(), width)
        update = torch.linalg.solve(inner, rows[:, kept])
        w = w[:, kept] - gone @ update
        inverse = inverse[kept][:, kept] - rows[:, kept].T @ update
        alive = alive[stay]
    return Elimination(torch.cat(order), torch.cat(damage))


def _costs(
    inverse: torch.Tensor, weight: torch.Tensor, width: int, metric: torch.Tensor | None
) -> torch.Tensor:
    """What the loss of each unit alone would cost: (units,)."""
    measured = weight if metric is None else metric @ weight
    if width == 1:
        return (measured * weight).sum(0) / inverse.diagonal()
    units = len(inverse) // width
    own = inverse.view(units, width, units, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    product = torch.einsum("dui,duj->uij", measured.view(-1, units, width), weight.view(-1, units, width))
    return torch.linalg.solve(own, product).diagonal(dim1=1, dim2=2).sum(1)


def _cost(inner: torch.Tensor, gone: torch.Tensor, metric: torch.Tensor | None) -> torch.Tensor:
    """What the loss of several units together costs: ()."""
    measured = gone if metric is None else metric @ gone
    return torch.linalg.solve(inner, measured.T @ gone).trace().clamp_min(0)


def _shares(costs: torch.Tensor) -> torch.Tensor:
    """Units that leave together share the cost in proportion to what each would cost alone, added up."""
    total = costs.clamp_min(0).cumsum(0)
    return torch.where(
        total[-1] > 0, total / total[-1].clamp_min(1e-300), _range(total).double().add(1) / len(total)
    )


def _columns(units: torch.Tensor, width: int) -> torch.Tensor:
    return (units[:, None] * width + torch.arange(width, device=units.device)).flatten()


def _range(like: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(like), device=like.device)
