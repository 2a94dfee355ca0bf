"""Fit one consumer to the moments of its inputs and targets, and choose which units feed it.

Knows no model: tensors in, tensors out, with the damping that a refit asks for.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from probeprune.algebra.elimination import Elimination, eliminate_fitted
from probeprune.algebra.least_squares import Equations, Gram, squared_error
from probeprune.algebra.precision import choosing_dtype


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Say of what the refit that raised a `FloatingPointError` is, and what to do."""
    try:
        yield
    except FloatingPointError as problem:
        raise FloatingPointError(
            f"the refit of {name} failed: {problem}; give more calibration windows or more damping, or "
            "load the model in float32."
        ) from None


@dataclass(frozen=True, eq=False)
class Fitted:
    """The solution of some equations, and its mean squared error."""

    equations: Equations
    damping: float
    weight: torch.Tensor
    bias: torch.Tensor | None
    error: float

    @classmethod
    def to(cls, moments: Gram, weight: torch.Tensor, centred: bool, damping: float) -> "Fitted":
        """The solution for these moments, and its error on their tokens."""
        equations = Equations(moments, weight, centred, damping)
        return cls(equations, damping, *equations.solution())


def best_fit(fit: Gram, held: Gram, weight: torch.Tensor, centred: bool, dampings: Sequence[float]) -> Fitted:
    """Of all candidates for the damping, the fit with the least error on the tokens held out, if any.

    Args:
        fit: moments of the tokens to fit.
        held: moments of those held out.
        weight: the weight (d, k) to start from.
        centred: whether a bias is fitted too.
        dampings: the candidates.

    Raises `FloatingPointError` as `Equations` does.
    """
    best: Fitted | None = None
    for damping in dampings:
        one = Fitted.to(fit, weight, centred, damping)
        if held.count:
            one = replace(one, error=squared_error(held, one.weight, one.bias))
        if best is None or one.error < best.error:
            best = one
    assert best is not None
    return best


def eliminated(
    fit: Gram,
    held: Gram,
    weight: torch.Tensor,
    centred: bool,
    dampings: Sequence[float],
    width: int,
    metric: torch.Tensor | None,
    keep: int,
) -> Elimination:
    """The order in which units leave a consumer that is refitted to those that remain.

    Args:
        fit, held, weight, centred, dampings: as in `best_fit`, of all units.
        width: channels of a unit.
        metric: weighting of output errors (d, d); None for equal weights.
        keep: number of units at which the order ends.

    Raises `FloatingPointError` as `best_fit` and `eliminate_fitted` do.
    """
    if held.count:  # several candidates
        equations = best_fit(fit, held, weight, centred, dampings).equations
    else:
        equations = Equations(fit, weight, centred, dampings[0], choosing_dtype(dampings[0]))
    right, inverse = equations.right, equations.inverse()
    del equations  # and its factor
    return eliminate_fitted(inverse, right, width, metric=metric, keep=keep)
