"""Presets: a file becomes cells, and every mistake in it is reported with its line."""

from dataclasses import replace
from pathlib import Path

import pytest

from probeprune.data.windows import CALIBRATION
from probeprune.errors import UsageError
from probeprune.evaluation.task_data import TASKS
from probeprune.experiment.cells import CostMeasure, TaskMeasure, TextMeasure, TrainingBudget
from probeprune.experiment.presets import MeasureGroup, load_preset, preset_names, published
from probeprune.methods import METHODS
from probeprune.strategies.compensation import Bias, Compensation, Refit
from probeprune.strategies.criteria import Gradients
from probeprune.strategies.probe import Probe
from probeprune.strategies.probe_every_batch import ProbeEveryBatch
from probeprune.strategies.refit_every_batch import RefitEveryBatch
from probeprune.strategies.schedule import DuringTraining, Never
from probeprune.training.settings import Training

GOOD = """\
models: [smollm2-135m]
methods:
  - dense
  - probe
  - {base: probe, name: wide-probe, when: {probe: {tokens: 0.9}}, skip_layers: 1}
  - flap+lora
  - {base: best-static, name: half-refit, compensation: {share: 0.5, damping: [0.1, 0.3]}}
ratios: [0.2, 0.4]
seeds: [0, 1]
calibration: {corpus: c4, windows: 8, length: 64}
training: {steps: 5, batch_size: 2, length: 32, seeds: [0]}
texts:
  - {corpus: wikitext2, windows: 4, length: 64}
tasks:
  names: [boolq, piqa]
  limit: 3
  seeds: [0]
cost: {rounds: 1, seeds: [1]}
"""


def preset(tmp_path: Path, text: str):
    file = tmp_path / "own.yaml"
    file.write_text(text)
    return load_preset(str(file))


def test_cells_are_the_grid_and_parts_take_their_seeds(tmp_path):
    cells = preset(tmp_path, GOOD).cells("float32", "cpu")
    assert len(set(cells)) == len(cells)

    def count(kind, name, seed):
        return sum(
            isinstance(c.measure, kind) and c.subject.method.name == name and c.subject.seed == seed
            for c in cells
        )

    assert [count(TextMeasure, "dense", s) for s in (0, 1)] == [1, 0], "the dense model has no seed"
    assert [count(TaskMeasure, "dense", s) for s in (0, 1)] == [2, 0]
    assert [count(CostMeasure, "dense", s) for s in (0, 1)] == [1, 0], "but every part has the dense model"
    assert [count(TextMeasure, "probe", s) for s in (0, 1)] == [2, 2]
    assert [count(TaskMeasure, "probe", s) for s in (0, 1)] == [4, 0]
    assert [count(CostMeasure, "probe", s) for s in (0, 1)] == [0, 2]
    assert [count(TextMeasure, "flap+lora", s) for s in (0, 1)] == [2, 0]
    assert count(CostMeasure, "flap+lora", 0) + count(CostMeasure, "flap+lora", 1) == 0, (
        "what is trained costs what its widths cost"
    )
    wide = next(c.subject.method for c in cells if c.subject.method.name == "wide-probe")
    assert wide.when.probe.tokens == 0.9 and wide.skip_layers == 1
    assert wide.when == replace(METHODS["probe"].when, probe=wide.when.probe)
    assert wide.when.probe == replace(METHODS["probe"].when.probe, tokens=0.9)
    refit = next(c.subject for c in cells if c.subject.method.name == "half-refit").method.refit
    assert refit == replace(METHODS["best-static"].refit, share=0.5, damping=(0.1, 0.3))
    trained = [i for i, c in enumerate(cells) if c.subject.seed == 0 and c.subject.budget is not None]
    untrained = [i for i, c in enumerate(cells) if c.subject.seed == 0 and c.subject.budget is None]
    assert min(trained) > max(untrained), "training takes the dense model's place, so it comes last"


