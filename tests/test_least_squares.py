"""The arithmetic of a refit: against LAPACK's least squares."""

import pytest
import torch
from refitting import explicit

from probeprune.algebra import least_squares, precision
from probeprune.algebra.least_squares import Equations, Gram, damped_moment, squared_error


def solve(gram, weight, bias, damping):
    """The weight and bias that solve the equations; without `bias` none is fitted."""
    return Equations(gram, weight, bias is not None, damping).solution()[:2]


def data(seed=0, tokens=300, k=12, d=5):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(tokens, k, generator=g) @ torch.randn(k, k, generator=g) + 3
    weight, bias = torch.randn(d, k, generator=g), torch.randn(d, generator=g)
    t = torch.randn(tokens, d, generator=g) + z @ torch.randn(k, d, generator=g) - 2
    return z, t, weight, bias


def streamed(z, t, part=70):
    gram = Gram(z.shape[1], t.shape[1])
    for start in range(0, len(z), part):
        gram.update(z[start : start + part], t[start : start + part])
    return gram


@pytest.mark.parametrize("damping", [1e-6, 1e-2, 1.0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_refit_is_lapacks_least_squares(with_bias, damping):
    z, t, weight, bias = data()
    bias = bias if with_bias else None
    got, shift = solve(streamed(z, t), weight, bias, damping)
    want, want_shift = explicit(weight, bias, z, t, damping)
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-4)
    assert (shift is None) == (not with_bias)
    if shift is not None:
        torch.testing.assert_close(shift.double(), want_shift, rtol=1e-3, atol=2e-3)
    # And the error it reports is that of the tokens.
    missed = (t - z @ got.T - (0 if shift is None else shift)).double().square().sum(1).mean()
    assert squared_error(streamed(z, t), got, shift) == pytest.approx(float(missed), rel=1e-3)
    assert missed <= squared_error(streamed(z, t), weight, bias)


@pytest.mark.parametrize("centred", [False, True])
def test_one_factor_serves_the_solution_its_error_and_the_inverse(centred):
    z, t, weight, _ = data()
    gram = streamed(z, t)
    equations = Equations(gram, weight, centred, 0.3)
    fitted, shift, error = equations.solution()
    assert error == pytest.approx(squared_error(gram, fitted, shift), rel=1e-3)
    missed = (t - z @ fitted.T - (0 if shift is None else shift)).double().square().sum(1).mean()
    assert error == pytest.approx(float(missed), rel=1e-3)
    damped = damped_moment(gram, centred, 0.3)
    assert damped.dtype == precision.choosing_dtype(0.3) == torch.float32
    assert precision.choosing_dtype(0.01) == torch.float64
    damped = damped.double()
    torch.testing.assert_close(equations.factor @ equations.factor.T, damped, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.linalg.inv(damped), equations.inverse(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close((equations.right @ equations.inverse()).float(), fitted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("k", [1, 5, 12])
def test_products_on_one_side_of_the_diagonal_are_all_there_is_to_make(k, monkeypatch):
    monkeypatch.setattr(least_squares, "_LEAST", 2)
    monkeypatch.setattr(least_squares, "_BLOCKS", 3)
    z, t, _, _ = data(k=k)
    gram = streamed(z, t)
    centred = z.double() - z.double().mean(0)
    torch.testing.assert_close(gram.zz.double(), centred.T @ centred, rtol=1e-4, atol=1e-2)
    gram.update(z[:50], t[:50])
    merged = streamed(z, t)
    merged.merge(streamed(z[:50], t[:50]))
    torch.testing.assert_close(merged.zz, gram.zz, rtol=1e-4, atol=1e-2)


def test_float32_where_float64_is_slow_and_damping_allows_it(monkeypatch):
    """On the GPUs of games and workstations."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(torch.version, "hip", None)
    assert precision.solving_dtype(gpu, 0.3) == torch.float32
    assert precision.solving_dtype(gpu, 1e-3) == precision.solving_dtype(cpu, 0.3) == torch.float64
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert precision.solving_dtype(gpu, 0.3) == torch.float64
    z, t, weight, bias = data(tokens=3000, k=40)
    wide = solve(streamed(z, t), weight, bias, 0.3)
    monkeypatch.setattr(least_squares, "solving_dtype", lambda device, damping: torch.float32)
    narrow = solve(streamed(z, t), weight, bias, 0.3)
    for got, want in zip(narrow, wide, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_moments_merge_exactly_and_a_perfect_weight_stays():
    z, t, weight, bias = data()
    merged = streamed(z[:100], t[:100])
    merged.merge(streamed(z[100:], t[100:]))
    whole = Gram(z.shape[1], t.shape[1])
    whole.update(z, t)
    for name in ("z_mean", "t_mean", "zz", "tz", "tt"):
        torch.testing.assert_close(getattr(merged, name), getattr(whole, name), rtol=1e-4, atol=1e-2)
    perfect = streamed(z, z @ weight.T + bias)
    got, shift = solve(perfect, weight, bias, 1e-2)
    torch.testing.assert_close(got, weight, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(shift, bias, rtol=1e-3, atol=1e-3)


def test_inputs_that_are_all_dead_leave_the_weight_as_it_is():
    got, shift = solve(streamed(torch.zeros(8, 3), torch.zeros(8, 2)), torch.ones(2, 3), None, 0.1)
    assert got.equal(torch.ones(2, 3)) and shift is None


def test_moments_that_cannot_be_factorised_are_an_error():
    z = torch.ones(8, 3)
    z[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="factorised"):
        solve(streamed(z, torch.zeros(8, 2)), torch.ones(2, 3), None, 0.1)
