"""Mixtures of experts whose layers are on disk: the same units and figures, one layer in memory at a time."""

import copy
import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import tiny_experts
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_experts import EVEN, MIXED, PROBE, WHOLE, WINDOWS
from test_offloaded import DYNAMIC, STATIC, small
from tiny import opened, token_ids

from probeprune import METHODS, attach, compose, prune, save
from probeprune.cli import app, run
from probeprune.errors import UsageError
from probeprune.evaluation.perplexity import perplexity
from probeprune.model import placing
from probeprune.model.blocks import find_blocks
from probeprune.model.described import empty_like
from probeprune.model.footprint import Phase
from probeprune.model.identity import model_fingerprint
from probeprune.model.joined import are_joined
from probeprune.model.loading import load_model
from probeprune.model.offloading import cast, changes_of, fetched, is_offloaded, named_weights, stored_in
from probeprune.model.placing import opening_of
from probeprune.strategies.expert_importance import EXPERT_IMPORTANCES

TEXT = token_ids(6, 16, seed=9) % 57 + 3
LONG = token_ids(10, 64, seed=3) % 57 + 3
RATIO = {"even": 0.3, "whole": 0.3, "mixed": 0.2, "probe": 0.08}
FUSED = ("aria_text", "gemma4_text", "gpt_oss", "granitemoe", "granitemoeshared", "granitemoehybrid")
FUSED += ("granitemoe_swa", "llama4_text")
"""Families whose published checkpoints hold all experts of a layer in one tensor."""
JOINED = ("qwen2_moe", "mixtral", "deepseek_v3")
"""Some of those whose checkpoints hold a tensor for each expert: beside shared experts, alone, in groups."""
FIRST = ("experts.gate_up_proj", "experts.up_proj")

pytestmark = [
    pytest.mark.filterwarnings("ignore:experts stay whole"),
    pytest.mark.filterwarnings("ignore:no head of this model can go"),
    pytest.mark.filterwarnings("ignore:no token of the calibration text"),
    pytest.mark.filterwarnings("ignore:the weights take"),
    pytest.mark.filterwarnings("ignore:the explicitly set RoPE"),
]


@dataclass
class Folder:
    """A tiny model as a folder."""

    name: str
    path: Path

    @cached_property
    def both(self) -> tuple[Any, Any]:
        """Opened once in memory and once on disk, for tests that change neither."""
        here = load_model(str(self.path), dtype="float32", device="cpu").model
        return here, by_layer(self.path, here)

    def here(self) -> Any:
        """A model in memory."""
        return copy.deepcopy(self.both[0])

    def there(self) -> Any:
        """Opened with as little memory as it takes to have its layers on disk."""
        return by_layer(self.path, self.both[0])


def by_layer(path: Path, like: Any) -> Any:
    """A model opened a layer at a time, without a copy on disk; `like` has its shape."""
    work = [Phase("none", 0)]
    model = empty_like(like)
    opening = opening_of(model, torch.float32, torch.device("cpu"), [(torch.float32, 4)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placing, "in_use", lambda device: (0, 1 << 40))
        patch.setattr(placing, "retained", lambda device: 0)
        least = max(size for _, size in opening.by_layer(work))
        found = load_model(str(path), dtype="float32", device="cpu", memory=least, work=lambda *_: work).model
    assert is_offloaded(found) and not list(changes_of(found).iterdir())
    return found


@pytest.fixture(scope="module", params=tiny_experts.CONFIGS)
def folder(request, tmp_path_factory, number_tokenizer):
    path = tmp_path_factory.mktemp("experts") / "model"
    save(tiny_experts.build(request.param)(), path, tokenizer=number_tokenizer)
    return Folder(request.param, path)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory, number_tokenizer):
    path = tmp_path_factory.mktemp("experts") / "model"
    save(tiny_experts.build("qwen2_moe")(), path, tokenizer=number_tokenizer)
    return Folder("qwen2_moe", path)


