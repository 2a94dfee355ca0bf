"""Agreement of two models: the plain formulas, with parts, batches, soft caps and offloaded layers."""

import math

import pytest
import torch
from test_distilling import pruned, small
from test_offloaded import on_disk
from tiny import FAMILIES, token_ids

from probeprune import attach
from probeprune.errors import UsageError
from probeprune.evaluation import agreement as module
from probeprune.evaluation.agreement import agreement

IDS = token_ids(5, 13)


def written_out(model, reference):
    q, p = (m(IDS).logits[:, :-1].double().log_softmax(-1) for m in (model, reference))
    same = (q.argmax(-1) == p.argmax(-1)).double()
    return same.mean(1), (p.exp() * (p - q)).sum(-1).mean(1)


@pytest.mark.parametrize("family", ["llama-gqa", "gemma2"])
@pytest.mark.parametrize("batch_size", [2, 16])
def test_figures_are_the_formulas(family, batch_size, monkeypatch):
    monkeypatch.setattr(module, "HEAD_TOKENS", 17)
    model, reference = pruned(family), FAMILIES[family]()
    seen = []
    found = agreement(model, reference, IDS, batch_size=batch_size, progress=lambda *a: seen.append(a))
    with torch.no_grad():
        same, apart = written_out(model, reference)
    assert found.top1 == pytest.approx(float(same.mean())) and 0 < found.top1 < 1
    assert found.divergence == pytest.approx(float(apart.mean()), rel=1e-5)
    assert found.top1_error == pytest.approx(float(same.std()) / math.sqrt(5))
    assert found.divergence_error == pytest.approx(float(apart.std()) / math.sqrt(5), rel=1e-4)
    assert found.tokens == 60 and seen[-1] == ("agreement", 5, 5)


def test_a_model_agrees_with_itself_and_one_window_has_no_error():
    model = FAMILIES["llama-gqa"]()
    found = agreement(model, model, IDS[:1])
    assert found.top1 == 1 and abs(found.divergence) < 1e-6
    assert math.isnan(found.top1_error) and found.record()["top1_error"] is None


def test_offloaded_layers_change_nothing(tmp_path):
    model, reference = pruned(), FAMILIES["llama-gqa"]()
    here = agreement(model, reference, IDS)
    assert agreement(model, on_disk(reference, tmp_path), IDS) == here


def test_a_method_that_is_attached_is_seen():
    model, reference = FAMILIES["llama-gqa"](), FAMILIES["llama-gqa"]()
    handle = attach(model, "magnitude", 0.3)
    assert agreement(model, reference, IDS).divergence > 0.01
    handle.detach()
    assert agreement(model, reference, IDS).top1 == 1


def test_what_cannot_be_compared_is_refused():
    model = FAMILIES["llama-gqa"]()
    for reference, windows, says in (
        (small(vocab_size=200), IDS, "vocabulary has 200 tokens and the model's 128"),
        (model, IDS[:, :1], "at least 2 tokens"),
        (small(max_position_embeddings=8), IDS, "8 positions"),
    ):
        with pytest.raises(UsageError, match=says):
            agreement(model, reference, windows)
