"""The refit to a batch against a least-squares problem written out, and what it does at the ends."""

import pytest
import torch

from probeprune.algebra.batch_refit import Sample, refit_to_batch


def problem(seed=0, k=8, d=5, tokens=400):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(tokens, k, generator=g, dtype=torch.float64)
    z = z @ torch.randn(k, k, generator=g, dtype=torch.float64) + 2
    t = z @ torch.randn(k, d, generator=g, dtype=torch.float64)
    return z, t + torch.randn(tokens, d, generator=g, dtype=torch.float64)


def fitted(z, t, with_bias):
    """Weight, bias, inverse moment and mean of the best fit to the calibration tokens, float64."""
    mean, target_mean = (z.mean(0), t.mean(0)) if with_bias else (0 * z[0], 0 * t[0])
    moment = (z - mean).T @ (z - mean) / len(z)
    weight = torch.linalg.lstsq(z - mean, t - target_mean).solution.T
    bias = target_mean - weight @ mean if with_bias else None
    return weight, bias, moment.inverse(), mean if with_bias else None


def moved(sample, weight, bias, inverse, mean):
    """In float32, as on models."""
    return refit_to_batch(sample, *(None if x is None else x.float() for x in (weight, bias, inverse, mean)))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_sample_moves_the_weight_to_the_best_for_it_and_the_calibration_text(with_bias, padded):
    z, t = problem()
    weight, bias, inverse, mean = fitted(z, t, with_bias)
    own_z, own_t = problem(seed=7, tokens=20)
    own_t = own_t + 3  # text of another kind
    real, counted = None, slice(None)
    if padded:
        real = counted = torch.arange(20) % 3 > 0
        own_z[~real], own_t[~real] = float("nan"), 1e6
    prior = 30.0
    got, got_bias = moved(Sample(own_z.float(), own_t.float(), real, prior), weight, bias, inverse, mean)
    # The slow way: all calibration tokens as rows, which count as `prior` together, and the sample's.
    target_mean = t.mean(0) if with_bias else 0
    mean = mean if with_bias else 0
    each = (prior / len(z)) ** 0.5
    rows = torch.cat([own_z[counted] - mean, each * (z - mean)])
    want = torch.linalg.lstsq(rows, torch.cat([own_t[counted] - target_mean, each * (t - target_mean)]))
    want = want.solution.T
    assert (want - weight).norm() > 0.05 * weight.norm()
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-3)
    assert (got_bias is None) == (not with_bias)
    if with_bias:
        torch.testing.assert_close(got_bias.double(), target_mean - want @ mean, rtol=1e-3, atol=1e-2)


def test_nothing_to_learn_moves_nothing_and_one_weak_prior_all():
    z, t = problem()
    weight, bias, inverse, mean = fitted(z, t, True)
    for sample in (
        Sample(z[:6].float(), (z[:6] @ weight.T + bias).float(), None, 30.0),
        Sample(z[:6].float(), t[:6].float(), torch.zeros(6, dtype=torch.bool), 30.0),
    ):
        got, got_bias = moved(sample, weight, bias, inverse, mean)
        torch.testing.assert_close(got.double(), weight, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got_bias.double(), bias, rtol=1e-4, atol=1e-3)
    got, got_bias = moved(Sample(z[:6].float(), t[:6].float(), None, 1e-3), weight, bias, inverse, mean)
    torch.testing.assert_close(z[:6] @ got.double().T + got_bias, t[:6], rtol=1e-2, atol=1e-2)
