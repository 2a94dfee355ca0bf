"""`recover` towards the dense model, as a command: whom it learns from, what it writes, what it refuses."""

import json
from types import SimpleNamespace

import forked
import pytest
import torch
from forked import in_two
from test_training_commands import arguments, call
from tiny import FAMILIES, opened, token_ids
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from probeprune import compose, find_blocks, prune, save
from probeprune.jobs.teachers import dense_name


def tiny_model():
    """A tiny model that reads the windows perplexity is measured on."""
    model = FAMILIES["llama-gqa"]()
    model.config.max_position_embeddings = 512
    return model


@pytest.fixture(scope="module")
def files(tmp_path_factory, number_tokenizer):
    folder = tmp_path_factory.mktemp("distilling")
    save(tiny_model(), folder / "dense", tokenizer=number_tokenizer)
    model = tiny_model()
    done = prune(model, compose("random", skip_layers=1), 0.3)
    record = {"base_model": str(folder / "dense"), **done.record()}
    save(model, folder / "pruned", tokenizer=number_tokenizer, record=record)
    save(model, folder / "lost", tokenizer=number_tokenizer, record={**record, "base_model": "./not-here"})
    save(model, folder / "nameless", tokenizer=number_tokenizer, record=done.record())
    words = {str(i): (i + 1) % 126 for i in range(126)} | {"[UNK]": 126, "</s>": 127}
    shifted = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    shifted.pre_tokenizer = pre_tokenizers.Whitespace()
    other = PreTrainedTokenizerFast(tokenizer_object=shifted, unk_token="[UNK]")
    save(tiny_model(), folder / "other-tokens", tokenizer=other)
    lines = [" ".join(str(i) for i in row) for row in token_ids(40, 30).tolist()]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in lines))
    (folder / "test.txt").write_text("\n".join(lines * 40))
    return folder


def short(files, model, out, *more):
    return arguments(files, "recover", model, out, "--warmup-steps", 1, *more)


def test_a_pruned_model_learns_from_the_dense_one_by_default(files, tmp_path, capsys):
    out = tmp_path / "out"
    assert call(*short(files, "pruned", out, "--merge", "--windows", 2, "--json")) == 0
    printed = capsys.readouterr()
    record = json.loads(printed.out)
    assert record["loss"] == "distill" and record["teacher"] == str(files / "dense")
    assert record["training"]["distillation"] == {"direction": "forward", "temperature": 1.0, "top_k": None}
    assert record["tokens"] == 4 * 8 * 16 and record["held_out_loss"][1] < record["held_out_loss"][0]
    agreements = record["evaluation"]["agreement"]
    assert agreements["after"]["divergence"] < agreements["before"]["divergence"]
    assert 0 < agreements["before"]["top1"] < 1
    card = (out / "README.md").read_text()
    assert "forward KL divergence to " in card and "all tokens, temperature 1" in card
    assert f"| tokens seen | {record['tokens']:,} |" in card and "are those of the teacher before" in card
    # What came out is known to come from the same dense model.
    assert call(*short(files, out, tmp_path / "again", "--no-lora", "--steps", 1, "--json")) == 0
    assert json.loads(capsys.readouterr().out)["teacher"] == str(files / "dense")


def test_consumers_alone_with_all_options(files, tmp_path, capsys):
    out = tmp_path / "out"
    more = ["--kl", "mixed", "--temperature", 2, "--top-k", 20, "--consumers", "--windows", 2]
    assert call(*short(files, "nameless", out, "--teacher", files / "dense", *more)) == 0
    printed = capsys.readouterr()
    assert "agreement with" in printed.out and "nats from" in printed.err
    record = json.loads((out / "training.json").read_text())
    assert record["training"]["distillation"] == {"direction": "mixed", "temperature": 2.0, "top_k": 20}
    card = (out / "README.md").read_text()
    assert "the output maps of all blocks" in card
    assert "mixed KL divergence to " in card and "the 20 likeliest tokens, temperature 2" in card
    one, two = opened(files / "nameless"), opened(out)
    consumers = {f"{b.members[-1].name}.weight" for b in find_blocks(one)}
    changed = {k for k, v in one.state_dict().items() if not v.equal(two.state_dict()[k])}
    assert changed == consumers


