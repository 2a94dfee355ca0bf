"""Ranges of numbers: one statement, the same refusal from records, functions, presets and commands."""

import dataclasses
import inspect
import math
import typing

import numpy
import pytest
import torch
from tiny import FAMILIES, token_ids

import probeprune
from probeprune import Gradients, Method, Probe, ProbeEveryBatch, Refit, RefitEveryBatch, WindowSource
from probeprune.bench.measure import GridPoint
from probeprune.cli import app, run
from probeprune.data import windows
from probeprune.data.windows import Text
from probeprune.errors import BadValue, UsageError
from probeprune.evaluation.perplexity import perplexity
from probeprune.evaluation.tasks import TaskSettings
from probeprune.experiment.cells import (
    CostMeasure,
    Setting,
    TaskMeasure,
    TextMeasure,
    TrainingBudget,
    subject,
)
from probeprune.jobs.generate import Decoding
from probeprune.jobs.prune import Texts
from probeprune.methods import METHODS
from probeprune.ranges import RANGES, Range, check, check_fields, plain
from probeprune.training.loraprune import LoraPruneCut
from probeprune.training.settings import Lora, Training

TEXT = Text("c4", 1)
RECORDS = (
    *(Method("x"), Probe(), ProbeEveryBatch(), RefitEveryBatch(), Refit(), Gradients(), Training(), Lora()),
    *(TEXT, TextMeasure(), TaskMeasure("piqa"), CostMeasure(), TaskSettings(), TrainingBudget()),
    *(Decoding(), GridPoint(1, 1), LoraPruneCut(0.2), Texts(TEXT, TEXT), WindowSource([], None)),
)


def bad_values(allowed: Range) -> list[object]:
    """Values outside of a range, or no numbers at all."""
    beyond = [
        allowed.least if allowed.open_least else allowed.least - 1,
        allowed.most if allowed.open_most else allowed.most + 1,
        *(math.nan, math.inf, -math.inf, 10**30, -(10**30), 10**5000),
        *("1", b"1", [], [1], {}, True, False, 1j, object(), numpy.nan, numpy.bool_(True)),
        *(torch.tensor([0.5, 0.5]), torch.tensor([1]), torch.tensor(math.nan), torch.tensor(True)),
        *(numpy.array([1]), torch.empty((), device="meta")),
    ]
    return [*beyond, 1.7, numpy.float32(2.5), torch.tensor(1.5)] if allowed.whole else beyond


def ranged(record) -> dict[str, Range]:
    """The fields of a record that have a range."""
    own = {f.name: f"{type(record).__name__}.{f.name}" for f in dataclasses.fields(record)}
    keys = {name: key if key in RANGES else name for name, key in own.items()}
    return {name: RANGES[key] for name, key in keys.items() if key in RANGES}


FIELDS = [(r, name, allowed) for r in RECORDS for name, allowed in ranged(r).items()]


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: type(r).__name__)
def test_every_number_of_a_settings_record_has_a_range(record):
    hints = typing.get_type_hints(type(record))
    numbers = {name for name, hint in hints.items() if {int, float} & {hint, *typing.get_args(hint)}}
    numbers &= {f.name for f in dataclasses.fields(record)}
    assert numbers == ranged(record).keys() and numbers


@pytest.mark.parametrize(
    ("record", "name", "allowed"), FIELDS, ids=[f"{type(r).__name__}.{n}" for r, n, _ in FIELDS]
)
def test_a_record_refuses_what_is_outside(record, name, allowed):
    many = isinstance(getattr(record, name), tuple)
    for value in bad_values(allowed):
        with pytest.raises(BadValue) as refusal:
            dataclasses.replace(record, **{name: (value,) if many else value})
        sentence = str(refusal.value)
        assert sentence.startswith(f"{name} must be {allowed}, not ") and len(sentence) < 250
        assert refusal.value.name == name


def test_numbers_of_other_libraries_are_numbers():
    made = Method("x", skip_layers=numpy.int64(2), round_to=torch.tensor(8), seed=3.0)
    assert made == Method("x", skip_layers=2, round_to=8, seed=3)
    assert {type(v) for v in (made.skip_layers, made.round_to, made.seed)} == {int}
    refit = Refit(damping=[numpy.float64(0.25), torch.tensor(0.5)], share=1, sequential=True)
    assert refit == Refit(damping=(0.25, 0.5), share=1.0) and type(refit.share) is float
    assert hash(refit) == hash(Refit(damping=(0.25, 0.5), share=1.0))
    assert plain("ratio", torch.tensor(0.25, dtype=torch.bfloat16)) == 0.25


