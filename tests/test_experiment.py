"""Cells and results: keyed by what matters, resumable, corrupt lines named; compare with LoRA."""

import json
import signal
from dataclasses import replace
from pathlib import Path

import forked
import pytest
from forked import Forked
from tiny import SHAPE, write_model_and_text
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from probeprune import report
from probeprune.cli import app, run
from probeprune.data.windows import Text
from probeprune.errors import UsageError
from probeprune.experiment.cells import Cell, Setting, TextMeasure, TrainingBudget, grid, subject
from probeprune.experiment.results import RESULTS, Results
from probeprune.methods import METHODS

TEXT = TextMeasure(windows=4)
BUDGET = TrainingBudget(12, 4, 16, 1e-3)


SETTING = Setting("m", "float32", "cpu", Text("c4", 8), BUDGET)


def a_subject(name: str, ratio: float = 0.2, seed: int = 0, **changes):
    return subject(replace(SETTING, **changes), METHODS[name], ratio, seed)


def row(cell: Cell, losses: list[float], flops: float = 1.0) -> dict:
    method = cell.subject.method
    return {
        "kind": "result",
        "key": cell.key,
        "model": "m",
        "name": method.name,
        "method": method.record(),
        "ratio": cell.subject.ratio,
        "seed": cell.subject.seed,
        "training": None,
        "removed_share": cell.subject.ratio,
        "task": "text",
        "metric": "perplexity",
        "value": 2.718281828459045 ** (sum(losses) / len(losses)),
        "standard_error": 0.5,
        "losses": losses,
        "flops_per_token": flops,
        "probe_flops_share": 0.015 if method.name == "probe" else 0.0,
        "tokens_per_second": 100 / flops,
        "peak_memory": 2**30,
    }


def test_a_subject_is_without_what_makes_no_difference_to_it():
    dense = a_subject("dense", seed=3)
    assert (dense.ratio, dense.seed, dense.calibration, dense.budget) == (0.0, 0, None, None)
    assert a_subject("magnitude", seed=3).seed == 0 and a_subject("magnitude").calibration is None
    assert a_subject("probe", seed=3).seed == 3 and a_subject("probe").budget is None
    assert a_subject("random", seed=3).method.seed == 3, "what a method draws follows the seed"
    assert a_subject("dense+lora", seed=3).budget == BUDGET and a_subject("dense+lora", seed=3).seed == 3
    assert a_subject("loraprune+lora").calibration is None, "it takes its gradients while it trains"
    with pytest.raises(UsageError, match="training budget"):
        a_subject("flap+lora", budget=None)
    with pytest.raises(UsageError, match=r"ratio must be a number in \[0, 1\)"):
        a_subject("flap", 1.0)


def test_a_key_changes_with_everything_that_matters_and_nothing_else():
    base = Cell(a_subject("llm-pruner+lora"), TEXT)
    assert base.key == Cell(a_subject("llm-pruner+lora"), TextMeasure(windows=4)).key
    others = [
        Cell(a_subject("llm-pruner+lora", 0.4), TEXT),
        Cell(a_subject("llm-pruner+lora", seed=1), TEXT),
        Cell(a_subject("llm-pruner"), TEXT),
        Cell(a_subject("llm-pruner+lora", calibration=Text("c4", 9)), TEXT),
        Cell(a_subject("llm-pruner+lora", calibration=Text("c4", 8, beside=("own.txt",))), TEXT),
        Cell(a_subject("llm-pruner+lora", budget=TrainingBudget(13, 4, 16, 1e-3)), TEXT),
        Cell(a_subject("llm-pruner+lora", dtype="bfloat16"), TEXT),
        Cell(a_subject("llm-pruner+lora", weights="other"), TEXT),
        Cell(base.subject, replace(TEXT, windows=5)),
        Cell(base.subject, replace(TEXT, batch_size=1)),
    ]
    assert len({c.key for c in (base, *others)}) == 1 + len(others)


def test_grid_measures_dense_once_and_nothing_twice():
    subjects = [a_subject(n, r, seed=s) for n in ("dense", "probe") for r in (0.2, 0.4) for s in (0, 1)]
    labels = [c.subject.label for c in grid(subjects, [TEXT, TEXT])]
    assert labels == ["dense", "probe 20%", "probe 20%", "probe 40%", "probe 40%"]