def names_of(path: Path) -> set[str]:
    """The names of all tensors in a folder, which are those of its index."""
    found = set()
    for file in path.glob("*.safetensors"):
        with safe_open(file, framework="pt") as shard:
            found |= set(shard.keys())
    index = path / "model.safetensors.index.json"
    assert not index.exists() or set(json.loads(index.read_text())["weight_map"]) == found
    return found


def test_each_weight_is_joined_as_transformers_joins_it(folder):
    here, there = folder.both
    for (name, own), (same, other) in zip(here.named_parameters(), named_weights(there), strict=True):
        assert name == same and own.equal(other)
    for (name, own), (same, other) in zip(here.named_buffers(), there.named_buffers(), strict=True):
        assert name == same and own.equal(other)
    pieces = [len(stored_in(there, n)) for n, _ in there.named_parameters() if n.endswith(FIRST)]
    assert all((n == 1) == (folder.name in FUSED) for n in pieces) and pieces
    assert are_joined(here) == (folder.name not in FUSED)
    assert model_fingerprint(here) == model_fingerprint(there)
    assert torch.equal(here(WINDOWS).logits, there(WINDOWS).logits)


def test_perplexity_of_the_model_and_under_methods_is_that_in_memory(folder):
    here, there = folder.both
    dense = perplexity(here, TEXT, batch_size=4).losses
    assert dense == perplexity(there, TEXT, batch_size=4).losses
    methods = [EVEN, WHOLE, *([PROBE] if any(b.whole is None for b in find_blocks(here)) else [])]
    for method in methods:
        found = []
        for model in (here, there):
            with attach(model, method, RATIO[method.name], calibration=WINDOWS) as handle:
                figures = perplexity(model, TEXT, batch_size=4)
                kept = handle.kept_units() if method.when == EVEN.when else handle.widths
                found.append((figures.losses, figures.flops_per_token, handle.removed_share, kept))
                if method is EVEN:
                    with pytest.raises(UsageError, match="cuts experts cannot be saved with its model"):
                        save(handle, folder.path / "never")
        assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
        assert found[0][1:] == found[1][1:]
        assert found[0][0] != dense


@pytest.mark.parametrize("method", [EVEN, WHOLE], ids=lambda m: m.name)
def test_pruned_and_saved_a_layer_at_a_time(folder, method, tmp_path, number_tokenizer):
    check_pruned_and_saved(folder, method, tmp_path, number_tokenizer)


@pytest.mark.parametrize("folder", (*FUSED, *JOINED), indirect=True)
def test_widths_of_single_layers_saved_a_layer_at_a_time(folder, tmp_path, number_tokenizer):
    """They do not depend on more of a family than how its files hold the experts."""
    check_pruned_and_saved(folder, MIXED, tmp_path, number_tokenizer)


def check_pruned_and_saved(folder, method, tmp_path, number_tokenizer):
    """A model on disk is cut, saved and opened again as the one in memory is."""
    done = {}
    for name, model in (("here", folder.here()), ("there", folder.there())):
        done[name] = prune(model, method, RATIO[method.name], calibration=WINDOWS)
        save(model, tmp_path / name, tokenizer=number_tokenizer)
    assert done["here"].record() == done["there"].record()
    assert names_of(tmp_path / "here") == names_of(tmp_path / "there")
    here, there = opened(tmp_path / "here"), opened(tmp_path / "there")
    assert here.state_dict().keys() == there.state_dict().keys()
    assert all(own.equal(there.state_dict()[name]) for name, own in here.state_dict().items())
    for (name, own), (same, other) in zip(
        here.named_parameters(), named_weights(by_layer(tmp_path / "there", there)), strict=True
    ):
        assert name == same and own.equal(other)


WAYS = [
    *(pytest.param(small(name), id=name) for name in STATIC),
    *(
        pytest.param(compose("wanda-sp", experts="expert", expert_importance=name), id=name)
        for name in EXPERT_IMPORTANCES
    ),
]


