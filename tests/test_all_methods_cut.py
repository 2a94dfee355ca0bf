"""What every static method promises once it is cut for good, over one list of all methods."""

import pytest
import torch
from all_methods import ALL, RATIO, SOME_FAMILIES, STATIC, WINDOWS, prepared
from tiny import FAMILIES, close, logits, padded
from transformers import AutoModelForCausalLM

from probeprune import attach, prune, save


@pytest.mark.parametrize("family", SOME_FAMILIES)
@pytest.mark.parametrize("name", STATIC)
def test_a_cut_model_is_the_attached_one_and_its_checkpoint_too(family, name, tmp_path):
    model, calibration = prepared(family)
    batch = padded("left")
    with attach(model, ALL[name], RATIO, calibration=calibration) as handle:
        attached, units = logits(model, *batch), handle.kept_units()
    smaller = FAMILIES[family]()
    pruning = prune(smaller, ALL[name], RATIO, calibration=calibration)
    cut = logits(smaller, *batch)
    assert pruning.kept == tuple(units)
    assert pruning.removed_share == pytest.approx(RATIO, abs=0.02)
    close(cut, attached)
    save(smaller, tmp_path / "checkpoint")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint").eval()
    assert loaded.num_parameters() == smaller.num_parameters() < model.num_parameters()
    assert logits(loaded, *batch).equal(cut)


@pytest.mark.parametrize("family", SOME_FAMILIES)
@pytest.mark.parametrize("name", STATIC)
def test_a_cut_is_the_same_from_windows_and_from_what_was_prepared(family, name):
    _, calibration = prepared(family)
    states = []
    for given in (WINDOWS, calibration):
        model = FAMILIES[family]()
        prune(model, ALL[name], RATIO, calibration=given)
        states.append(model.state_dict())
    one, other = states
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert torch.equal(tensor, other[key]), key
