"""Every example runs, as a script and with little text, on the first layers of the real model."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

import probeprune
from probeprune.data import windows
from probeprune.methods import METHODS
from probeprune.model.loading import LoadedModel
from probeprune.strategies.importance import IMPORTANCES
from probeprune.surgery import cut

EXAMPLES = Path(__file__).parent.parent / "examples"
SAYS = {
    "generate.py": "again:",
    "prune_and_save.py": "of the blocks' parameters removed",
    "compare.py": "probe",
    "own_method.py": "by deviation",
    "share_of_units.py": "####",
}
"""Every script, and something that it prints."""


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """Eight layers with narrow MLPs, windows of 32 tokens, an empty folder; tables are put back."""
    load, calibration, evaluation = (
        probeprune.load_model,
        windows.calibration_windows,
        windows.evaluation_windows,
    )

    def load_part(name: str) -> LoadedModel:
        loaded = load(name, dtype="float32")
        loaded.model.model.layers = loaded.model.model.layers[:8]
        loaded.model.config.num_hidden_layers = 8
        mlps = [b.name for b in probeprune.find_blocks(loaded.model) if b.kind == "mlp"]
        cut(loaded.model, {name: torch.arange(512) for name in mlps})
        return loaded

    def short_calibration(documents, tokenizer, *, count, length, seed):
        return calibration(documents, tokenizer, count=4, length=32, seed=seed)

    def short_evaluation(documents, tokenizer, *, length, limit):
        return evaluation(documents, tokenizer, length=32, limit=limit)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(probeprune, "load_model", load_part)
    monkeypatch.setattr(windows, "calibration_windows", short_calibration)
    monkeypatch.setattr(windows, "evaluation_windows", short_evaluation)
    monkeypatch.setattr(sys, "argv", ["example"])
    importances, methods = dict(IMPORTANCES), dict(METHODS)
    yield
    for table, before in ((IMPORTANCES, importances), (METHODS, methods)):
        table.clear()
        table.update(before)


def test_every_script_is_run():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(SAYS)


@pytest.mark.real
@pytest.mark.parametrize("name", SAYS)
def test_a_script_runs(name, capsys):
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert SAYS[name] in capsys.readouterr().out


@pytest.mark.real
def test_the_cells_of_the_notebook_run(capsys):
    """In one process, without a kernel: what a cell shows at its end is drawn, as a kernel would."""
    notebook = json.loads((EXAMPLES / "what_a_probe_sees.ipynb").read_text(encoding="utf-8"))
    namespace: dict[str, object] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            exec("".join(cell["source"]), namespace)
            if "figure" in namespace:
                namespace["figure"].savefig("figure.png")
    assert "all batches" in capsys.readouterr().out
