"""Losses by parts: the same values and gradients as with all logits at once, and never all logits."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from short_training import HELD_OUT, SHORT, TEXT
from test_offloaded import on_disk
from tiny import FAMILIES, token_ids
from torch import nn

from probeprune.errors import UsageError
from probeprune.training import losses
from probeprune.training.loraprune import LoraPruneCut, loraprune
from probeprune.training.losses import text_loss, training_loss
from probeprune.training.recovery import recover

IDS = token_ids(3, 17)


@pytest.fixture(params=[1, 7, 1000], ids="parts of {}".format)
def parts(request, monkeypatch):
    """Parts of so many tokens, of vocabularies of 128."""
    monkeypatch.setattr(losses, "LOGITS", 128 * request.param)
    return request.param


def loss_and_gradients(model, context, **more):
    model.zero_grad()
    with context:
        loss = model(input_ids=IDS, labels=IDS, **more).loss
        loss.backward()
    return float(loss.detach()), {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("items", [None, 99])
@pytest.mark.parametrize("family", ["llama-gqa", "gemma2", "opt-post-norm", "gpt-neox"])
def test_text_loss_and_gradients_are_the_models_own(family, items, parts):
    assert_own_loss(family, {} if items is None else {"num_items_in_batch": items})


@pytest.mark.parametrize("family", FAMILIES)
def test_every_familys_head_is_its_own(family, monkeypatch):
    monkeypatch.setattr(losses, "LOGITS", 128 * 20)
    assert_own_loss(family, {})


def assert_own_loss(family, more):
    model = FAMILIES[family]()
    want, gradients = loss_and_gradients(model, nullcontext(), **more)
    got, by_parts = loss_and_gradients(model, training_loss(model, text_loss), **more)
    assert got == pytest.approx(want, rel=1e-6)
    scale = max(gradient.abs().max() for gradient in gradients.values())
    for name, gradient in gradients.items():  # some, such as those of a key's bias, are nothing but rounding
        largest = gradient.abs().max()
        assert (by_parts[name] - gradient).abs().max() <= 1e-5 * max(largest, scale / 100), name


def test_no_more_logits_than_those_of_one_part(parts, monkeypatch):
    model = FAMILIES["llama"]()
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.shape[0]))
    loss_and_gradients(model, training_loss(model, text_loss))
    tokens = IDS.numel() - len(IDS)
    assert max(seen) == min(parts, tokens)
    last = (tokens - 1) % parts + 1  # is not computed again
    assert sum(seen) == 2 * tokens - last


def test_half_precision_computes_the_part_as_the_model_does(parts):
    model = FAMILIES["llama"]()
    with torch.autocast("cpu", torch.bfloat16):
        want, gradients = loss_and_gradients(model, nullcontext())
        got, by_parts = loss_and_gradients(model, training_loss(model, text_loss))
    assert got == pytest.approx(want, rel=1e-5)
    for name, gradient in gradients.items():
        assert (by_parts[name] - gradient).norm() <= 0.02 * gradient.norm(), name


def test_other_calls_are_the_models_own_and_so_are_all_afterwards():
    model = FAMILIES["llama"]()
    before = model.forward
    with training_loss(model, text_loss), torch.no_grad():
        assert model(IDS).logits.shape == (*IDS.shape, 128)
        assert model(input_ids=IDS, labels=IDS, attention_mask=torch.ones_like(IDS)).logits is not None
        assert model(input_ids=IDS, labels=IDS).logits is None
        wrapped = model.forward  # as accelerate does for a model that trains in half precision
    assert model.forward == before
    assert wrapped(input_ids=IDS, labels=IDS).logits is not None


def test_a_failure_leaves_the_forward_as_it_was():
    model = FAMILIES["llama"]()
    with pytest.raises(RuntimeError), training_loss(model, text_loss):
        raise RuntimeError
    assert "forward" not in vars(model)


@pytest.mark.parametrize("lora", [True, False])
def test_training_never_sees_all_logits(lora, tmp_path, monkeypatch):
    monkeypatch.setattr(losses, "LOGITS", 128 * 20)
    model = FAMILIES["llama"]()
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.shape[0]))
    training = SHORT if lora else replace(SHORT, lora=None)
    recover(model, TEXT, HELD_OUT, training, tmp_path / "w")
    assert max(seen) == 20
    assert isinstance(model.lm_head, nn.Linear) and "forward" not in vars(model)


def test_an_offloaded_model_is_refused_in_one_sentence(tmp_path):
    model = on_disk(FAMILIES["llama"](), tmp_path)
    with pytest.raises(UsageError, match=r"training needs all weights in memory.*offloaded"):
        recover(model, TEXT, HELD_OUT, SHORT, tmp_path / "w")
    with pytest.raises(UsageError, match=r"training needs all weights in memory.*offloaded"):
        loraprune(model, TEXT, HELD_OUT, LoraPruneCut(0.3), replace(SHORT, keep_best=False), tmp_path / "w")
