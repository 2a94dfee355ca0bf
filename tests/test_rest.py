"""A core and a rest: against a refit of everything, made anew for every choice."""

import pytest
import torch

from probeprune.rest import Sample, split


def problem(seed=0, n=16, d=5, tokens=400):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(tokens, n, generator=g, dtype=torch.float64)
    z = z @ torch.randn(n, n, generator=g, dtype=torch.float64) + 2
    t = z @ torch.randn(n, d, generator=g, dtype=torch.float64)
    return z, t + torch.randn(tokens, d, generator=g, dtype=torch.float64)


def error(z, t, columns, metric):
    e = t - z[:, columns] @ torch.linalg.lstsq(z[:, columns], t).solution
    return float(torch.einsum("ti,ij,tj->", e, metric, e) / len(z))


@pytest.mark.parametrize("with_bias", [False, True])
def test_every_choice_gets_the_weight_that_a_refit_of_all_gives(with_bias):
    z, t = problem()
    mean, target_mean = (z.mean(0), t.mean(0)) if with_bias else (None, None)
    x, y = (z - mean, t - target_mean) if with_bias else (z, t)
    kept = torch.tensor([0, 2, 3, 5, 7, 8, 11, 12])
    rest = split(
        x.T @ x / len(x),
        y.T @ x / len(x),
        kept,
        0.5,
        z.square().mean(0),
        mean=mean,
        target_mean=target_mean,
    )
    assert len(rest.core) == 4 and set(rest.core.tolist()) < set(kept.tolist())
    assert len(rest.candidates) == 8 and not set(rest.core.tolist()) & set(rest.candidates.tolist())
    for seed in range(4):
        g = torch.Generator().manual_seed(seed)
        some = rest.candidates[torch.randperm(8, generator=g)[:4]]
        units = torch.cat([rest.core, some])[torch.randperm(8, generator=g)]
        weight, bias = rest.consumer(units)
        want = torch.linalg.lstsq(x[:, units], y).solution.T
        torch.testing.assert_close(weight.double(), want, rtol=1e-3, atol=1e-3)
        assert (bias is not None) == with_bias
        if with_bias:
            torch.testing.assert_close(bias.double(), target_mean - want @ mean[units], rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_sample_moves_the_weight_to_the_best_for_it_and_the_calibration_text(with_bias, padded):
    z, t = problem()
    mean, target_mean = (z.mean(0), t.mean(0)) if with_bias else (None, None)
    x, y = (z - mean, t - target_mean) if with_bias else (z, t)
    kept = torch.tensor([0, 2, 3, 5, 7, 8, 11, 12])
    moment, target = x.T @ x / len(x), y.T @ x / len(x)
    rest = split(moment, target, kept, 0.5, z.square().mean(0), mean=mean, target_mean=target_mean)
    own_z, own_t = problem(seed=7, tokens=20)
    own_t = own_t + 3  # text of another kind
    real, counted = None, slice(None)
    if padded:
        real = torch.arange(20) % 3 > 0
        counted = real
        own_z[~real], own_t[~real] = float("nan"), 1e6
    prior = 30.0
    units = torch.cat([rest.candidates[[1, 6, 2, 5]], rest.core])
    weight, bias = rest.consumer(units, Sample(own_z.float(), own_t.float(), real, prior))
    # The same by a slow way: the tokens as rows under the root of the calibration text's moment.
    root = torch.linalg.cholesky(moment[units][:, units])
    fitted = torch.cholesky_solve(target[:, units].T, root).T
    own_x, own_y = (own_z - mean, own_t - target_mean) if with_bias else (own_z, own_t)
    rows = torch.cat([own_x[counted][:, units], prior**0.5 * root.T])
    wanted = torch.cat([own_y[counted], prior**0.5 * root.T @ fitted.T])
    want = torch.linalg.lstsq(rows, wanted).solution.T
    assert (want - fitted).norm() > 0.05 * fitted.norm()
    torch.testing.assert_close(weight.double(), want, rtol=1e-3, atol=1e-3)
    if with_bias:
        torch.testing.assert_close(bias.double(), target_mean - want @ mean[units], rtol=1e-3, atol=1e-2)


def test_a_unit_is_worth_what_its_loss_costs_or_its_return_saves():
    z, t = problem(1)
    metric = torch.diag(torch.arange(1.0, 6.0, dtype=torch.float64))
    kept = torch.arange(0, 16, 2)
    rest = split(z.T @ z / len(z), t.T @ z / len(z), kept, 1 / 8, z.square().mean(0), metric=metric)
    before = error(z, t, kept.tolist(), metric)
    for unit, value in zip(rest.candidates.tolist(), rest.value.tolist(), strict=True):
        if unit in kept:
            want = error(z, t, [u for u in kept.tolist() if u != unit], metric) - before
        else:
            want = before - error(z, t, [*kept.tolist(), unit], metric)
        assert value == pytest.approx(want, rel=1e-4)


def test_scores_keep_the_core_leave_what_is_no_candidate_and_follow_the_batch():
    z, t = problem(2)
    kept = torch.arange(8)
    calibration = z.square().mean(0)
    rest = split(z.T @ z / len(z), t.T @ z / len(z), kept, 0.5, calibration)
    same = rest.scores(calibration.float() * 10, tokens=10)
    order = same.argsort(descending=True)
    assert set(order[:4].tolist()) == set(rest.core.tolist())
    torch.testing.assert_close(same[rest.candidates], rest.value, rtol=1e-5, atol=0)
    energy = calibration.float().clone()
    energy[rest.candidates[0]] *= 16
    torch.testing.assert_close(
        rest.scores(energy, 1)[rest.candidates[0]], rest.value[0] * 2, rtol=1e-5, atol=0
    )
    never = [u for u in range(16) if u not in rest.core and u not in rest.candidates]
    assert never == [] or (same[never] < same[rest.candidates].min()).all()
    assert torch.isfinite(same).all()
