"""Models whose layers are on disk: the same results, one layer in memory at a time."""

import gc
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from tiny import FAMILIES, PARALLEL, opened, token_ids
from transformers import AutoModelForCausalLM

from probeprune import METHODS, attach, compose, export_gguf, prune, save, with_equal_widths
from probeprune.calibration.collecting import calibrate
from probeprune.engines import gguf_write
from probeprune.errors import UsageError
from probeprune.evaluation.likelihood import Request, make_batches, score
from probeprune.evaluation.perplexity import perplexity
from probeprune.model import checkpoint, shards
from probeprune.model.families import find_family
from probeprune.model.hidden_states import HiddenStates, Room
from probeprune.model.identity import model_fingerprint
from probeprune.model.offloading import changes_of, in_memory, is_offloaded, named_weights
from probeprune.plan import needs
from probeprune.strategies.schedule import Once

WINDOWS = token_ids(10, 64, seed=3)
TEXT = token_ids(10, 40, seed=9)
STATIC = [name for name, m in METHODS.items() if m.when == Once() and m.gate_settings is None]
DYNAMIC = [name for name, m in METHODS.items() if m.when.every_batch]


def small(method):
    """The method, with gradients on the windows there are."""
    plain = METHODS[method]
    if "saliences" not in needs(plain):
        return plain
    return compose(plain, gradients=replace(plain.gradient_settings, length=64))


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


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """By family, a model in memory and the same on disk, for tests that change neither."""

    @cache
    def made(family):
        model = FAMILIES[family]()
        return model, on_disk(model, tmp_path_factory.mktemp(family))

    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_comes_and_goes(family, both):
    model, other = both(family)
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
def test_statistics_are_those_of_the_model_in_memory(family, both):
    here, there = (calibrate(m, WINDOWS, batch_size=4) for m in both(family))
    for name, moments in here.items():
        for key, value in moments.state().items():
            assert value.equal(there[name].state()[key])


@pytest.mark.parametrize(
    ("method", "family"),
    [*((m, "llama-gqa") for m in STATIC), *(("flap", f) for f in FAMILIES), ("best-static", "opt")],
)
def test_pruned_and_saved_a_layer_at_a_time(method, family, tmp_path):
    model = FAMILIES[family]()
    other = on_disk(model, tmp_path / "dense")
    for m, folder in ((model, "here"), (other, "there")):
        done = prune(m, small(method), 0.3, calibration=WINDOWS)
        save(m, tmp_path / folder)
        assert done.removed_share > 0.1
    assert is_offloaded(other)
    assert torch.equal(model(WINDOWS).logits, other(WINDOWS).logits)
    here, there = opened(tmp_path / "here"), opened(tmp_path / "there")
    for (name, p), (same, q) in zip(here.named_parameters(), there.named_parameters(), strict=True):
        assert name == same and p.equal(q)


