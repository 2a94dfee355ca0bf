"""Agreement with a model that is gone: what it predicted is kept, and compared along with perplexity."""

import json
import math

import pytest
import torch
from test_distilling import pruned
from test_experiment import compare, tiny_folder  # noqa: F401
from tiny import FAMILIES, token_ids

import probeprune
from probeprune.data.corpora import load_corpus
from probeprune.data.windows import evaluation_windows
from probeprune.evaluation import predictions as module
from probeprune.evaluation.agreement import agreement
from probeprune.evaluation.perplexity import perplexity
from probeprune.evaluation.predictions import Comparison, Predictions, Recorder
from probeprune.experiment.results import RESULTS
from probeprune.model import decoding

IDS = token_ids(5, 13)
TOKENS = 5 * 12


def compared(model, reference, path=None):
    """Agreement by way of what the reference predicted, from a file where a path is given."""
    taken = Recorder(TOKENS)
    perplexity(reference, IDS, batch_size=2, see=taken)
    kept = taken.predictions()
    if path is not None:
        kept.save(path)
        kept = Predictions.load(path)
    comparison = Comparison(kept, 12)
    perplexity(model, IDS, batch_size=4, see=comparison)
    return comparison.agreement(divided=False)


@pytest.mark.parametrize("family", ["llama-gqa", "gemma2"])
@pytest.mark.parametrize("at_once", [17, 2048])
def test_figures_are_those_of_both_models_in_memory(family, at_once, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "TOP_K", 10**6)  # all tokens but one: exact
    monkeypatch.setattr(module, "_TOKENS", 7)
    monkeypatch.setattr(decoding, "HEAD_TOKENS", at_once)
    model, reference = pruned(family), FAMILIES[family]()
    want, got = agreement(model, reference, IDS), compared(model, reference, tmp_path / "kept.safetensors")
    assert got.top1 == want.top1 and got.tokens == want.tokens
    for name in ("divergence", "top1_error", "divergence_error"):
        assert getattr(got, name) == pytest.approx(getattr(want, name), rel=1e-4), name


def test_few_tokens_told_apart_are_the_formula_and_less(monkeypatch):
    monkeypatch.setattr(module, "TOP_K", 5)
    model, reference = pruned(), FAMILIES["llama-gqa"]()
    got = compared(model, reference)
    with torch.no_grad():
        q, p = (m(IDS).logits[:, :-1].double().softmax(-1).flatten(0, 1) for m in (model, reference))
    ids = p.topk(5).indices
    q, p = (torch.cat([x.gather(1, ids), 1 - x.gather(1, ids).sum(1, True)], 1) for x in (q, p))
    assert got.divergence == pytest.approx(float((p * (p / q).log()).sum(1).mean()), rel=1e-4)
    assert got.divergence < agreement(model, reference, IDS).divergence


def test_a_model_agrees_with_itself():
    model = FAMILIES["llama-gqa"]()
    got = compared(model, model)
    assert got.top1 == 1 and 0 <= got.divergence < 1e-6 and got.divergence_error < 1e-6


def test_a_file_that_is_torn_is_none(tmp_path):
    path = tmp_path / "kept.safetensors"
    assert Predictions.load(path) is None
    path.write_bytes(b"torn")
    assert Predictions.load(path) is None


def test_compare_says_how_far_methods_agree_with_dense(tiny_folder, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setenv("PROBEPRUNE_CACHE", str(tmp_path / "cache"))
    methods = "dense,wanda-sp,probe,flap+lora"

    def rows(out):
        assert compare(tiny_folder, tmp_path / out, "--methods", methods, "--json") == 0
        return {r["name"]: r for r in map(json.loads, capsys.readouterr().out.splitlines())}

    first = rows("first")
    assert first["dense"]["agreement"] is None
    for name in ("wanda-sp", "probe", "flap+lora"):
        found = first[name]["agreement"]
        assert 0 < found["top1"] <= 1 and found["divergence"] > 0 and math.isfinite(found["top1_error"])
    loaded = probeprune.load_model(str(tiny_folder / "model"), dtype="float32")
    reference = probeprune.load_model(str(tiny_folder / "model"), dtype="float32").model
    text = evaluation_windows(
        load_corpus(str(tiny_folder / "text.jsonl")), loaded.tokenizer, length=16, limit=4
    )
    (trained,) = (tmp_path / "first/trained").glob("flap+lora-*")
    model = probeprune.load_model(str(trained), dtype="float32").model
    want = agreement(model, reference, text, batch_size=4)
    assert first["flap+lora"]["agreement"]["top1"] == want.top1
    # Where what the dense model predicted is gone, it runs again.
    (kept,) = (tmp_path / "cache/predictions").iterdir()
    kept.unlink()
    lines = (tmp_path / "first" / RESULTS).read_text().splitlines(keepends=True)
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / RESULTS).write_text(lines[0])
    again = rows("second")
    assert again["dense"] == first["dense"] and kept.exists()
    assert {n: r["agreement"] for n, r in again.items()} == {n: r["agreement"] for n, r in first.items()}
    table = (tmp_path / "second/table.md").read_text().splitlines()
    header = [cell.strip() for cell in table[2].split("|")]
    assert header.count("top-1") == header.count("KL") == 1
    wanda = next(line for line in table if "wanda-sp" in line).split("|")
    assert float(wanda[header.index("top-1")].split()[0]) == pytest.approx(
        100 * first["wanda-sp"]["agreement"]["top1"], abs=0.051
    )
