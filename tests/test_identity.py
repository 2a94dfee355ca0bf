"""A model's fingerprint follows every change of weights or config, and hashes all weights only then."""

import gc

import pytest
import torch
from tiny import FAMILIES

from probeprune.model import identity
from probeprune.model.identity import model_fingerprint


@pytest.fixture
def hashed(monkeypatch):
    """The models whose weights were all hashed, in order."""
    calls, real = [], identity._hash

    def counted(model):
        calls.append(id(model))
        return real(model)

    monkeypatch.setattr(identity, "_hash", counted)
    return calls


def in_place(model):
    with torch.no_grad():
        model.lm_head.weight[3, 5] += 1


def through_data(model):
    model.model.layers[1].mlp.up_proj.weight.data += 0.1  # as adapters are merged


def another_tensor(model):
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 2)


def another_dtype(model):
    model.to(torch.bfloat16)


def config(model):
    model.config.rms_norm_eps = 1e-3


@pytest.mark.parametrize("change", [in_place, through_data, another_tensor, another_dtype, config])
def test_a_change_is_seen_and_weights_are_hashed_once(change, hashed):
    model = FAMILIES["llama-gqa"]()
    before = [model_fingerprint(model) for _ in range(3)]
    assert len(set(before)) == 1 and len(hashed) == 1
    change(model)
    after = [model_fingerprint(model) for _ in range(3)]
    assert len(set(after)) == 1 and after[0] != before[0] and len(hashed) == 2


def test_equal_models_have_equal_fingerprints_and_leave_nothing_behind(hashed):
    one, two = FAMILIES["llama-gqa"](), FAMILIES["llama-gqa"]()
    assert model_fingerprint(one) == model_fingerprint(two) and len(hashed) == 2
    remembered = len(identity._FINGERPRINTS)
    del one
    gc.collect()
    assert len(identity._FINGERPRINTS) < remembered


def test_weights_made_in_inference_mode_are_hashed_too(hashed):
    with torch.inference_mode():
        model = FAMILIES["llama-gqa"]()
    assert model_fingerprint(model) == model_fingerprint(FAMILIES["llama-gqa"]())
