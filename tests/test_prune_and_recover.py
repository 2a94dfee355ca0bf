"""`prune --recover`: a cut and the training behind it in one command, stopped and started again anywhere."""

import importlib
import json

import pytest
import torch
from test_distill_commands import files  # noqa: F401
from test_training_commands import call
from tiny import opened

from probeprune import find_blocks, load_model
from probeprune.jobs import recovered
from probeprune.jobs.teachers import dense_name


def arguments(files, out, *more):  # noqa: F811
    text = files / "text.jsonl"
    sizes = ["--length", 16, "--calibration-windows", 8, "--windows", 2, "--batch-size", 4, "--recover", 3]
    texts = ["--calibration", text, "--corpus", files / "test.txt", "--train-text", text]
    texts.append("--no-train-packing")  # their tokenizer has no token for it
    method = [
        "--method",
        "wanda-sp",
        "--ratio",
        0.3,
        "--layout",
        "per-layer",
        "--skip-layers",
        1,
        "--round-to",
        4,
    ]
    command = ("prune", files / "dense", "--out", out, *method, *sizes, *texts, "--dtype", "float32", *more)
    return [str(a) for a in command]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Sequences that the tiny text has."""
    monkeypatch.setattr(importlib.import_module("probeprune.cli.prune"), "SEQUENCE", 16)


@pytest.mark.parametrize("lora", [False, True])
def test_the_result_is_trained_and_says_how_it_was_made(lora, files, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "out"
    assert call(*arguments(files, out, "--json", *["--train-lora"] * lora)) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["training"]["lora"] is not None) == (out / "adapter").exists() == lora
    assert record["base_model"] == record["teacher"] == str(files / "dense") and record["loss"] == "distill"
    assert record["steps"] == 3 and record["held_out_loss"][1] < record["held_out_loss"][0]
    assert record["pruning"]["method"]["name"] == "wanda-sp"
    assert record["evaluation"]["agreement"].keys() == {"before", "after"}
    units = [b.units for b in find_blocks(opened(out))]
    assert units == [len(k["units"]) for k in record["pruning"]["kept"].values()]
    assert str(tmp_path) not in (out / "README.md").read_text(), "no folder that is gone"
    assert {f.name for f in tmp_path.iterdir()} <= {"out", ".out.lock"}
    # It can be trained on, and its teacher is known.
    assert dense_name(load_model(str(out))) == str(files / "dense")


@pytest.mark.parametrize("where", ["trained", "written"])
def test_stopped_and_started_again(where, files, tmp_path, monkeypatch, capsys):  # noqa: F811
    assert call(*arguments(files, tmp_path / "whole")) == 0
    out = tmp_path / "out"

    def stopped(*_: object, **__: object):
        raise KeyboardInterrupt

    place = (recovered, "recover_to") if where == "trained" else (recovered, "discard")
    with monkeypatch.context() as patched:
        patched.setattr(*place, stopped)
        assert call(*arguments(files, out)) == 130
    capsys.readouterr()
    assert (tmp_path / "out.pruned/model.safetensors").exists()
    if where == "trained":
        assert call(*arguments(files, out, "--seed", 1)) == 2
        assert "holds the model of a run with other settings" in capsys.readouterr().err
        monkeypatch.setattr(recovered, "prune_to", pytest.fail)
        assert call(*arguments(files, out)) == 0
    else:  # the result was there already
        assert call(*arguments(files, out)) == 2
        assert "not empty" in capsys.readouterr().err
    assert not (tmp_path / "out.pruned").exists()
    one, two = (opened(tmp_path / name).state_dict() for name in ("whole", "out"))
    assert all(torch.equal(two[name], value) for name, value in one.items())


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--recover", "-1"], "--recover must be a whole number of steps"),
        (["--recover", "0", "--train-lora"], "give --recover STEPS too"),
        (
            ["--method", "probe", "--layout", "uniform"],
            "trains a smaller checkpoint, and method 'probe' cuts no weights",
        ),
        (["--out", "x.gguf"], "--out names a GGUF file"),
        (["--device-map", "auto"], "leave --device-map out"),
        (["--train-text", "nothing-here"], "nothing-here"),
    ],
)
def test_bad_input_is_one_sentence(more, says, files, tmp_path, capsys):  # noqa: F811
    assert call(*arguments(files, tmp_path / "out", *more)) == 2
    error = capsys.readouterr().err
    assert says in " ".join(error.split()) and "Traceback" not in error
    assert not list(tmp_path.iterdir())
