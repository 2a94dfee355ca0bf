"""Models on the hub and back, through the hub's own client and a stub of the hub on the loopback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from tiny import FAMILIES, token_ids

import probeprune
from probeprune import UsageError, attach, prune, save
from probeprune.jobs.share import hub_card

WINDOWS = token_ids(4, 16, seed=9)


@pytest.fixture(scope="module")
def session(tmp_path_factory, number_tokenizer):
    """What happened in one process that pushes a kept and a cut model, and opens them again."""
    place = tmp_path_factory.mktemp("hub")
    for name in ("kept", "cut"):
        model = FAMILIES["llama-gqa"]()
        model.resize_token_embeddings(1002)
        if name == "kept":
            with attach(model, "probe", 0.3, calibration=WINDOWS) as handle:
                save(handle, place / name, tokenizer=number_tokenizer, base_model="them/dense")
        else:
            prune(model, "wanda-sp", 0.3, calibration=WINDOWS)
            save(model, place / name, tokenizer=number_tokenizer)
    figures = [{"of": "wikitext2", "metric": "perplexity", "value": 12.5}]
    (place / "eval.json").write_text(json.dumps({"results": figures}))
    source = Path(probeprune.__file__).parent.parent
    paths = os.pathsep.join([str(source), str(Path(__file__).parent)])
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "hub_session.py"), str(place)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
        timeout=540,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_what_is_pushed_opens_by_its_name_and_computes_the_same(session):
    assert session["pushed"][0] == session["again"][0] == 0
    assert session["same"] == [True, True, "probe"]
    assert session["private"] == ["me/kept"] and len(session["commits"]) == 3
    assert {"attached.json", "statistics.safetensors", "model.safetensors"} <= set(
        session["files"]["me/kept"]
    )
    assert "keeps a model with method 'probe' attached" in session["dense"]
    assert session["texts"] == ["one two", "three"]


def test_the_card_names_what_a_trained_model_was_pruned_from_and_what_a_multimodal_one_reads(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "pruned_gemma3"}')
    record = {"base_model": "pruned", "pruning": {"base_model": "them/dense"}, "evaluation": None}
    (tmp_path / "training.json").write_text(json.dumps(record))
    card = ModelCard(hub_card(tmp_path, "me/trained", []))
    assert card.data.base_model == "them/dense" and card.data.pipeline_tag == "image-text-to-text"


def test_the_card_has_the_metadata_that_the_hub_reads(session):
    card = ModelCard(session["card"])
    assert card.data.base_model == "them/dense" and "probeprune" in card.data.tags
    (result,) = card.data.eval_results
    assert (result.dataset_type, result.metric_type, result.metric_value) == (
        "Salesforce/wikitext",
        "perplexity",
        12.5,
    )
    assert 'probeprune.load_model("me/kept")' in card.text and "`probeprune generate me/kept" in card.text


@pytest.mark.parametrize(
    "what, sentence",
    [
        ("no token", "there is no token of the hub to write with; run `hf auth login`"),
        ("wrong token", "the hub does not know the token for me/kept"),
        ("not mine", "this token may not write to you/kept"),
        ("no name", "is no name of a repository"),
        ("no owner", "names no owner; write owner/name"),
        ("no model", "holds no model"),
        ("public", "me/cut is there already and is public"),
        ("unreachable", "the hub could not be reached for me/other"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(session, what, sentence):
    code, error = session[what]
    assert code == 2 and sentence in error and error.count("probeprune: ") == 1 and "Traceback" not in error


def test_a_reference_that_others_cannot_open_is_not_pushed(tmp_path, number_tokenizer):
    model = FAMILIES["llama-gqa"]()
    with attach(model, "full-batch", 0.3) as handle:
        save(handle, tmp_path / "out", weights="reference", base_model=str(tmp_path / "base"))
    with pytest.raises(UsageError, match="which others do not have"):
        probeprune.push(tmp_path / "out", "me/out")
    (tmp_path / "no.json").write_text("{}")
    with pytest.raises(UsageError, match="is no file of `probeprune eval --json`"):
        save(model, tmp_path / "dense")
        probeprune.push(tmp_path / "dense", "me/out", results=tmp_path / "no.json")