def test_results_are_found_again_after_reopening_and_a_failure_is_tried_again(tmp_path):
    probe, dense = Cell(a_subject("probe"), TEXT), Cell(a_subject("dense"), TEXT)
    results = Results.open(tmp_path / "new")
    results.add(row(probe, [1.0, 2.0]))
    results.add({"kind": "failure", "key": dense.key, "error": "out of memory"})
    again = Results.open(tmp_path / "new")
    assert again.find(probe) == results.rows[probe.key] and again.find(dense) is None
    again.add(row(dense, [1.0, 2.0]))
    assert Results.open(tmp_path / "new").find(dense)["value"] > 0


def test_a_line_cut_short_by_a_kill_is_dropped_and_a_corrupt_one_named(tmp_path):
    cells = [Cell(a_subject(n), TEXT) for n in ("dense", "probe", "flap")]
    results = Results.open(tmp_path)
    for cell in cells[:2]:
        results.add(row(cell, [1.0, 2.0]))
    file = tmp_path / RESULTS
    whole = file.read_bytes()
    file.write_bytes(b'{"kind": "result", "ke\x00y\n' + whole + whole[-40:-20])
    again = Results.open(tmp_path)
    assert len(again.rows) == 2 and len(again.problems) == 1
    assert f"line 1 of {file} is corrupt" in again.problems[0]
    again.add(row(cells[2], [1.0, 2.0]))
    assert len(Results.open(tmp_path).rows) == 3
    file.write_text("hello\n")
    with pytest.raises(UsageError, match="not a results file"):
        Results.open(tmp_path)
    assert file.read_text() == "hello\n"


def test_paired_error_is_that_of_the_differences():
    # Windows differ by 3 nats, methods by exactly 0.1: the paired difference is certain.
    a = row(Cell(a_subject("dense"), TEXT), [1.0, 4.0, 2.0])
    b = row(Cell(a_subject("probe"), TEXT), [1.1, 4.1, 2.1])
    factor, error = report.paired_factor(b, a)
    assert factor == pytest.approx(1.1051709)
    assert error == pytest.approx(0, abs=1e-9)


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory, number_tokenizer):
    """A tiny model on disk, and texts for it."""
    folder = tmp_path_factory.mktemp("tiny")
    write_model_and_text(folder, number_tokenizer)
    return folder


def words(folder: Path, out: Path, *more: str) -> list[str]:
    text = str(folder / "text.jsonl")
    arguments = ["compare", str(folder / "model"), "--out", str(out), "--dtype", "float32", "--ratios", "0.3"]
    arguments += ["--corpus", text, "--calibration", text, "--calibration-windows", "8", "--windows", "4"]
    arguments += ["--length", "16", "--batch-size", "4", "--train-text", text, "--train-length", "16"]
    arguments += ["--skip-layers", "1", "--train-steps", "6", "--speed-rounds", "0"]
    return [*arguments, *more]


def compare(folder: Path, out: Path, *more: str) -> int:
    return run(lambda: app(words(folder, out, *more)))


def test_compare_trains_where_a_method_says_so_and_says_how_much(tiny_folder, tmp_path, capsys):
    methods = "dense,dense+lora,flap,flap+lora,loraprune+lora"
    assert compare(tiny_folder, tmp_path / "out", "--methods", methods, "--json") == 0
    rows = {r["name"]: r for r in map(json.loads, capsys.readouterr().out.splitlines())}
    assert list(rows) == methods.split(",")
    for name, r in rows.items():
        assert (r["training"] is not None) == name.endswith("+lora")
        if r["training"]:
            assert (r["training"]["steps"], r["training"]["tokens"]) == (6, 6 * 4 * 16)
    # Training leaves the widths alone (FLAP's biases count), and LoRAPrune reaches the same ratio.
    assert rows["flap+lora"]["removed_share"] == pytest.approx(rows["flap"]["removed_share"], abs=2e-3)
    assert rows["loraprune+lora"]["removed_share"] == pytest.approx(0.3, abs=0.02)
    assert rows["flap+lora"]["flops_per_token"] == rows["flap"]["flops_per_token"]
    assert rows["flap+lora"]["value"] != rows["flap"]["value"]
    assert rows["dense+lora"]["value"] < rows["dense"]["value"], "the text is easy to learn"
    # Nothing is trained, or measured, twice.
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "out/trained").rglob("model.safetensors")}
    assert len(before) == 3
    assert compare(tiny_folder, tmp_path / "out", "--methods", methods) == 0
    assert (tmp_path / "out" / RESULTS).read_bytes().count(b"\n") == 5
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "out/trained").rglob("model.safetensors")} == before
    assert "384" in (tmp_path / "out/table.md").read_text(), "the budget stands in the table"


