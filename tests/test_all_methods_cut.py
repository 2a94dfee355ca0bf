"""What every static method promises once it is cut for good, over one list of all methods."""

import pytest
import torch
from all_methods import ALL, RATIO, SPREAD, STATIC, WINDOWS, check_cut, prepared
from tiny import FAMILIES

from probeprune import prune

EACH = pytest.mark.parametrize("family, name", [(f, n) for f, n in SPREAD if n in STATIC])


@EACH
def test_a_cut_model_is_the_attached_one_and_its_checkpoint_too(family, name, tmp_path):
    _, calibration = prepared(family)
    check_cut(FAMILIES[family], ALL[name], calibration, tmp_path)


@EACH
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
