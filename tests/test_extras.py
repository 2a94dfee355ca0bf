"""The core works without any extra, and what needs one says so in one sentence that names it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import SHAPE, write_model_and_text
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import probeprune
from probeprune.foreign.extras import EXTRAS, MissingExtra, extra, missing, need

ROOT = Path(__file__).parent.parent
BLOCKED = sorted({module for one in EXTRAS.values() for module in one.modules})

WITHOUT = f"""
import importlib.metadata, sys
blocked, version = {BLOCKED!r}, importlib.metadata.version
for module in blocked:
    sys.modules[module] = None

def version_without(name):
    if name.replace("-", "_") in blocked:
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)

importlib.metadata.version = version_without
"""

CORE = """
import torch
import probeprune
from probeprune.data.corpora import load_corpus
from probeprune.data.windows import calibration_windows

loaded = probeprune.load_model("model")
windows = calibration_windows(load_corpus("text.jsonl"), loaded.tokenizer, count=4, length=16, seed=0)
ids = torch.arange(1, 5)[None]
with probeprune.attach(loaded.model, "probe", ratio=0.2, calibration=windows):
    assert loaded.model.generate(ids, max_new_tokens=3, min_new_tokens=3).shape[1] == 7
probeprune.prune(loaded.model, "wanda-sp", ratio=0.2, calibration=windows)
probeprune.save(loaded.model, "cut", tokenizer=loaded.tokenizer)
probeprune.load_model("cut")
"""

COMMANDS = """
import contextlib, io, json, runpy
import probeprune.lm_eval
from probeprune.cli import app, run
from probeprune.foreign.extras import MissingExtra

said = {}
for words in json.load(open("commands.json")):
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        code = run(lambda: app(words))
    said[" ".join(words)] = code, errors.getvalue()
with contextlib.redirect_stderr(io.StringIO()) as errors:
    try:
        runpy.run_module("probeprune.lm_eval", run_name="__main__")
    except SystemExit as end:
        said["-m probeprune.lm_eval"] = end.code, errors.getvalue()
try:
    probeprune.lm_eval.PrunedLM
except MissingExtra as error:
    said["PrunedLM"] = 2, f"probeprune: {error}"
print(json.dumps(said))
"""

SMALL = "--calibration text.jsonl --calibration-windows 2 --length 16"
GRID = "--methods dense,probe --ratios 0.2 --speed-rounds 0 --corpus text.jsonl --windows 2"
PRUNE = "prune model --method wanda-sp --ratio 0.2 --layout per-layer"
WORKS = {
    f"compare model {GRID} {SMALL} --out runs": "figures",
    "report runs": "figures",
    f"{PRUNE} --windows 0 {SMALL} --out pruned": None,
    f"generate model --method probe --ratio 0.2 --prompt 7 --max-new-tokens 2 {SMALL}": None,
    "plan model --method wanda-sp --ratio 0.2 --layout per-layer": None,
    f"prune model --method probe --ratio 0.2 --weights reference --windows 0 {SMALL} --out kept": None,
    f"eval kept --base model --texts text.jsonl --windows 2 --prompts 0 {SMALL}": None,
    "methods": None,
    "models": None,
    "engines": None,
}
"""Commands that work without any extra, and what they say they leave out."""

SAYS = {
    "recover pruned --out recovered": "train",
    "loraprune model --ratio 0.2 --out loraprune": "train",
    f"compare model --methods wanda-sp+lora --corpus text.jsonl --windows 2 {SMALL} --out other": "train",
    "table --preset tasks.yaml --out table": "eval",
    f"eval model --texts none --tasks piqa --limit 2 {SMALL}": "eval",
    f"eval model --texts none --tasks mmlu --limit 2 {SMALL}": "eval",
    "table --preset text.yaml --executor ray --out cluster": "ray",
    f"{PRUNE} --recover 2 --out never": "train",
    "-m probeprune.lm_eval": "eval",
    "PrunedLM": "eval",
    f"{PRUNE} --calibration rows.parquet --out never": "hub",
    f"{PRUNE} --calibration owner/name --out never": "hub",
}
"""Commands that end with a sentence, and the extra that it names."""

PYTHON = ("-m probeprune.lm_eval", "PrunedLM")
"""Those that are no commands: the harness with our model type, and the type itself."""

UPLOADS = "push pruned owner/name"
"""A command that needs no extra, and a token, which is not there."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("extras")
    backend = Tokenizer(models.WordLevel({str(number): number for number in range(SHAPE["vocab_size"])}, "0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    write_model_and_text(folder, PreTrainedTokenizerFast(tokenizer_object=backend))
    (folder / "rows.parquet").write_bytes(b"PAR1")
    grid = (
        "models: [model]\nmethods: [dense]\nratios: [0.2]\nseeds: [0]\n"
        "calibration: {corpus: text.jsonl, windows: 2, length: 16}\n"
    )
    (folder / "tasks.yaml").write_text(f"{grid}tasks: {{names: [piqa], limit: 2}}\n")
    texts = "texts: [{corpus: text.jsonl, windows: 2, length: 16, batch_size: 2}]\n"
    (folder / "text.yaml").write_text(grid + texts)
    return folder


def run(folder: Path, script: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT + script], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_core_and_commands_work_without_extras_or_name_the_one_they_need(folder, monkeypatch):
    commands = [words for words in (*WORKS, *SAYS, UPLOADS) if words not in PYTHON]
    (folder / "commands.json").write_text(json.dumps([words.split() for words in commands]))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN_PATH", str(folder / "no-token"))
    printed = run(folder, CORE + COMMANDS)
    said = json.loads(printed.splitlines()[-1])
    for words, leaves_out in WORKS.items():
        code, errors = said[words]
        assert code == 0, (words, errors)
        assert ("no figures: " in errors) == (leaves_out == "figures"), (words, errors)
    for words, name in SAYS.items():
        code, errors = said[words]
        sentence = errors.splitlines()[-1]
        assert code == 2 and sentence.startswith("probeprune: "), (words, errors)
        assert f'pip install "probeprune[{name}]"' in sentence and "Traceback" not in errors, (words, errors)
    assert said[UPLOADS][0] == 2 and "there is no token of the hub" in said[UPLOADS][1]
    assert not (folder / "never").exists() and not (folder / "recovered").exists()


def test_every_extra_is_an_optional_dependency_of_the_package():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for one in EXTRAS.values():
        (packages,) = re.findall(rf"^{one.name} = \[(.*)\]$", text, re.MULTILINE)
        for module in one.modules:
            assert f'"{module.replace("_", "-")}' in packages
    (everything,) = re.findall(r'^all = \["probeprune\[(.*)\]"\]$', text, re.MULTILINE)
    assert everything.split(",") == list(EXTRAS)


def test_only_the_modules_of_an_extra_are_said_to_be_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert missing("train") == ["peft"] and not missing("report")
    need("report")
    with pytest.raises(MissingExtra, match=r'^training needs peft, .*"probeprune\[train\]"`\.$'):
        need("train")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"), extra("train"):
        import no_such_module  # noqa: F401
    with pytest.raises(ValueError, match="did you mean 'train'"):
        need("trian")
    assert issubclass(MissingExtra, probeprune.UsageError)
