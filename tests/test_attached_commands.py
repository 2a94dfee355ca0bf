"""Folders with a method attached on the command line: `prune` writes them, `generate` runs them."""

import json

import pytest
from tiny import FAMILIES, token_ids

from probeprune import attach, load_model, save
from probeprune.cli import app, run


@pytest.fixture
def place(tmp_path, number_tokenizer, monkeypatch):
    """A folder with a model, a text and an empty cache."""
    monkeypatch.setenv("PROBEPRUNE_CACHE", str(tmp_path / "cache"))
    model = FAMILIES["llama-gqa"]()
    model.resize_token_embeddings(1002)
    model.generation_config.eos_token_id = None
    save(model, tmp_path / "base", tokenizer=number_tokenizer)
    words = " ".join(str(t) for t in token_ids(1, 900, seed=3)[0].tolist())
    (tmp_path / "text.txt").write_text(words)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def prune(*more: str, method: str = "probe") -> int:
    text = "--calibration", "text.txt", "--calibration-windows", "4", "--length", "16"
    measured = "--corpus", "text.txt", "--windows", "3"
    options = "--method", method, "--ratio", "0.3", "--dtype", "float32"
    return run(lambda: app(["prune", "base", *options, *text, *measured, *more]))


def test_prune_writes_a_dynamic_method_that_generate_runs(place, capsys):
    assert prune("--out", "out", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["removed_share"] == pytest.approx(0.3, abs=0.05) and record["weights"] == "copy"
    stored = json.loads((place / "out" / "attached.json").read_text())
    assert stored["corpus"] == "text.txt" and stored["text"]["windows"] == 4
    assert stored["evaluation"]["perplexity"].keys() >= {"dense", "pruned"}
    card = (place / "out" / "README.md").read_text()
    assert "bit for bit" in card and "Perplexity on text.txt" in card
    asked = ["generate", "out", "--prompt", "7 8 9", "--max-new-tokens", "5", "--json"]
    assert run(lambda: app(asked)) == 0
    made = json.loads(capsys.readouterr().out)
    loaded = load_model("base", dtype="float32")
    handle = load_model("out").handle
    assert made["method"]["name"] == "probe" and made["removed_share"] == handle.removed_share
    ids = loaded.tokenizer("7 8 9", return_tensors="pt")
    own = handle.model.generate(**ids, max_new_tokens=5, do_sample=False)[0, 4:]
    assert made["text"] == loaded.tokenizer.decode(own)
    assert run(lambda: app([*asked, "--compare"])) == 0
    assert json.loads(capsys.readouterr().out)["compared"]["tokens_per_second"].keys() == {"dense", "probe"}


def test_a_model_that_is_cut_already_generates_as_it_is(place, capsys):
    assert prune("--out", "cut", "--layout", "per-layer", "--skip-layers", "0", method="wanda-sp") == 0
    asked = ["generate", "cut", "--prompt", "7 8 9", "--max-new-tokens", "5"]
    assert run(lambda: app(asked)) == 0
    shown = capsys.readouterr()
    loaded = load_model("cut")
    ids = loaded.tokenizer("7 8 9", return_tensors="pt")
    own = loaded.model.generate(**ids, max_new_tokens=5, do_sample=False)[0, 4:]
    assert loaded.tokenizer.decode(own).strip() in shown.out
    gone = f"{loaded.pruning['removed_share']:.1%} of the blocks cut for good"
    assert f"{gone}: prefill" in shown.err
    assert run(lambda: app([*asked, "--compare"])) == 2
    more = ["--method", "magnitude", "--ratio", "0.1"]
    assert run(lambda: app([*asked, *more])) == 0
    assert f"{gone}, then magnitude, " in capsys.readouterr().err


def test_a_reference_opens_from_any_folder(place, monkeypatch):
    assert prune("--out", "out", "--weights", "reference") == 0
    (place / "elsewhere").mkdir()
    monkeypatch.chdir(place / "elsewhere")
    assert load_model("../out").handle.method.name == "probe"


@pytest.mark.parametrize(
    "more, method, sentence",
    [
        (("--out", "x.gguf"), "probe", "no GGUF file holds"),
        (("--out", "out", "--layout", "uniform"), "probe", "cuts no weights; leave out --layout"),
        (("--out", "out", "--steps", "2", "--for", "vllm"), "probe", "leave out --for and --steps"),
        (("--out", "out", "--weights", "some"), "probe", "unknown place of weights 'some'"),
        (("--out", "out", "--weights", "copy"), "flap", "--weights is for dynamic methods"),
        (("--out", "base"), "probe", "is not empty"),
    ],
)
def test_what_makes_no_such_folder_is_one_sentence(place, capsys, more, method, sentence):
    before = sorted(p.name for p in place.rglob("*"))
    assert prune(*more, method=method) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("probeprune: ") == 1
    assert sorted(p.name for p in place.rglob("*")) == before


def test_options_that_would_change_the_method_kept_are_refused(place, capsys):
    loaded = load_model("base", dtype="float32")
    with attach(loaded.model, "full-batch", 0.3) as handle:
        save(handle, "out", tokenizer=loaded.tokenizer)
    assert run(lambda: app(["generate", "out", "--prompt", "7", "--ratio", "0.2"])) == 2
    assert "keeps a method of its own; leave out --ratio" in capsys.readouterr().err
    assert run(lambda: app(["prune", "out", "--method", "flap", "--ratio", "0.2", "--out", "more"])) == 2
    assert "keeps a model with method 'full-batch' attached" in capsys.readouterr().err
