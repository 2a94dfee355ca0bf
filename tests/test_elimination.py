"""Elimination against slow obvious versions: every unit tried, every refit made anew."""

import pytest
import torch

from probeprune.algebra.elimination import eliminate


def problem(seed=0, units=6, width=1, d=4, tokens=200):
    g = torch.Generator().manual_seed(seed)
    n = units * width
    z = torch.randn(tokens, n, generator=g, dtype=torch.float64) @ torch.randn(
        n, n, generator=g, dtype=torch.float64
    )
    return z, torch.randn(d, n, generator=g, dtype=torch.float64)


def refit_error(z, weight, kept, metric):
    """Mean of `e' M e` after the best refit of the kept columns to `W z`, by LAPACK."""
    target = z @ weight.T
    error = target
    if kept:
        error = target - z[:, kept] @ torch.linalg.lstsq(z[:, kept], target).solution
    return float(torch.einsum("ti,ij,tj->t", error, metric, error).mean())


@pytest.mark.parametrize("with_metric", [False, True])
@pytest.mark.parametrize("width", [1, 3])
def test_the_unit_that_goes_is_the_one_a_refit_misses_least(width, with_metric):
    z, weight = problem(width=width)
    metric = torch.eye(4, dtype=torch.float64)
    if with_metric:
        half = torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        metric = half @ half.T
    found = eliminate(z.T @ z / len(z), weight, width, metric=metric if with_metric else None)
    left, order, damage = list(range(6)), [], [0.0]
    while left:

        def error_without(unit):
            kept = [u * width + i for u in left if u != unit for i in range(width)]
            return refit_error(z, weight, kept, metric)

        errors = {u: error_without(u) for u in left}
        order.append(min(errors, key=errors.get))
        left.remove(order[-1])
        damage.append(errors[order[-1]])
    assert found.order.tolist() == order
    torch.testing.assert_close(found.damage, torch.tensor(damage, dtype=torch.float64), rtol=1e-6, atol=1e-9)
    assert found.scores.argsort().tolist() == order


def test_units_that_leave_together_cost_together_what_the_refit_says():
    z, weight = problem(units=12)
    found = eliminate(z.T @ z / len(z), weight, at_once=4)
    for gone in (4, 8, 12):
        kept = [u for u in range(12) if u not in found.order[:gone].tolist()]
        want = refit_error(z, weight, kept, torch.eye(4, dtype=torch.float64))
        assert float(found.damage[gone]) == pytest.approx(want, rel=1e-6)
    assert (found.damage.diff() >= 0).all()


def test_a_unit_that_others_make_up_for_goes_first_whatever_its_size():
    z, weight = problem(units=5)
    z[:, 3] = 2 * z[:, 0] - z[:, 4]
    weight[:, 3] *= 100
    moment = z.T @ z / len(z) + 1e-9 * torch.eye(5)
    found = eliminate(moment, weight)
    assert int(found.order[0]) in (0, 3, 4)
    assert float(found.damage[1]) < 1e-6 * float(found.damage[2])


def test_moments_that_cannot_be_inverted_are_an_error():
    with pytest.raises(FloatingPointError, match="factorised"):
        eliminate(torch.zeros(3, 3), torch.ones(2, 3))
    with pytest.raises(FloatingPointError, match="factorised"):
        eliminate(torch.full((3, 3), float("nan")), torch.ones(2, 3))