@pytest.mark.parametrize(
    ("wrong", "right", "line", "says"),
    [
        ("calibratoin:", "calibration:", 10, "unknown key 'calibratoin'; did you mean 'calibration'?"),
        ("  - prob\n", "  - probe\n", 4, "unknown method 'prob'; did you mean 'probe'?"),
        ("tokns: 0.9", "tokens: 0.9", 5, "did you mean 'tokens'?"),
        (
            "tokens: 9",
            "tokens: 0.9",
            5,
            "methods.when.probe.tokens: tokens must be a number in (0, 1], not 9.0.",
        ),
        ("name: wide-probe, ", "", 5, None),
        ("base: prob,", "base: probe,", 5, "did you mean 'probe'?"),
        ("share: half", "share: 0.5", 7, "methods.compensation.share: expected a number, not 'half'"),
        ("shar: 0.5", "share: 0.5", 7, "did you mean 'share'?"),
        (
            "share: 5.0",
            "share: 0.5",
            7,
            "methods.compensation.share: share must be a number in [0, 1], not 5.0.",
        ),
        ("damping: 0.1", "damping: [0.1, 0.3]", 7, "methods.compensation.damping: expected a list"),
        ("allocation: globl, skip_layers", "skip_layers", 5, "did you mean 'global'?"),
        ("[0.2, 1.4]", "[0.2, 0.4]", 8, "ratios: ratio must be a number in [0, 1), not 1.4"),
        ("[0.2, many]", "[0.2, 0.4]", 8, "expected a number, not 'many'"),
        ("seeds: [0, 1]\ncalibration", "seeds: []\ncalibration", 9, None),
        ("[boolq, pica]", "[boolq, piqa]", 15, "did you mean 'piqa'?"),
        ("widnows: 4", "windows: 4", 13, "did you mean 'windows'?"),
        ("steps: 0", "steps: 5", 11, "training.steps: steps must be a whole number of steps from 1 to"),
        ("round: 1", "rounds: 1", 18, "did you mean 'rounds'?"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(wrong, right, line, says, tmp_path):
    # Where `says` is None, the right text is the one to be put in: something that must not be missing.
    broken = GOOD.replace(wrong, right) if says is None else GOOD.replace(right, wrong)
    assert broken != GOOD
    with pytest.raises(UsageError) as error:
        preset(tmp_path, broken)
    assert f"line {line} of {tmp_path / 'own.yaml'}: " in str(error.value)
    assert says is None or says in str(error.value)


def method(tmp_path: Path, text: str):
    """The method that a preset describes by this text."""
    rest = "ratios: [0.2]\ntraining: {steps: 1, batch_size: 1}\ncost: {}\n"
    return preset(tmp_path, f"models: [m]\nmethods:\n  - {text}\n{rest}").methods[0]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("{base: best-static, when: refit}", {"when": RefitEveryBatch()}),
        ("{base: best-static, when: {kind: refit, share: 0.5}}", {"when": RefitEveryBatch(share=0.5)}),
        (
            "{base: ppsp, when: {kind: probe, probe: {tokens: 0.25}}}",
            {"when": ProbeEveryBatch(Probe(tokens=0.25))},
        ),
        ("{base: probe-reuse, when: {decay: 0.5}}", {"when": ProbeEveryBatch(Probe(reuse=1024), decay=0.5)}),
        (
            "{base: best-dynamic, when: {probe: {min_size: 64}}}",
            {"when": RefitEveryBatch(replace(RefitEveryBatch().probe, min_size=64))},
        ),
        ("{base: dense, when: {recovery: true}}", {"when": Never(recovery=True)}),
        ("{base: loraprune, when: training}", {"when": DuringTraining()}),
        ("{base: ppsp, compensation: {kind: least-squares, share: 0.5}}", {"compensation": Refit(share=0.5)}),
        ("{base: best-static, compensation: {share: 0.5}}", {"compensation": Refit(share=0.5)}),
        ("{base: wanda-sp, compensation: bias}", {"compensation": Bias()}),
        ("{base: flap, compensation: none}", {"compensation": Compensation()}),
        ("{base: llm-pruner, gradients: {length: 32}}", {"gradients": Gradients(length=32)}),
        ("{base: loraprune, gradients: {draws: 1}}", {"gradients": Gradients(length=512, draws=1)}),
        (
            "{base: ppsp, importance: lora-guided, gradients: {draws: 1}}",
            {"importance": "lora-guided", "gradients": Gradients(length=512, draws=1)},
        ),
    ],
)
def test_records_inside_a_method_are_read_by_their_type(written, expected, tmp_path):
    base = METHODS[written.split("base: ")[1].split(",")[0]]
    named = written.replace("{base:", "{name: mine, base:", 1)
    assert method(tmp_path, named) == replace(base, name="mine", **expected)


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ("{base: ppsp, when: often}", "methods.when: unknown when 'often'"),
        ("{base: ppsp, when: {kind: prob}}", "unknown when 'prob'; did you mean 'probe'?"),
        ("{base: ppsp, when: {probe: {tokens: 0.5}}}", "unknown key 'probe'"),
        ("{base: ppsp, when: {kind: probe, tokens: 0.5}}", "unknown key 'tokens'"),
        (
            "{base: ppsp, when: {kind: probe, probe: {tokens: 5.0}}}",
            "methods.when.probe.tokens: tokens must be a number in (0, 1], not 5.0.",
        ),
        (
            "{base: best-static, when: {kind: refit, share: 1.0}}",
            "methods.when.share: share must be a number in (0, 1), not 1.0.",
        ),
        ("{base: ppsp, when: refit}", "give compensation=Refit()"),
        ("{base: ppsp, when: [probe]}", "methods.when: expected 'key: value' pairs"),
        ("{base: ppsp, compensation: bais}", "unknown compensation 'bais'; did you mean 'bias'?"),
        ("{base: ppsp, compensation: {share: 0.5}}", "unknown key 'share'"),
        ("{base: ppsp, gradients: {length: 32}}", "takes no gradients"),
        (
            "{base: llm-pruner, gradients: {length: 1}}",
            "methods.gradients.length: length must be a whole number of tokens from 2",
        ),
    ],
)
def test_a_mistake_in_a_record_inside_a_method_has_its_line(written, says, tmp_path):
    with pytest.raises(UsageError) as error:
        method(tmp_path, written.replace("{base:", "{name: mine, base:", 1))
    assert f"line 3 of {tmp_path / 'own.yaml'}: " in str(error.value)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("models: [a\nmethods: b", "is not YAML"),
        ("", "is empty"),
        ("models: [m]\nmethods: [dense]\nratios: [0.2]\n", "nothing is measured"),
        ("models: [m]\nmethods: [dense]\n", "there is no 'ratios'"),
        ("models: [m]\nmodels: [n]\n", "line 2 .* comes twice"),
        ("- a\n", "expected 'key: value' pairs"),
        (GOOD.replace("training:", "# training:"), "flap.lora train: add 'training'"),
    ],
)
def test_files_that_are_no_preset(text, says, tmp_path):
    with pytest.raises(UsageError, match=says):
        preset(tmp_path, text)


