"""Perplexity: token-weighted, in order, short last batch included, and equal to transformers' own loss."""

import math

import pytest
import torch
from tiny import FAMILIES

from probeprune.errors import UsageError
from probeprune.evaluation.perplexity import perplexity, window_losses
from probeprune.model.passes import find_decoder

WINDOWS = torch.arange(7 * 20).remainder(97).view(7, 20) + 3


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_equal_the_models_own(family):
    # The head is applied in pieces by us; soft caps and projections must not be lost on the way.
    model = FAMILIES[family]()
    with torch.no_grad():
        hidden = find_decoder(model)(input_ids=WINDOWS, use_cache=False)[0]
        ours = window_losses(model, hidden, WINDOWS)
        theirs = [float(model(input_ids=w[None], labels=w[None]).loss) for w in WINDOWS]
    assert ours.tolist() == pytest.approx(theirs, rel=1e-5)


def test_value_and_error_are_those_of_the_windows_whatever_the_batch():
    model = FAMILIES["llama-gqa"]()
    one, three = (perplexity(model, WINDOWS, batch_size=b) for b in (1, 3))
    assert one.value == pytest.approx(three.value, rel=1e-5)
    losses = torch.tensor(three.losses, dtype=torch.float64)
    assert len(losses) == 7
    assert three.value == pytest.approx(math.exp(losses.mean()), rel=1e-12)
    assert three.standard_error == pytest.approx(three.value * float(losses.std()) / math.sqrt(7), rel=1e-9)


def test_published_averaging_drops_the_incomplete_batch():
    model = FAMILIES["llama-gqa"]()
    published = perplexity(model, WINDOWS, batch_size=3, averaging="published")
    assert published.losses == pytest.approx(perplexity(model, WINDOWS[:6], batch_size=3).losses)


def test_bad_windows_are_refused():
    model = FAMILIES["opt"]()
    with pytest.raises(UsageError, match="at least 2 tokens"):
        perplexity(model, WINDOWS[:, :1])
    with pytest.raises(UsageError, match="longer than the model's"):
        perplexity(model, torch.zeros(1, 5000, dtype=torch.long))
    with pytest.raises(UsageError, match="no full batch"):
        perplexity(model, WINDOWS, batch_size=8, averaging="published")


def test_a_broken_model_is_an_error_not_a_number():
    model = FAMILIES["llama-gqa"]()
    with torch.no_grad():
        find_decoder(model).norm.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="NaN"):
        perplexity(model, WINDOWS)
