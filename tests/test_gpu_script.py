"""The script for a GPU runs from end to end on a CPU, so that the first GPU it meets gives figures."""

import json
import sys
from pathlib import Path

import pytest
import torch

from probeprune.runtime import compiled

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import gpu


def call(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--shapes", "tiny", *arguments])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    return int(ended.value.code or 0)


def test_every_part_gives_figures(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    monkeypatch.setattr(compiled, "missing_compiler", lambda device: None)
    assert call(monkeypatch, "--out", str(tmp_path)) == 0
    lines = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    named = {line["part"].partition(",")[0] for line in lines}
    assert named == {
        *("machine", "checks", "speed", "compiled", "captured", "parallel probe", "time to prune"),
    }
    assert not any("failed" in line for line in lines)
    assert [line["method"] for line in lines if line["part"] == "compiled, tiny"] == [
        *("dense", "wanda-sp", "probe", "best-dynamic"),
    ]
    checked = {line["method"]: line for line in lines if line["part"] == "checks, float32"}
    assert checked["probe"]["choices"] > 1 and checked["probe"]["error"] < 1e-5
    assert capsys.readouterr().out == (tmp_path / "gpu.md").read_text()


def test_a_part_that_fails_is_a_line_and_ends_with_one(monkeypatch, tmp_path, capsys):
    def damaged(*_: object) -> torch.Tensor:
        raise RuntimeError("a kernel is missing")

    monkeypatch.setattr(gpu, "masked", damaged)
    monkeypatch.setattr(gpu, "load", damaged)
    assert call(monkeypatch, "--out", str(tmp_path)) == 1
    assert capsys.readouterr().out.count("RuntimeError: a kernel is missing") == 7


def test_a_wrong_result_fails(monkeypatch):
    monkeypatch.setattr(gpu, "masked", lambda model, kept, ids: model(ids, use_cache=False).logits)
    found = list(gpu.checks(torch.float32, torch.device("cpu")))
    assert {f["method"]: f.get("failed") for f in found} == {
        "wanda-sp": "wrong: error",
        "probe": "wrong: error",
        "best-dynamic": None,
    }


def test_a_budget_that_is_spent_leaves_parts_out(monkeypatch, tmp_path, capsys):
    assert call(monkeypatch, "--out", str(tmp_path), "--minutes", "0") == 1
    assert capsys.readouterr().out.count("not begun within 0 minutes") == 7
