"""The results file: resumable at any point, refused for another run, and the table made from it alone."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from probeprune import report
from probeprune.errors import UsageError
from probeprune.experiment import RESULTS, Cell, Results, Settings, grid
from probeprune.methods import METHODS

SETTINGS = Settings(model="m", dtype="float32", device="cpu", windows=4)


def row(method: str, ratio: float, losses: list[float], flops: float = 1.0) -> dict:
    mean = sum(losses) / len(losses)
    return {
        "kind": "result",
        "name": method,
        "method": json.loads(json.dumps(dataclasses.asdict(METHODS[method]))),
        "ratio": ratio,
        "removed_share": ratio,
        "task": "text",
        "value": 2.718281828459045**mean,
        "standard_error": 0.5,
        "losses": losses,
        "flops_per_token": flops,
        "probe_flops_share": 0.015 if method == "probe" else 0.0,
        "tokens_per_second": 100 / flops,
        "peak_memory": 2**30,
    }


def test_grid_measures_dense_once_and_nothing_twice():
    methods = [METHODS["dense"], METHODS["probe"], METHODS["probe"]]
    cells = grid(methods, [0.2, 0.4])
    assert [c.label for c in cells] == ["dense", "probe 20%", "probe 40%"]
    with pytest.raises(UsageError, match="outside"):
        grid(methods, [0.2, 1.0])


def test_results_are_found_again_after_reopening(tmp_path):
    results = Results.open(tmp_path, SETTINGS)
    results.add(row("probe", 0.2, [1.0, 2.0]))
    again = Results.open(tmp_path, SETTINGS)
    assert again.find(Cell(METHODS["probe"], 0.2)) == results.rows[0]
    assert again.find(Cell(METHODS["probe"], 0.4)) is None
    other = dataclasses.replace(METHODS["probe"], skip_layers=1)
    assert again.find(Cell(other, 0.2)) is None, "a method with other parameters is another cell"


def test_a_line_cut_short_by_a_kill_is_dropped_and_the_file_goes_on(tmp_path):
    results = Results.open(tmp_path, SETTINGS)
    results.add(row("dense", 0.0, [1.0, 2.0]))
    whole = (tmp_path / RESULTS).read_bytes()
    (tmp_path / RESULTS).write_bytes(whole + whole[-40:-20])
    again = Results.open(tmp_path, SETTINGS)
    assert len(again.rows) == 1
    again.add(row("probe", 0.2, [1.0, 2.0]))
    assert len(Results.read(tmp_path / RESULTS).rows) == 2


def test_another_runs_file_is_refused_and_untouched(tmp_path):
    Results.open(tmp_path, SETTINGS).add(row("dense", 0.0, [1.0, 2.0]))
    before = (tmp_path / RESULTS).read_bytes()
    with pytest.raises(UsageError, match=r"windows was 4 and is now 8.*another --out"):
        Results.open(tmp_path, dataclasses.replace(SETTINGS, windows=8))
    assert (tmp_path / RESULTS).read_bytes() == before
    (tmp_path / RESULTS).write_text("hello\n")
    with pytest.raises(UsageError, match="not a results file"):
        Results.open(tmp_path, SETTINGS)
    assert (tmp_path / RESULTS).read_text() == "hello\n"


def test_paired_error_is_that_of_the_differences():
    # Windows differ by 3 nats, methods by exactly 0.1: the paired difference is certain.
    a, b = row("dense", 0.0, [1.0, 4.0, 2.0]), row("probe", 0.4, [1.1, 4.1, 2.1])
    factor, error = report.paired_factor(b, a)
    assert factor == pytest.approx(1.1051709)
    assert error == pytest.approx(0, abs=1e-9)


def test_table_and_plot_say_what_the_lines_say(tmp_path):
    rows = [
        row("probe", 0.4, [1.2, 4.0], flops=0.6),
        row("dense", 0.0, [1.0, 4.0]),
        row("wanda-sp", 0.4, [1.9, 4.4], flops=0.6),
    ]
    lines = [line for line in report.markdown(rows, "t").splitlines() if line.startswith("|")]
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| dense", "| wanda-sp", "| probe"]
    probe = lines[-1].split(" | ")
    assert (
        probe[1:3] == ["40%", "40.0%"]
        and probe[4].startswith("1.105")
        and probe[5:8] == ["60.0%", "1.5%", "1.67x"]
    )
    files = report.plot(rows, "t", tmp_path / "plot")
    assert [f.suffix for f in files] == [".png", ".svg"]
    assert files[0].read_bytes().startswith(b"\x89PNG") and b"probe" in files[1].read_bytes()
    assert report.plot(rows[:1], "t", tmp_path / "none") == [], "nothing to compare with"


COMMAND = [sys.executable, "-c", "from probeprune.cli import main; main()", "compare", "smollm2-135m"]
SMALL = ["--methods", "dense,random,probe", "--ratios", "0.3", "--windows", "4", "--length", "32"]
SMALL += ["--batch-size", "4", "--calibration-windows", "8", "--dtype", "float32"]


@pytest.mark.real
def test_compare_killed_half_way_ends_in_the_same_table(tmp_path, smollm2):
    def compare(out: Path) -> list[str]:
        done = subprocess.run([*COMMAND, *SMALL, "--out", str(out)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        # Timings and memory differ from run to run; everything else must not.
        lines = (out / "table.md").read_text().splitlines()
        return [line.rsplit(" | ", 2)[0] for line in lines if line.startswith("|")]

    whole = compare(tmp_path / "whole")
    broken = tmp_path / "broken"
    process = subprocess.Popen([*COMMAND, *SMALL, "--out", str(broken)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (broken / RESULTS).exists() or (broken / RESULTS).read_bytes().count(b"\n") < 2:
        assert process.poll() is None and time.monotonic() < deadline, "nothing to kill"
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    first = (broken / RESULTS).read_bytes()
    assert first.count(b"\n") < 4, "killed too late to show anything"
    assert compare(broken) == whole
    assert (broken / RESULTS).read_bytes().startswith(first[: first.rfind(b"\n") + 1]), "measured twice"
