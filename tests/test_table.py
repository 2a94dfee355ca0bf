"""A whole table on a tiny model: failures are rows, a kill loses nothing, a Ray cluster gives the same."""

import json
import os
import signal
import sys
from pathlib import Path

import forked
import pytest
from forked import Forked
from tiny import write_model_and_text

from probeprune.cli import app, run
from probeprune.errors import Notice, UsageError
from probeprune.experiment.executors import Cluster, _room, run_on_ray
from probeprune.experiment.measuring import failure
from probeprune.experiment.presets import load_preset
from probeprune.experiment.results import RESULTS, Results
from probeprune.experiment.run import run_cells
from probeprune.experiment.workbench import Workbench
from probeprune.model import loading
from probeprune.model.blocks import find_layers
from probeprune.model.hidden_states import Room
from probeprune.model.placing import Placing
from probeprune.progress import silent
from probeprune.report import summarise

TIMED = {
    "seconds",
    "tokens_per_second",
    "peak_memory",
    "versions",
    "threads",
    "training",
    "prefill",
    "decode",
    "stages",
    "memory_over_dense",
    "calibration_seconds",
}
"""What differs from run to run."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, number_tokenizer):
    """A tiny model, a text and a preset for them."""
    where = tmp_path_factory.mktemp("table")
    text = write_model_and_text(where, number_tokenizer)
    (where / "own.yaml").write_text(
        f"models: [{where / 'model'}]\n"
        "methods:\n"
        "  - dense\n"
        "  - {base: probe, name: probe, skip_layers: 1}\n"
        "  - {base: wanda-sp, name: wanda-sp, skip_layers: 1}\n"
        "  - {base: random+lora, name: random+lora, skip_layers: 1}\n"
        "ratios: [0.2, 0.4]\n"
        "seeds: [0, 1]\n"
        f"calibration: {{corpus: {text}, windows: 8, length: 16}}\n"
        f"training: {{steps: 4, batch_size: 2, length: 16, corpus: {text}, seeds: [0]}}\n"
        "texts:\n"
        f"  - {{corpus: {text}, windows: 4, length: 16, batch_size: 2}}\n"
    )
    return where


def comparable(rows) -> list[dict]:
    """The rows in a fixed order, without what is timed; figures to a few digits (threads differ)."""
    kept = []
    for row in rows:
        own = {k: v for k, v in row.items() if k not in TIMED}
        own["value"] = round(row["value"], 3) if row["kind"] == "result" else None
        own["losses"] = [round(x, 3) for x in row.get("losses", [])]
        own.pop("standard_error", None)
        kept.append(own)
    return sorted(kept, key=lambda r: r["key"])


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """The lines of an unbroken local run."""
    out = tmp_path_factory.mktemp("whole")
    assert run(lambda: app(["table", *arguments(folder, out)])) == 0
    return comparable(Results.open(out).rows.values())


def arguments(folder: Path, out: Path) -> list[str]:
    return ["--preset", str(folder / "own.yaml"), "--out", str(out), "--dtype", "float32"]


def test_the_grid_is_complete(whole, folder):
    names = sorted((r["name"], r["ratio"], r["seed"]) for r in whole)
    both = [(n, r, s) for n in ("probe", "wanda-sp") for r in (0.2, 0.4) for s in (0, 1)]
    assert names == sorted([("dense", 0.0, 0), *both, ("random+lora", 0.2, 0), ("random+lora", 0.4, 0)])
    assert all(r["kind"] == "result" for r in whole)
    assert len({r["value"] for r in whole}) == len(whole), "every cell is a model of its own"


def test_killed_twice_it_ends_in_the_same_table(folder, whole, tmp_path):
    """The second kill meets a run that goes on from the first."""
    call = ["table", *arguments(folder, tmp_path / "out")]
    file, lines = tmp_path / "out" / RESULTS, 0
    for _ in range(2):
        process = Forked(forked.command, *call)
        process.until(lambda before=lines: file.exists() and file.read_bytes().count(b"\n") > before)
        process.send(signal.SIGKILL)
        assert process.ended()[0] == -signal.SIGKILL
        lines = file.read_bytes().count(b"\n")
    assert lines < len(whole), "killed too late to show anything"
    assert run(lambda: app(call)) == 0
    results = Results.open(tmp_path / "out")
    assert comparable(results.rows.values()) == whole
    assert results.path.read_bytes().count(b"\n") == len(whole), "measured twice"


def test_a_cell_that_fails_is_a_line_and_is_tried_again(folder, tmp_path, capsys):
    out = tmp_path / "out"
    broken = (folder / "own.yaml").read_text().replace("ratios: [0.2, 0.4]", "ratios: [0.2, 0.95]")
    (tmp_path / "broken.yaml").write_text(broken)
    call = ["table", "--preset", str(tmp_path / "broken.yaml"), "--out", str(out), "--dtype", "float32"]
    assert run(lambda: app(call)) == 1, "scripts notice that cells failed"
    rows = list(Results.open(out).rows.values())
    failed = [r for r in rows if r["kind"] == "failure"]
    assert {(r["name"], r["ratio"]) for r in failed} >= {("probe", 0.95), ("wanda-sp", 0.95)}
    assert all("use at most" in r["error"] or "without units" in r["error"] for r in failed)
    assert any(r["kind"] == "result" and r["name"] == "probe" for r in rows)
    table = (out / "table.md").read_text()
    assert "use at most" in table or "without units" in table
    before = len((out / RESULTS).read_bytes().splitlines())
    assert run(lambda: app(call)) == 1, "scripts notice that cells failed"
    assert len((out / RESULTS).read_bytes().splitlines()) == before + len(failed)


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ("{base: wanda-sp, name: late, skip_layers: 5}", "skip_layers=5 leaves none of the model's 5 layers"),
        ("{base: probe, name: late, skip_layers: 7}", "skip_layers=7 leaves none of the model's 5 layers"),
        ("{base: random+lora, name: late, skip_layers: 9}", "skip_layers=9 leaves none"),
    ],
)
def test_a_method_that_a_model_takes_at_no_ratio_is_named_by_its_line_before_any_work(
    method, says, folder, tmp_path, capsys
):
    text = (folder / "own.yaml").read_text().replace("  - dense\n", f"  - dense\n  - {method}\n")
    (tmp_path / "own.yaml").write_text(text)
    call = ["table", "--preset", str(tmp_path / "own.yaml"), "--out", str(tmp_path / "out")]
    assert run(lambda: app(call)) == 2
    error = capsys.readouterr().err
    assert f"line 4 of {tmp_path / 'own.yaml'}: method 'late' cannot prune" in error and says in error
    assert error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_failure_says_once_what_kind_of_error_it_was(folder):
    cell = load_preset(str(folder / "own.yaml")).cells("float32", "cpu")[0]
    assert failure(cell, RuntimeError("no memory\nmore"))["error"] == "RuntimeError: no memory"
    assert failure(cell, UsageError("Too short."))["error"] == "Too short."


def test_a_failure_joins_the_results_of_its_method(folder, whole):
    cells = load_preset(str(folder / "own.yaml")).cells("float32", "cpu")
    failures = [failure(cell, UsageError("Too short.")) for cell in cells]
    entries = [entry.title for summary in summarise(whole) for entry in summary.entries]
    (summary,) = summarise([*whole, *failures])
    assert [entry.title for entry in summary.entries] == entries
    assert all(entry.failures for entry in summary.entries)


def test_a_model_that_cannot_be_opened_fails_its_cells_alone(folder, tmp_path, capsys):
    models = f"models: [{folder / 'none.gguf'}, {folder / 'model'}]\n"
    text = (folder / "own.yaml").read_text()
    (tmp_path / "two.yaml").write_text(models + text.split("\n", 1)[1].replace("seeds: [0, 1]", "seeds: [0]"))
    call = ["table", "--preset", str(tmp_path / "two.yaml"), "--out", str(tmp_path / "out")]
    assert run(lambda: app([*call, "--dtype", "float32"])) == 1
    rows = Results.open(tmp_path / "out").rows.values()
    assert {r["kind"] for r in rows if "none.gguf" in r["model"]} == {"failure"}
    assert {r["kind"] for r in rows if "none.gguf" not in r["model"]} == {"result"}


def test_ray_gives_the_same_lines_though_a_worker_is_killed(folder, whole, tmp_path):
    cells = load_preset(str(folder / "own.yaml")).cells("float32", "cpu")
    results = Results.open(tmp_path)
    two = Cluster(workers=2, gpus=0, memory=2 << 30)
    workers: list[int] = []
    killed: list[int] = []

    def kill_one(cell, row):
        if not killed:
            os.kill(workers[0], signal.SIGKILL)
            killed.append(workers[0])

    rows = run_on_ray(tmp_path, results, cells, cluster=two, started=workers.extend, done=kill_one)
    assert len(workers) == 2 and killed
    assert comparable(rows) == whole
    # And what is there is not measured again.
    again = run_on_ray(tmp_path, Results.open(tmp_path), cells, cluster=two, started=pytest.fail)
    assert comparable(again) == whole and results.path.read_bytes().count(b"\n") == len(whole)


def test_a_cell_that_no_node_of_a_cluster_can_hold_is_refused_at_once(folder, tmp_path):
    cells = load_preset(str(folder / "own.yaml")).cells("float32", "cpu")
    much = Cluster(workers=1, gpus=2, memory=1 << 60)
    with pytest.raises(
        UsageError, match=r"no node .* has 1 CPU, 2 GPU, 1073741824\.00 GiB of memory .*there"
    ):
        run_on_ray(tmp_path, Results.open(tmp_path), cells, cluster=much)
    assert not (tmp_path / RESULTS).exists()


def test_a_cluster_has_room_for_so_many_workers():
    nodes = [{"CPU": 4, "GPU": 1, "memory": 8 << 30}, {"CPU": 2, "memory": 64 << 30}]
    assert _room(nodes, Cluster().resources("cpu"), 6) == 6
    assert _room(nodes, Cluster(gpus=0.1).resources("cpu"), 4) == 4, "a node's CPUs are fewer than its tenths"
    with pytest.warns(Notice, match="room for 1 of 2 workers"):
        assert _room(nodes, Cluster().resources("cuda"), 2) == 1
    with pytest.warns(Notice, match="room for 3 of 9 workers"):
        assert _room(nodes, Cluster(memory=7 << 30).resources("cpu"), 9) == 3
    with pytest.raises(UsageError, match="there is: 2 CPU, 0 GPU; 4 CPU, 1 GPU"):
        _room(nodes, Cluster(gpus=2).resources("cpu"), 1)
    with pytest.raises(UsageError, match="give --cell-gpus above 0"):
        Cluster(gpus=0).resources("cuda")
    with pytest.raises(UsageError, match="none is alive"):
        _room([], Cluster().resources("cpu"), 1)


def test_a_worker_opens_models_within_what_it_asked_for():
    assert Cluster(memory=3 << 30).opening("cpu") == {"memory": 3 << 30}
    assert Cluster(memory=3 << 30, gpus=1).opening("cuda") == {}, "memory is that of the machine, not the GPU"
    assert Cluster(gpus=2).opening("cuda") == {"device_map": "auto"}


@pytest.fixture
def on_disk(monkeypatch):
    """Models are opened with all layers on disk; what they are opened for is rehearsed."""

    def place(name, shape, dtype, device, memory, work, *rest):
        assert memory == 3 << 30 and {p.name for p in work(shape, dtype, device)} >= {"logits (dense)"}
        layers = {f"model.layers.{i}": "disk" for i in range(len(find_layers(shape)))}
        whole = {
            "model.embed_tokens": "cpu",
            "model.norm": "cpu",
            "model.rotary_emb": "cpu",
            "lm_head": "cpu",
        }
        return Placing({**whole, **layers}, Room(4000))

    monkeypatch.setattr(loading, "place", place)


def test_layers_on_disk_give_the_same_figures(folder, whole, on_disk, tmp_path, capsys):
    """All but those of methods that train, which fail with the reason."""
    command = ["table", "--preset", str(folder / "own.yaml"), "--out", str(tmp_path / "out"), "--json"]
    options = ["--memory", "3GiB", "--dtype", "float32", "--device", "cpu"]
    assert run(lambda: app([*command, *options])) == 1
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    found = {(r["name"], r["ratio"], r["seed"]): r for r in rows}
    for row in whole:
        own = found[row["name"], row["ratio"], row["seed"]]
        if "lora" in row["name"]:
            assert "training needs all weights in memory" in own["error"]
        else:
            assert own["value"] == pytest.approx(row["value"], rel=1e-5), row["name"]


def test_compare_times_nothing_on_disk_and_refuses_to_train(folder, on_disk, tmp_path, capsys):
    command = ["compare", str(folder / "model"), "--corpus", str(folder / "text.jsonl"), "--ratios", "0.3"]
    command += ["--windows", "4", "--calibration", str(folder / "text.jsonl"), "--calibration-windows", "8"]
    command += ["--length", "16", "--memory", "3GiB", "--dtype", "float32", "--skip-layers", "1"]

    def call(methods: str) -> int:
        out = ["--out", str(tmp_path / "out"), "--json", "--methods", methods]
        return run(lambda: app([*command, *out]))

    assert call("dense,wanda-sp,probe,random+lora") == 2
    error = capsys.readouterr().err
    assert "random+lora 30%: training needs all weights in memory" in " ".join(error.split())
    assert call("dense,wanda-sp,probe,best-dynamic") == 0
    shown = capsys.readouterr()
    rows = [json.loads(line) for line in shown.out.splitlines() if line.startswith("{")]
    assert {r["metric"] for r in rows} == {"perplexity"} and len(rows) == 4
    assert "nothing is timed, because the layers are on disk" in " ".join(shown.err.split())


def test_ray_that_is_not_there(folder, tmp_path, monkeypatch):
    cells = load_preset(str(folder / "own.yaml")).cells("float32", "cpu")
    with pytest.raises(UsageError, match="no Ray cluster answers"):
        run_on_ray(tmp_path, Results.open(tmp_path), cells, cluster=Cluster("127.0.0.1:1"))
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r'needs ray, .*pip install "probeprune\[ray\]"'):
        run_on_ray(tmp_path, Results.open(tmp_path), cells)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--preset", "papr"], "did you mean 'paper'"),
        (["--executor", "rey"], "did you mean 'ray'"),
        (["--ratios", "1.5"], "--ratios must be a number in [0, 1), not 1.5"),
        (["--seeds", "x"], "--seeds must be a whole number from 0 to 4294967295, not 'x'"),
        (["--ratios", "x"], "--ratios must be a number in [0, 1), not 'x'"),
        (["--workers", "0"], "--workers"),
        (["--executor", "ray", "--no-keep-trained"], "--executor local"),
        (["--cell-gpus", "1"], "add --executor ray"),
        (["--executor", "ray", "--memory", "6GiB"], "leave --memory out"),
        (["--memory", "6"], "--memory '6' is no size"),
        (["--executor", "ray", "--cell-gpus", "1.5"], "a part of one GPU or a whole number of them, not 1.5"),
        (["--executor", "ray", "--cell-gpus", "-1"], "--cell-gpus must be a number of GPUs in [0, 4096]"),
        (["--executor", "ray", "--cell-memory", "much"], "--cell-memory 'much' is no size"),
    ],
)
def test_bad_input_is_one_sentence(more, says, tmp_path, capsys):
    assert run(lambda: app(["table", "--out", str(tmp_path / "out"), *more])) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_preset_is_shown(capsys):
    assert run(lambda: app(["table", "--preset", "laptop", "--show"])) == 0
    assert "models: [smollm2-135m]" in capsys.readouterr().out


def test_a_local_run_uses_an_open_bench(folder, whole, tmp_path):
    cells = load_preset(str(folder / "own.yaml")).cells("float32", "cpu")[:2]
    bench = Workbench(tmp_path, silent)
    rows = run_cells(bench, Results.open(tmp_path), cells)
    assert comparable(rows) == [r for r in whole if r["key"] in {c.key for c in cells}]