def test_layers_that_become_shards_by_a_link_need_no_room(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = on_disk(FAMILIES["llama-gqa"](), tmp_path / "dense")
    prune(model, small("magnitude"), 0.3)
    changes = changes_of(model)
    linked = sum(file.stat().st_size for file in changes.iterdir())
    whole = sum(p.nbytes for p in model.parameters())
    assert linked > 0.1 * whole
    usage = type("Usage", (), {"free": whole - linked // 2 + checkpoint._HEADROOM})
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage)
    save(model, tmp_path / "out")
    elsewhere = Path("/dev/shm") / tmp_path.name
    if elsewhere.parent.is_dir() and elsewhere.parent.stat().st_dev != changes.stat().st_dev:
        with pytest.raises(UsageError, match="and its disk has"):
            save(model, elsewhere)
    monkeypatch.setattr(shards, "_ready", lambda model, shapes: None)
    with pytest.raises(UsageError, match="and its disk has"):
        save(model, tmp_path / "copied")


@pytest.mark.parametrize("method", ["dense", *STATIC, *DYNAMIC])
def test_perplexity_under_a_method_is_that_in_memory(method, both):
    model, other = both("llama-gqa")
    found = []
    for m in (model, other):
        with attach(m, small(method), 0.3, calibration=WINDOWS) as handle:
            found.append((perplexity(m, TEXT, batch_size=4), handle.removed_share, handle.widths))
    (here, share, widths), (there, same_share, same_widths) = found
    # Not to the last bit: kernels round by the alignment of the memory they get.
    assert here.losses == pytest.approx(there.losses, rel=1e-6)
    assert here.flops_per_token == there.flops_per_token
    assert share == pytest.approx(same_share, abs=2e-3) and len(widths) == len(same_widths)
    assert perplexity(other, TEXT, batch_size=4).losses == perplexity(model, TEXT, batch_size=4).losses


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_of_padded_rows_are_those_in_memory(family, both):
    model, other = both(family)
    requests = [Request([5] * n, [7, 9, 11][: n % 3 + 1]) for n in (3, 9, 14, 6, 2)]
    order = make_batches(requests, 2, "length")
    found = []
    for m in (model, other):
        with attach(m, "probe", 0.3, calibration=WINDOWS):
            found.append(score(m, requests, order, max_length=64))
    assert found[0].loglikelihoods == pytest.approx(found[1].loglikelihoods, rel=1e-5)
    assert found[0].greedy == found[1].greedy and found[0].tokens == found[1].tokens


def test_what_needs_all_layers_in_memory_is_refused(tmp_path):
    other = on_disk(FAMILIES["llama-gqa"](), tmp_path)
    with attach(other, "probe", 0.3, calibration=WINDOWS) as handle:
        with pytest.raises(UsageError, match="offloaded"):
            other(WINDOWS)
        with pytest.raises(UsageError, match="offloaded"):
            handle.kept_units()
        with pytest.raises(UsageError, match="already has a method attached"):
            attach(other, "probe", 0.3, calibration=WINDOWS)
    assert torch.isfinite(other(WINDOWS).logits).all()
    with pytest.raises(UsageError, match="in parallel"):
        attach(
            other,
            PARALLEL,
            0.3,
            calibration=WINDOWS,
        )


@pytest.mark.parametrize("family", ["llama-gqa", "llama-bias", "gpt-neox"])
def test_a_gguf_file_of_it_is_that_of_the_model_in_memory(family, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_write, "tokenizer_keys", lambda tokenizer, vocabulary: {})
    model = FAMILIES[family]()
    other = on_disk(model, tmp_path / "dense")
    for m, folder in ((model, "here"), (other, "there")):
        (tmp_path / folder).mkdir()
        prune(m, with_equal_widths(compose("wanda-sp", blocks=["mlp"])), 0.3, calibration=WINDOWS)
        export_gguf(m, tmp_path / folder / "model.gguf", tokenizer=object(), type="f32")
    here, there = ((tmp_path / f / "model.gguf").read_bytes() for f in ("here", "there"))
    assert here == there


def test_a_model_that_accelerate_offloads_to_memory(tmp_path):
    model, other = FAMILIES["llama-gqa"](), FAMILIES["llama-gqa"]()
    cpu_offload(other, torch.device("cpu"))
    assert is_offloaded(other) and model_fingerprint(other) == model_fingerprint(model)
    for m in (model, other):
        prune(m, "best-static", 0.3, calibration=WINDOWS)
    assert torch.equal(model(WINDOWS).logits, other(WINDOWS).logits)
    save(other, tmp_path / "there")
    for (name, p), q in zip(model.named_parameters(), opened(tmp_path / "there").parameters(), strict=True):
        assert p.equal(q), name


def test_work_that_fails_leaves_the_layers_as_they_were(tmp_path):
    model = FAMILIES["llama-gqa"]()
    other = on_disk(model, tmp_path)
    before = model_fingerprint(other)
    layer = other.model.layers[1]
    with pytest.raises(KeyboardInterrupt), in_memory(layer, "model.layers.1", tmp_path):
        layer.mlp.up_proj.weight.zero_()
        layer.mlp.down_proj.bias = torch.nn.Parameter(torch.ones(48))
        raise KeyboardInterrupt
    assert model_fingerprint(other) == before and layer.mlp.down_proj.bias is None
    assert torch.equal(model(WINDOWS).logits, other(WINDOWS).logits)


def test_hidden_states_that_find_no_room_go_to_disk_and_leave_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    states = [torch.randn(2, 3, 5), torch.randn(1, 3, 5).bfloat16()]
    kept = HiddenStates(Room(2 * 3 * 5 * 4), 2)
    for i, s in enumerate(states):
        kept[i] = s
    copied = HiddenStates(Room(2 * 3 * 5 * 4), 2)
    copied.take(kept)
    copied[0] = copied[0] * 2
    assert all(a.equal(b) and a.dtype == b.dtype for a, b in zip(kept, states, strict=True))
    assert copied[0].equal(states[0] * 2) and copied[1].equal(states[1])
    assert list(tmp_path.rglob("*.safetensors"))
    del kept, copied
    gc.collect()
    assert not list(tmp_path.iterdir())