def test_the_text_is_learnt_where_no_dense_model_is_known_or_it_is_asked_for(files, tmp_path, capsys):
    for i, (model, more) in enumerate((("nameless", []), ("dense", []), ("pruned", ["--loss", "text"]))):
        assert call(*short(files, model, tmp_path / str(i), "--steps", 1, "--json", *more)) == 0
        record = json.loads(capsys.readouterr().out)
        assert record["loss"] == "text" and "teacher" not in record
        assert "cross-entropy of the text" in (tmp_path / str(i) / "README.md").read_text()


@pytest.mark.parametrize(
    ("model", "more", "says"),
    [
        ("pruned", ["--loss", "tekst"], "unknown loss 'tekst'; did you mean 'text'?"),
        ("pruned", ["--kl", "backward"], "unknown direction 'backward'"),
        ("pruned", ["--temperature", "0"], "--temperature must be a number in (0, 1000], not 0"),
        (
            "pruned",
            ["--loss", "text", "--top-k", "3"],
            "no dense model to follow: leave --top-k out",
        ),
        ("nameless", ["--loss", "distill"], "no record says which dense model"),
        ("dense", ["--kl", "reverse"], "no record says which dense model"),
        ("lost", [], "could not be opened"),
        ("pruned", ["--teacher", "OTHER"], "have different tokenizers ('0' is id"),
        ("pruned", ["--batch-size", "4000"], "fewer than one step of 4000"),
    ],
)
def test_bad_input_is_one_sentence(model, more, says, files, tmp_path, capsys):
    more = [files / "other-tokens" if m == "OTHER" else m for m in more]
    assert call(*short(files, model, tmp_path / "out", *more)) == 2
    error = capsys.readouterr().err
    assert says in error and "Traceback" not in error and error.strip().count("\n") == 0
    assert not (tmp_path / "out").exists()


def test_two_processes_give_what_one_gives(files, tmp_path):
    more = ["--dropout", 0.0, "--merge", "--windows", 2]
    assert call(*short(files, "pruned", tmp_path / "one", *more)) == 0
    together = short(files, "pruned", tmp_path / "two", *more, "--json")
    (first, output, errors), (second, *_) = in_two(forked.command, *together)
    assert (first, second) == (0, 0), errors[-3000:]
    record = json.loads(output)
    assert record["processes"] == 2 and record["loss"] == "distill"
    one, two = (opened(tmp_path / name).state_dict() for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5)


def test_the_dense_model_is_found_through_cuts_and_trainings(tmp_path):
    def write(name, file, record):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / file).write_text(json.dumps(record))

    cut = {"removed_share": 0.2, "method": {"name": "flap"}}
    trained = {
        **{k: 1 for k in ("steps", "best_step", "tokens", "seconds", "peak_memory")},
        "corpus": "c4",
        "held_out_loss": [],
        "training": {"batch_size": 1, "length": 2, "learning_rate": 0.1},
    }
    write("first", "pruning.json", {**cut, "base_model": "owner/dense"})
    first = str(tmp_path / "first")
    write("recovered", "training.json", {**trained, "base_model": first, "pruning": cut})
    recovered = str(tmp_path / "recovered")

    def found(pruning=None, training=None):
        return dense_name(SimpleNamespace(pruning=pruning, training=training))

    assert found({**cut, "base_model": "owner/dense"}) == "owner/dense"
    assert found({**cut, "base_model": first}) == "owner/dense"
    assert found({**cut, "base_model": recovered}) == "owner/dense"
    assert found(training={**trained, "base_model": first, "pruning": cut}) == "owner/dense"
    during = {**trained, "removed_share": 0.2, "method": "loraprune, while training"}
    assert found(training={**during, "base_model": "owner/other"}) == "owner/other"
    assert found() is None and found(cut) is None
    assert found(training={**trained, "base_model": "owner/dense", "pruning": None}) is None
    write("first", "pruning.json", {**cut, "base_model": first})  # a circle ends
    assert found({**cut, "base_model": first}) == first