def test_compare_distils_where_a_method_says_so(tiny_folder, tmp_path, capsys):
    methods = "dense,flap,flap+lora,flap+distill"
    more = ["--methods", methods, "--dtype", "float32", "--train-rate", "2e-3", "--train-steps", "30"]
    assert compare(tiny_folder, tmp_path / "out", *more, "--json") == 0
    rows = {r["name"]: r for r in map(json.loads, capsys.readouterr().out.splitlines())}
    assert rows["flap+distill"]["removed_share"] == rows["flap+lora"]["removed_share"]
    assert rows["flap+distill"]["training"]["tokens"] == 30 * 4 * 16
    (record,) = (tmp_path / "out/trained").glob("flap+distill-*/training.json")
    made = json.loads(record.read_text())
    assert (made["loss"], made["teacher"], made["base_model"]) == ("distill", *[rows["flap"]["model"]] * 2)
    losses = [entry["loss"] for entry in made["history"] if "loss" in entry]
    assert len(losses) == 30 and sum(losses[-10:]) < sum(losses[:10])
    assert len({row["value"] for row in rows.values()}) == 4


def test_compare_measures_methods_that_refit_and_refits_once_a_ratio(
    tiny_folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("PROBEPRUNE_CACHE", str(tmp_path / "cache"))
    methods = "dense,best-static,best-dynamic,ppsp"
    assert compare(tiny_folder, tmp_path / "out", "--methods", methods, "--json") == 0
    rows = {r["name"]: r for r in map(json.loads, capsys.readouterr().out.splitlines())}
    assert list(rows) == methods.split(",")
    for name in ("best-static", "best-dynamic", "ppsp"):
        assert rows[name]["removed_share"] == pytest.approx(0.3, abs=0.02)
    assert rows["best-static"]["flops_per_token"] == rows["ppsp"]["flops_per_token"]
    assert rows["best-static"]["value"] != rows["ppsp"]["value"] != rows["best-dynamic"]["value"]
    assert rows["best-dynamic"]["flops_per_token"] > rows["best-static"]["flops_per_token"], (
        "the probe, the refit"
    )
    stored = [f for f in (tmp_path / "cache").rglob("*.safetensors") if b"/units" in f.read_bytes()[:100_000]]
    assert len(stored) == 1


def test_trained_models_go_when_asked(tiny_folder, tmp_path, capsys):
    assert compare(tiny_folder, tmp_path / "out", "--methods", "flap+lora", "--no-keep-trained") == 0
    assert not list((tmp_path / "out").rglob("*.safetensors"))


KILLED = ("--methods", "dense,random,probe", "--speed-rounds", "2")


def test_compare_killed_half_way_ends_in_the_same_table(tmp_path):
    numbers = models.WordLevel({str(number): number for number in range(SHAPE["vocab_size"])}, "0")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(numbers))  # reads the text that is timed
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    write_model_and_text(tmp_path, tokenizer)

    def table(out: Path) -> list[str]:
        assert compare(tmp_path, out, *KILLED) == 0
        # Timings and memory differ from run to run; everything else must not.
        lines = (out / "table.md").read_text().splitlines()
        assert lines[2].endswith("| prefill | memory | KV cache |"), lines[2]
        return [line.rsplit(" | ", 3)[0] for line in lines if line.startswith("|")]

    whole, broken = table(tmp_path / "whole"), tmp_path / "broken"
    rows = [json.loads(line) for line in (tmp_path / "whole" / RESULTS).open()]
    costs = [row for row in rows if row["task"] == "cost"]
    assert [c["name"] for c in costs] == ["dense", "random", "probe"]
    assert all(len(c["prefill"]["speedup_range"]) == 2 and "decode" not in c for c in costs)
    process = Forked(forked.command, *words(tmp_path, broken, *KILLED))
    process.until((broken / RESULTS).exists)
    process.send(signal.SIGKILL)
    assert process.ended()[0] == -signal.SIGKILL
    first = (broken / RESULTS).read_bytes()
    assert first.count(b"\n") < len(rows) / 2, "killed too late to show anything"
    assert table(broken) == whole
    assert (broken / RESULTS).read_bytes().startswith(first[: first.rfind(b"\n") + 1]), "measured twice"
