"""Layers on several devices: everything that an attached method keeps lies where its layer does."""

import pytest
import torch
from all_methods import ALL
from fake_devices import two_gpus
from tiny import FAMILIES, token_ids
from torch._subclasses.fake_tensor import FakeTensorDeviceMismatchError

from probeprune import UsageError, attach, load_model, prepare, prune
from probeprune.model.offloading import is_offloaded, named_weights

IDS = token_ids(4, 24)
METHODS = (
    *("wanda-sp", "best-static", "probe", "probe-reuse", "full-batch", "best-dynamic"),
    *("parallel", "balanced heads", "probe and bias", "refresh"),
)
"""One of each kind of what is kept at a block; no widths or units that depend on numbers when attached."""


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("method", METHODS)
def test_passes_steps_and_a_detach(method):
    model = FAMILIES["llama-gqa"]()
    prepared = prepare(model, [ALL[method]], [0.3], IDS)
    with two_gpus(model, prepared):
        handle = attach(model, ALL[method], 0.3, calibration=prepared)
        places = [p.partition.order.device.index for p in handle.pruned]
        out = model(IDS, attention_mask=torch.ones_like(IDS))
        assert out.logits.shape == (4, 24, 128)
        step = model(IDS[:, :1], past_key_values=out.past_key_values)
        assert step.logits.shape == (4, 1, 128)
        handle.detach()
    assert {0, 1} <= {*places} or not places


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_two_devices_do_not_mix():
    """The fake devices fail as real ones would."""
    model = FAMILIES["llama-gqa"]()
    prepared = prepare(model, ["probe"], [0.3], IDS)
    with two_gpus(model, prepared):
        handle = attach(model, "probe", 0.3, calibration=prepared)
        partition = handle.pruned[0].partition
        other = f"cuda:{1 - partition.order.device.index}"
        partition.companions.append(torch.zeros(partition.block.width, device=other))
        with pytest.raises(FakeTensorDeviceMismatchError):
            model(IDS)


def saved(folder, tokenizer):
    FAMILIES["llama-gqa"]().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_device_maps(tmp_path, number_tokenizer):
    """On real numbers: a map, and a map that leaves some layers on disk, give the model in memory."""
    opened = saved(tmp_path / "dense", number_tokenizer)
    disk = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    disk |= {f"model.layers.{i}": "disk" if i > 2 else "cpu" for i in range(5)}
    found = []
    for places in (None, "auto", {"": "cpu"}, disk):
        loaded = load_model(opened, dtype="float32", device_map=places)
        assert is_offloaded(loaded.model) == (places is disk)
        prune(loaded.model, ALL["wanda-sp"], 0.3, calibration=IDS)
        found.append(dict(named_weights(loaded.model)))
    for other in found[1:]:
        assert all(torch.equal(other[name], own) for name, own in found[0].items())


def test_maps_that_are_refused(tmp_path, number_tokenizer):
    opened = saved(tmp_path / "dense", number_tokenizer)
    with pytest.raises(UsageError, match="leave device and memory out"):
        load_model(opened, device="cpu", device_map="auto")
    with pytest.raises(UsageError, match="could not be loaded"):
        load_model(opened, device_map="everywhere")
