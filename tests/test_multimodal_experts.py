"""Experts of the language model inside a multimodal one are pruned as they are alone; images run through."""

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import tiny_multimodal
import torch
from test_experts import EVEN, MIXED, PROBE, WHOLE, WINDOWS, without
from test_experts_offloaded import Folder, names_of
from test_multimodal import beside_text, seen, written
from tiny import close, opened, snapshot
from transformers import AutoModelForImageTextToText

from probeprune import attach, prune, save
from probeprune.evaluation.perplexity import perplexity
from probeprune.model.experts import find_parts, find_stacks
from probeprune.model.loading import auto_class
from probeprune.model.multimodal import multimodal_of
from probeprune.model.offloading import named_weights
from probeprune.model.passes import find_decoder

RATIO = {"even": 0.25, "whole": 0.25, "mixed": 0.15}

pytestmark = [
    pytest.mark.filterwarnings("ignore:experts stay whole"),
    pytest.mark.filterwarnings("ignore:no token of the calibration text"),
    pytest.mark.filterwarnings("ignore:the weights take"),
]


@dataclass
class Row:
    """A tiny model, a batch with images, and its logits."""

    name: str
    model: Any
    batch: dict[str, torch.Tensor]
    dense: torch.Tensor
    cuts: dict[str, Any] = field(default_factory=dict)


@pytest.fixture(scope="module", params=tiny_multimodal.SPARSE)
def row(request):
    model, batch = tiny_multimodal.build(request.param)(), tiny_multimodal.batch_of(request.param)
    return Row(request.param, model, batch, seen(model, batch))


def test_parts_are_those_of_the_language_model(row):
    text = multimodal_of(row.model.config.model_type).text
    parts = find_parts(row.model)
    assert find_stacks(row.model) and all(p.name.startswith(f"{text}.layers.{p.layer}.") for p in parts)
    assert {p.kind for p in parts} >= {"attention", "experts"}


def test_a_probed_batch_with_images_is_the_dense_model_masked(row):
    before, beside = (
        snapshot(find_decoder(row.model)),
        {n: t.clone() for n, t in beside_text(row.model).items()},
    )
    with attach(row.model, PROBE, 0.08, calibration=WINDOWS) as handle:
        got, choice = seen(row.model, row.batch), handle.kept_units()
        assert any(len(k.units) < k.of for k in choice)
    before.assert_untouched()
    assert all(t.equal(beside[n]) for n, t in beside_text(row.model).items())
    with without(row.model, choice) as other:
        close(got, seen(other, row.batch))
    assert seen(row.model, row.batch).equal(row.dense)


@pytest.mark.parametrize("method", [EVEN, WHOLE, MIXED], ids=lambda m: m.name)
def test_a_cut_model_and_its_checkpoint_are_the_dense_one_masked(row, method, tmp_path):
    smaller = copy.deepcopy(row.model)
    done = prune(smaller, method, RATIO[method.name], calibration=WINDOWS)
    assert "experts" in {k.kind for k in done.kept if len(k.units) < k.of}
    got = seen(smaller, row.batch)
    with without(row.model, done.kept) as other:
        close(got, seen(other, row.batch))
    with attach(row.model, method, RATIO[method.name], calibration=WINDOWS):
        close(got, seen(row.model, row.batch))
    save(smaller, tmp_path / "out", layout="per-layer" if method is MIXED else "uniform")
    assert (tmp_path / "out" / "modeling_pruned.py").exists() == (method is MIXED)
    loaded = opened(tmp_path / "out", AutoModelForImageTextToText, dtype=torch.float32)
    close(got, seen(loaded, row.batch))
    assert all(t.equal(loaded.state_dict()[n]) for n, t in beside_text(smaller).items())
    assert written(loaded, row.batch).equal(written(smaller, row.batch))


def test_a_layer_at_a_time_is_the_model_in_memory(row, tmp_path, number_tokenizer):
    save(row.model, tmp_path / "dense", tokenizer=number_tokenizer)
    folder = Folder(row.name, tmp_path / "dense")
    here, there = folder.here(), folder.there()
    assert auto_class(there.config) is AutoModelForImageTextToText
    for (name, own), (same, other) in zip(here.named_parameters(), named_weights(there), strict=True):
        assert name == same and own.equal(other)
    assert perplexity(here, WINDOWS, batch_size=4).losses == perplexity(there, WINDOWS, batch_size=4).losses
    kept = [prune(model, WHOLE, RATIO["whole"], calibration=WINDOWS).kept for model in (here, there)]
    assert kept[0] == kept[1]
    for model, name in ((here, "here"), (there, "there")):
        save(model, tmp_path / name)
    assert names_of(tmp_path / "here") == names_of(tmp_path / "there")
    first, second = (
        opened(tmp_path / n, AutoModelForImageTextToText, dtype=torch.float32).state_dict()
        for n in ("here", "there")
    )
    assert first.keys() == second.keys() and all(t.equal(second[n]) for n, t in first.items())
