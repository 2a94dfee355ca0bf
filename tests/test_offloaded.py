"""Models whose layers are on disk: the same results, one layer in memory at a time."""

import pytest
import torch
from tiny import FAMILIES, opened, token_ids
from transformers import AutoModelForCausalLM

from probeprune import METHODS, attach, prepare, prune, save
from probeprune.calibration.collecting import calibrate
from probeprune.errors import UsageError
from probeprune.model.families import find_family
from probeprune.model.offloading import fetching_hook, in_memory, is_offloaded, named_weights
from probeprune.provenance import model_fingerprint

WINDOWS = token_ids(10, 64, seed=3)
STATIC = [name for name, m in METHODS.items() if m.when.prunes and not m.when.every_batch]


def on_disk(model, folder):
    """The model, saved and opened again with its decoder layers on disk."""
    model.save_pretrained(folder)
    layers = find_family(model).layers
    places = {name: "cpu" for name, _ in model.named_modules() if name and not layers.startswith(name)}
    places = {n: p for n, p in places.items() if not n.startswith(f"{layers}.")}
    places |= {f"{layers}.{i}": "disk" for i in range(len(model.get_submodule(layers)))}
    found = AutoModelForCausalLM.from_pretrained(
        folder, device_map=places, offload_folder=folder / "offload", dtype=torch.float32
    )
    return found.requires_grad_(False).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_comes_and_goes(family, tmp_path):
    model = FAMILIES[family]()
    other = on_disk(model, tmp_path)
    assert is_offloaded(other) and not is_offloaded(model)
    layers = find_family(other).layers
    layer = other.get_submodule(f"{layers}.1")
    before = {n: p for n, p in layer.named_parameters()}
    with in_memory(layer):
        for name, p in layer.named_parameters():
            assert p.equal(model.get_parameter(f"{layers}.1.{name}"))
            p.zero_()
    assert all(p is before[n] and p.is_meta for n, p in layer.named_parameters())
    assert model_fingerprint(other) == model_fingerprint(model)
    for (name, p), (same, q) in zip(model.named_parameters(), named_weights(other), strict=True):
        assert name == same and p.equal(q)
    assert torch.equal(model(WINDOWS).logits, other(WINDOWS).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_those_of_the_model_in_memory(family, tmp_path):
    model = FAMILIES[family]()
    other = on_disk(model, tmp_path)
    here, there = (calibrate(m, WINDOWS, batch_size=4) for m in (model, other))
    for name, moments in here.items():
        for key, value in moments.state().items():
            assert value.equal(there[name].state()[key])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", STATIC)
def test_pruned_and_saved_a_layer_at_a_time(method, family, tmp_path):
    if METHODS[method].when.__class__.__name__ == "DuringTraining":
        pytest.skip("trains")
    model = FAMILIES[family]()
    other = on_disk(model, tmp_path / "dense")
    for m, folder in ((model, "here"), (other, "there")):
        done = prune(m, method, 0.3, calibration=WINDOWS)
        save(m, tmp_path / folder)
        assert done.removed_share > 0.2
    assert is_offloaded(other)
    assert torch.equal(model(WINDOWS).logits, other(WINDOWS).logits)
    here, there = opened(tmp_path / "here"), opened(tmp_path / "there")
    for (name, p), (same, q) in zip(here.named_parameters(), there.named_parameters(), strict=True):
        assert name == same and p.equal(q)