@pytest.mark.parametrize("method", WAYS)
def test_every_static_method_keeps_the_same_units(method, qwen):
    method = compose(method, skip_layers=0)
    found = []
    for model in (qwen.here(), qwen.there()):
        done = prune(model, method, 0.15, calibration=LONG)
        found.append((done.kept, perplexity(model, TEXT, batch_size=4).losses))
    assert found[0][0] == found[1][0] and found[0][1] == pytest.approx(found[1][1], rel=1e-5)


@pytest.mark.parametrize("name", ["dense", *DYNAMIC])
def test_every_dynamic_method_gives_the_same_figures(name, qwen):
    method = METHODS[name] if name == "dense" else compose(small(name), skip_layers=0)
    found = []
    for model in (qwen.here(), qwen.there()):
        with attach(model, method, 0.1, calibration=LONG) as handle:
            found.append((perplexity(model, TEXT, batch_size=4).losses, handle.widths))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5) and found[0][1] == found[1][1]


def test_weights_in_another_dtype(qwen, tmp_path):
    here, there = (load_model(str(qwen.path), dtype="bfloat16", device="cpu").model, qwen.there())
    cast(there, torch.bfloat16)
    save(there, tmp_path / "there")
    same = opened(tmp_path / "there", dtype=torch.bfloat16).state_dict()
    assert all(own.equal(same[name]) for name, own in here.state_dict().items())


@pytest.mark.parametrize("what", ["gone", "changed"])
def test_a_file_that_is_another_is_said(what, qwen, tmp_path):
    copied = Path(shutil.copytree(qwen.path, tmp_path / "model"))
    model, file = by_layer(copied, qwen.both[0]), copied / "model.safetensors"
    name = "model.layers.0.mlp.experts.down_proj"
    before = model_fingerprint(model)
    stored, key = load_file(file), "model.layers.0.mlp.experts.3.down_proj.weight"
    file.unlink()
    if what == "changed":
        save_file({**stored, key: stored[key][:5].clone()}, file)
    why = "No such file" if what == "gone" else r"experts.3.down_proj.weight has shape \(5, 16\), and had"
    with pytest.raises(UsageError, match=rf"{name} of layer 0 cannot be read from .* any more: .*{why}"):
        fetched(model, name)
    save_file({**stored, "lm_head.weight": stored["lm_head.weight"] + 1}, file)
    assert model_fingerprint(model) == before  # of what is in memory: the head is
    save_file(
        {k: v + 1 if k == "model.layers.0.mlp.experts.3.down_proj.weight" else v for k, v in stored.items()},
        file,
    )
    assert model_fingerprint(model) != before


def test_the_command_prunes_within_the_memory_that_was_planned(qwen, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PROBEPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(placing, "in_use", lambda device: (0, 1 << 40))
    monkeypatch.setattr("probeprune.jobs.forecast.in_use", lambda device: (0, 1 << 40))
    lines = [" ".join(map(str, row)) for row in torch.randint(3, 60, (20, 60)).tolist()]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in lines))
    words = [qwen.path, "--ratio", 0.3, "--calibration", tmp_path / "text.jsonl", "--dtype", "float32"]
    words += ["--calibration-windows", 8, "--length", 16, "--windows", 4, "--round-to", 1, "--json"]
    words += ["--corpus", tmp_path / "text.jsonl", "--method", "wanda-sp", "--experts", "expert"]

    def call(command: str, *more: object) -> dict[str, Any]:
        assert run(lambda: app([command, *map(str, words), *map(str, more)])) == 0
        said = capsys.readouterr()
        return {**json.loads(said.out), "said": " ".join(said.err.split())}

    planned = call("plan")
    least = planned["by_layer"]["bytes"]
    assert least < planned["in_memory"]["bytes"]
    there = call("prune", "--out", tmp_path / "there", "--memory", f"{-(-least // 1024)}KiB")
    here = call("prune", "--out", tmp_path / "here")
    assert "the layers stay on disk" in there["said"] and "the layers stay" not in here["said"]
    assert there["kept"] == here["kept"] and there["parameters"] == here["parameters"]
    assert names_of(tmp_path / "here") == names_of(tmp_path / "there")
    assert there["evaluation"]["perplexity"] == pytest.approx(here["evaluation"]["perplexity"], rel=1e-6)