MODEL, IDS = FAMILIES["llama"], token_ids(4, 8, seed=1)


@pytest.mark.parametrize("ratio", [torch.tensor(0.25), numpy.float32(0.25), numpy.array(0.25)])
def test_a_ratio_of_another_library_prunes_as_the_plain_one(ratio):
    kept = probeprune.prune(MODEL(), "magnitude", 0.25)
    assert probeprune.prune(MODEL(), "magnitude", ratio) == kept and type(kept.ratio) is float
    with probeprune.attach(MODEL(), "magnitude", ratio) as handle:
        assert type(handle.ratio) is float and handle.ratio == 0.25
    prepared = probeprune.prepare(MODEL(), "magnitude", ratio, IDS)
    assert prepared.methods == ((METHODS["magnitude"], 0.25),)


UNCHANGED = MODEL()
CALLS = {
    "prune ratio": ("ratio", lambda v: probeprune.prune(UNCHANGED, "magnitude", v)),
    "prune steps": ("prune.steps", lambda v: probeprune.prune(UNCHANGED, "magnitude", 0.5, steps=v)),
    "prune batch": ("batch_size", lambda v: probeprune.prune(UNCHANGED, "magnitude", 0.5, batch_size=v)),
    "attach ratio": ("ratio", lambda v: probeprune.attach(UNCHANGED, "magnitude", v)),
    "attach batch": ("batch_size", lambda v: probeprune.attach(UNCHANGED, "magnitude", 0.5, batch_size=v)),
    "prepare batch": ("batch_size", lambda v: probeprune.prepare(UNCHANGED, "ppsp", 0.5, IDS, batch_size=v)),
    "perplexity": ("batch_size", lambda v: perplexity(UNCHANGED, IDS, batch_size=v)),
    "batches": ("batch_size", lambda v: windows.batches(IDS, v)),
    "subject": ("seed", lambda v: subject(Setting("m", "float32", "cpu"), METHODS["random"], 0.5, v)),
    "calibration count": (
        "count",
        lambda v: windows.calibration_windows([], None, count=v, length=2, seed=0),
    ),
    "calibration seed": (
        "seed",
        lambda v: windows.calibration_windows([], None, count=1, length=2, seed=v),
    ),
    "training length": ("length", lambda v: windows.training_windows([], None, length=v)),
    "evaluation limit": ("limit", lambda v: windows.evaluation_windows([], None, length=2, limit=v)),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_function_refuses_what_is_outside(call):
    name, function = CALLS[call]
    for value in bad_values(RANGES[name]):
        with pytest.raises(BadValue, match=f"{name.rpartition('.')[2]} must be a"):
            function(value)


def test_several_ratios_are_each_checked():
    with pytest.raises(BadValue, match=r"ratio must be a number in \[0, 1\), not nan"):
        probeprune.prepare(MODEL(), "ppsp", [0.2, math.nan], IDS)


def test_evaluations_hold_out_a_twenty_fifth_of_the_sequences_between_two_bounds():
    sizes = ((600, 64), (100, 64), (1, 4))
    assert [Training(steps=n, batch_size=b).evaluate_windows for n, b in sizes] == [800, 256, 16]
    assert Training(evaluate_windows=7).evaluate_windows == 7


def test_a_warm_up_is_a_sixth_of_the_steps_and_never_longer_than_they_are():
    assert Training().warmup_steps == 100 and Training(steps=5).warmup_steps == 0
    with pytest.raises(UsageError, match="warmup_steps 6 is more than the 5 steps; lower it"):
        Training(steps=5, warmup_steps=6)


def test_a_published_mean_needs_a_full_batch():
    with pytest.raises(UsageError, match="3 windows are fewer than batch_size 4"):
        TextMeasure(windows=3, batch_size=4, averaging="published")


def test_ranges_end_on_both_sides_and_say_so():
    for name, allowed in RANGES.items():
        assert math.isfinite(allowed.least) and allowed.least < allowed.most < math.inf, name
        assert not any(v in allowed for v in (math.nan, math.inf, -math.inf, 2**63)), name
    assert str(RANGES["windows"]) == "a whole number of windows from 1 to 1000000"
    assert [str(RANGES[n]) for n in ("top_p", "ratio", "decay", "held_out")] == [
        "a number in (0, 1]",
        "a number in [0, 1)",
        "a number in [0, 1]",
        "a number in (0, 1)",
    ]
    check("prune", steps=1000, seed=None)
    with pytest.raises(BadValue, match="steps must be a whole number of steps from 1 to 1000, not 1001"):
        check("prune", steps=1001)
    check(steps=1001)


def test_a_record_without_numbers_is_left_as_it_is():
    check_fields(dataclasses.make_dataclass("Named", [("name", str)])("x"))


# -- the command line --------------------------------------------------------------------------------

NUMBERS = {int, float, int | None}
OPTIONS = [
    (command.name or command.callback.__name__, f"--{name.replace('_', '-')}", parameter.annotation)
    for command in app.registered_commands
    for name, parameter in inspect.signature(command.callback).parameters.items()
    if getattr(parameter.annotation, "__origin__", None) in NUMBERS
]
NEEDED = {
    "prune": ["--method", "random", "--ratio", "0.5"],
    "plan": ["--method", "random", "--ratio", "0.5"],
    "loraprune": ["--ratio", "0.5"],
    "recover": ["m"],
    "generate": ["--prompt", "a"],
}


def test_every_number_of_every_command_shows_its_range():
    assert len(OPTIONS) > 40
    for command, option, annotation in OPTIONS:
        shown = annotation.__metadata__[0].help
        assert any(f" {word} " in shown for word in ("From", "In", "At least")), (command, option)


def called(command: str, option: str, value: str, folder) -> int:
    out = [] if command in ("generate", "plan", "eval") else ["--out", str(folder / "out")]
    return run(lambda: app([command, *NEEDED.get(command, []), *out, option, value]))


@pytest.mark.parametrize(
    ("command", "option", "annotation"), OPTIONS, ids=[f"{c} {o}" for c, o, _ in OPTIONS]
)
def test_a_command_refuses_what_is_outside(command, option, annotation, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    beyond = ["-1", str(10**30)]
    if annotation.__origin__ is float:
        beyond += ["nan", "inf", "-inf", "1e300"]
    for value in beyond:
        assert called(command, option, value, tmp_path) == 2
        error = capsys.readouterr().err
        assert f"{option} must be a" in error and error.count("\n") == 1, error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "option", "value", "says"),
    [
        ("table", "--seeds", "1.7", "--seeds must be a whole number from 0 to 4294967295, not '1.7'"),
        ("table", "--seeds", "-1", "--seeds must be a whole number from 0 to 4294967295, not -1"),
        ("table", "--seeds", str(2**64), "not 18446744073709551616"),
        ("table", "--seeds", "nan", "--seeds must be a whole number"),
        ("table", "--seeds", "1,,2", "--seeds '1,,2' has an empty entry"),
        ("table", "--ratios", "nan", "--ratios must be a number in [0, 1), not nan"),
        ("table", "--ratios", "0.2,0.2", "--ratios '0.2,0.2' has an entry twice"),
        ("table", "--models", "a,a", "--models 'a,a' has an entry twice"),
        ("compare", "--train-batch-size", "0", "--train-batch-size must be a whole number of sequences"),
        ("compare", "--train-length", "0", "--train-length must be a whole number of tokens from 2"),
        ("compare", "--train-tokens", "-5", "--train-tokens must be a whole number of tokens from 1"),
        ("compare", "--device", "cpu:7", "'cpu:7'"),
        ("compare", "--device", "meta", "'meta'"),
        ("bench", "--batch-sizes", "1,inf", "--batch-sizes must be a whole number of sequences"),
        ("bench", "--threads", "99999", "--threads must be a whole number of threads from 0 to 4096"),
        (
            "prune",
            "--steps",
            "1000000",
            "--steps must be a whole number of steps from 1 to 1000, not 1000000",
        ),
        ("recover", "--dropout", "1.0", "--dropout must be a number in [0, 1), not 1.0"),
        ("recover", "--alpha", "0", "--alpha must be a whole number from 1"),
        ("recover", "--rank", "100000", "--rank must be a whole number from 1 to 8192, not 100000"),
        ("recover", "--warmup-steps", "601", "warmup_steps 601 is more than the 600 steps; lower it"),
        ("recover", "--patience", "0", "--patience must be a whole number of evaluations from 1"),
    ],
)
def test_what_commands_once_took(command, option, value, says, tmp_path, capsys):
    assert called(command, option, value, tmp_path) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1, error
    assert not (tmp_path / "out").exists()


def test_signatures_of_calls_are_covered_by_their_names():
    # A new number of `prune`, `attach` or `prepare` needs a range too.
    for function in (probeprune.prune, probeprune.attach, probeprune.prepare):
        hints = typing.get_type_hints(function)
        names = {n for n in inspect.signature(function).parameters if hints.get(n) in (int, float)}
        assert names <= {"ratio", "steps", "batch_size"}