def test_names_that_are_no_preset():
    with pytest.raises(UsageError, match="did you mean 'paper'"):
        load_preset("papr")
    with pytest.raises(UsageError, match=r"no preset file 'none\.yaml'"):
        load_preset("none.yaml")


def test_a_preset_of_few_words_has_the_defaults_of_its_records(tmp_path):
    short = "models: [m]\nmethods: [flap+lora]\nratios: [0.2]\ntexts: [{}]\n"
    loaded = preset(tmp_path, short + "training: {}\n")
    assert loaded.calibration == CALIBRATION and loaded.seeds == (0,) and loaded.training_seeds is None
    assert loaded.groups == (MeasureGroup((TextMeasure(),)),)
    budget = loaded.budget
    assert (budget.steps, budget.batch_size, budget.length) == (600, 64, 256) and budget.learning_rate == 1e-4
    assert budget.training(seed=3) == Training(evaluate_every=150, seed=3), "LLM-Pruner's proportions"
    loaded = preset(tmp_path, short + "training: {steps: 5}\ncalibration: {windows: 8}\n")
    assert loaded.calibration == replace(CALIBRATION, windows=8) and loaded.budget == TrainingBudget(steps=5)
    loaded = preset(tmp_path, short + "training: {}\ncalibration: {beside: [wikitext2-valid]}\n")
    assert loaded.calibration == replace(CALIBRATION, beside=("wikitext2-valid",))
    with pytest.raises(UsageError, match="beside: unknown corpus 'wikitext3'; did you mean 'wikitext2'"):
        preset(tmp_path, short + "training: {}\ncalibration: {beside: [wikitext3]}\n")


def test_the_packages_presets_hold_the_published_rows():
    rows = {"dense", "full-batch", "wanda-sp", "flap", "loraprune", "loraprune+lora"}
    rows |= {"llm-pruner", "llm-pruner+lora", "probe"}
    assert {"paper", "laptop"} <= set(preset_names())
    for name in ("paper", "laptop"):
        loaded = load_preset(name)
        assert rows <= {m.name for m in loaded.methods} and loaded.seeds == (0, 1, 2)
        tasks = {m.task for g in loaded.groups for m in g.measures if isinstance(m, TaskMeasure)}
        assert tasks == set(TASKS)
    assert load_preset("paper").ratios == (0.2, 0.4, 0.6)
    figures = published()
    assert figures["meta-llama/Llama-2-7b-hf", "probe", 0.4] == {"perplexity": 16.8, "accuracy": 56.6}
    assert {m for _, m, _ in figures} <= set(METHODS)
