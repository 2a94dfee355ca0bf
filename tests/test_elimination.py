"""Elimination against slow obvious versions: every unit tried, every refit made anew."""

import pytest
import torch

from probeprune.algebra import elimination
from probeprune.algebra.elimination import eliminate, eliminate_fitted
from probeprune.algebra.factors import root


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


def obvious(moment, weight, width, metric, at_once):
    """Elimination as it is written: everything narrowed to what remains, the metric multiplied each time."""
    inverse, w, alive = torch.linalg.inv(moment.double()), weight.double(), list(range(len(moment) // width))
    order, damage = [], [0.0]

    def cost(units):
        own = [u * width + i for u in units for i in range(width)]
        inner, lost = inverse[own][:, own], w[:, own]
        return float(torch.linalg.solve(inner, lost.T @ metric.double() @ lost).trace())

    while alive:
        places = sorted(range(len(alive)), key=lambda u: cost([u]))[:at_once]
        each = torch.tensor([max(cost([u]), 0.0) for u in places], dtype=torch.float64)
        together = cost(places)
        shares = each.cumsum(0) / each.sum() if each.sum() > 0 else torch.arange(1, len(each) + 1) / len(each)
        damage += [damage[-1] + together * float(s) for s in shares]
        order += [alive[u] for u in places]
        own = [u * width + i for u in places for i in range(width)]
        rest = [c for c in range(len(inverse)) if c not in own]
        update = torch.linalg.solve(inverse[own][:, own], inverse[own][:, rest])
        w = w[:, rest] - w[:, own] @ update
        inverse = inverse[rest][:, rest] - inverse[rest][:, own] @ update
        alive = [u for i, u in enumerate(alive) if i not in places]
    return order, torch.tensor(damage, dtype=torch.float64)


@pytest.mark.parametrize("cache", [1, 100, 10**6])
@pytest.mark.parametrize("at_once", [1, 3, 7])
@pytest.mark.parametrize(("units", "width", "d"), [(40, 1, 9), (40, 1, 60), (12, 4, 9), (1, 1, 5), (1, 6, 5)])
def test_updates_in_place_and_in_parts_are_the_obvious_ones(units, width, d, at_once, cache, monkeypatch):
    monkeypatch.setattr(elimination, "_CACHE", cache)
    z, weight = problem(units=units, width=width, d=d, tokens=90)
    moment = z.T @ z / len(z)
    moment.diagonal().mul_(1.3)
    half = torch.randn(d, d, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    metric = half @ half.T
    order, damage = obvious(moment, weight, width, metric, at_once)
    given = [t.clone() for t in (moment, weight, metric)]
    found = eliminate(moment, weight, width, metric=metric, at_once=at_once)
    assert found.order.tolist() == order and not len(found.stay)
    torch.testing.assert_close(found.damage, damage, rtol=1e-8, atol=1e-10)
    for keep in {0, 1, units // 2, units}:
        some = eliminate(moment, weight, width, metric=metric, at_once=at_once, keep=keep)
        gone = units - keep
        full = gone - gone % at_once  # by whole looks; the last one is shorter
        assert some.order.tolist()[:full] == order[:full]
        assert sorted(some.order.tolist()) == sorted(order[:gone])
        assert some.stay.tolist() == sorted(order[gone:])
        assert some.scores.argsort(descending=True, stable=True)[:keep].sort().values.equal(some.stay)
        torch.testing.assert_close(some.damage[: full + 1], damage[: full + 1], rtol=1e-8, atol=1e-10)
    assert all(t.equal(before) for t, before in zip((moment, weight, metric), given, strict=True))


@pytest.mark.parametrize("rank", [0, 3])
def test_directions_without_weight_cost_nothing(rank):
    """A singular metric has no Cholesky factor."""
    z, weight = problem(units=20, d=8)
    half = torch.randn(8, rank, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    metric = half @ half.T
    torch.testing.assert_close(root(metric, weight) @ root(metric, weight).T, metric, rtol=1e-8, atol=1e-8)
    found = eliminate(z.T @ z / len(z), weight, metric=metric, at_once=1)
    if not rank:
        assert found.order.tolist() == list(range(20)) and not found.damage.any(), "ties go to the lower id"
        return
    order, damage = obvious(z.T @ z / len(z), weight, 1, metric, 1)
    assert found.order.tolist() == order
    torch.testing.assert_close(found.damage, damage, rtol=1e-6, atol=1e-9)
    with pytest.raises(FloatingPointError, match="weighting"):
        eliminate(z.T @ z / len(z), weight, metric=metric / 0)


def test_fewer_tokens_than_channels_and_dead_channels():
    z, weight = problem(units=60, tokens=20)
    z[:, 7] = 0
    moment = z.T @ z / len(z)
    diagonal = moment.diagonal()
    diagonal += 0.3 * diagonal.clamp_min(1e-3 * float(diagonal.median()))
    right = weight @ moment
    order, damage = obvious(moment, weight, 1, torch.eye(4), 4)
    found = eliminate_fitted(torch.linalg.inv(moment), right, at_once=4)
    assert found.order.tolist() == order
    torch.testing.assert_close(found.damage, damage, rtol=1e-8, atol=1e-10)
    narrow = eliminate(moment.float(), weight.float(), at_once=4, keep=36)
    assert set(narrow.stay.tolist()) == set(order[24:]), "in float32, with the damping of the recipe"
    assert float(narrow.damage[-1]) == pytest.approx(float(damage[24]), rel=1e-3)


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
