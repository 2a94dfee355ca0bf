"""Divergences of next-token distributions: the formulas written out, in float64."""

import itertools

import pytest
import torch

from probeprune.algebra.divergence import divergence, target

DIRECTIONS = ("forward", "reverse", "mixed")


def some_logits(seed, tokens=6, vocabulary=11):
    return torch.randn(tokens, vocabulary, generator=torch.Generator().manual_seed(seed)).double() * 4


def written_out(predicted, wanted, direction, temperature, top_k):
    """The sums over tokens, one at a time."""
    found = []
    for z, y in zip(predicted / temperature, wanted / temperature, strict=True):
        q, p = z.exp() / z.exp().sum(), y.exp() / y.exp().sum()
        if top_k is not None:
            order = sorted(range(len(p)), key=lambda i: -p[i])
            q, p = ([*d[order[:top_k]], d[order[top_k:]].sum()] for d in (q, p))
        forward = sum(a * (a / b).log() for a, b in zip(p, q, strict=True))
        reverse = sum(b * (b / a).log() for a, b in zip(p, q, strict=True))
        found.append({"forward": forward, "reverse": reverse, "mixed": (forward + reverse) / 2}[direction])
    return temperature**2 * torch.stack(found)


@pytest.mark.parametrize("top_k", [None, 1, 4, 10])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_values_and_gradients_are_the_formulas(direction, temperature, top_k):
    wanted = some_logits(1)
    one, two = (some_logits(2).requires_grad_(True) for _ in range(2))
    got = divergence(one, target(wanted, temperature, top_k), direction, temperature)
    want = written_out(two, wanted, direction, temperature, top_k)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
    weights = torch.arange(1.0, 7).double()
    (got * weights).sum().backward()
    (want * weights).sum().backward()
    torch.testing.assert_close(one.grad, two.grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_it_is_zero_for_equal_distributions_and_above_for_others(direction):
    logits = some_logits(1)
    for top_k in (None, 3):
        goal = target(logits, top_k=top_k)
        assert divergence(logits + 5, goal, direction).abs().max() < 1e-12
        assert (divergence(some_logits(2), goal, direction) > 0).all()


def test_as_many_tokens_as_there_are_is_the_whole():
    assert target(some_logits(1), top_k=11).ids is None
    assert target(some_logits(1), top_k=3).logs.shape == (6, 4)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_fewer_tokens_told_apart_never_diverge_more(direction):
    values = [divergence(some_logits(2), target(some_logits(1), top_k=k), direction) for k in (1, 3, 7, None)]
    for few, more in itertools.pairwise(values):
        assert (few <= more + 1e-12).all(), "merging outcomes loses information in either direction"


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_sure_predictions_stay_finite_in_float32(direction, top_k):
    wanted = torch.zeros(1, 50)
    wanted[0, 3] = 200.0
    logits = torch.zeros(1, 50)
    logits[0, 4] = 200.0
    logits.requires_grad_(True)
    value = divergence(logits, target(wanted, top_k=top_k), direction)
    value.sum().backward()
    assert torch.isfinite(value).all() and torch.isfinite(logits.grad).all()
