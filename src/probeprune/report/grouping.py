"""Which result lines belong together, and their labels.

A study is one model in one number type on one device; a group in it is one method, ratio and training; a
column is one text or task under one protocol. Lines that differ in any setting get different labels, so only
seeds are averaged. Knows nothing of plots.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from probeprune.report.settings import Settings, differences, is_dense, without_seed
from probeprune.result_lines import Line

T = TypeVar("T")

TRAINING_SETTINGS = ("corpus", "steps", "batch_size", "length", "learning_rate")
"""The keys of a training record that are settings; the others are measurements."""

MEASUREMENT_SETTINGS: Mapping[str, tuple[str, ...]] = {
    "perplexity": ("windows", "length", "batch_size", "sampling", "averaging"),
    "accuracy": ("items", "batch_size", "order"),
    "cost": ("batch_size", "length", "new_tokens"),
}
"""The keys of a line that are settings of its measurement, by metric."""


@dataclass(frozen=True)
class LineGroup:
    """The lines of one method, ratio and training: results and failures."""

    label: str
    results: tuple[Line, ...]
    failures: tuple[Line, ...]


@dataclass(frozen=True)
class Study:
    """Everything that is compared with one dense model.

    Attributes:
        label: the model, with number type and device where the lines have several.
        groups: in order of measuring.
        notes: sentences on lines that are not shown.
    """

    label: str
    groups: tuple[LineGroup, ...]
    notes: tuple[str, ...]


def is_dense_line(line: Line) -> bool:
    """Whether the line is of the unpruned, untrained model."""
    return is_dense(line["method"])


def task_key(line: Line) -> str:
    """The column of a line; results under the published protocol never share one with the harness's."""
    protocol = line.get("protocol", "harness")  # texts and cost have none
    return line["task"] if protocol == "harness" else f"{line['task']} ({protocol})"


def of_metric(lines: Iterable[Line], metric: str) -> list[Line]:
    """The lines of one metric."""
    return [line for line in lines if line["metric"] == metric]


def unique(values: Iterable[T]) -> list[T]:
    """Each value once, in order."""
    return list(dict.fromkeys(values))


def studies(lines: Sequence[Line]) -> list[Study]:
    """Group results and failures by study."""
    results: dict[tuple[str, str | None, str | None], list[Line]] = {}
    failures: dict[str, list[Line]] = {}
    for line in lines:
        if line["kind"] == "result":
            results.setdefault(_setup(line), []).append(line)
        else:
            failures.setdefault(line.get("model", ""), []).append(line)
    measured = {model for model, _, _ in results}
    setups = [*results, *((model, None, None) for model in failures if model not in measured)]
    labels = differences([(model, {"dtype": dtype, "device": device}) for model, dtype, device in setups])
    made = []
    for setup, label in zip(setups, labels, strict=True):
        # A failure does not name its device: it goes with the first study of its model.
        failed = failures.pop(setup[0], [])
        made.append(_study(f"{setup[0]}{label}", results.get(setup, []), failed))
    return made


def _setup(line: Line) -> tuple[str, str | None, str | None]:
    """Model, number type and device."""
    return line.get("model", ""), line.get("dtype"), line.get("device")


def _study(label: str, results: Sequence[Line], failures: Sequence[Line]) -> Study:
    shown, notes = _shown(results)
    groups: dict[tuple[str, ...], list[Line]] = {}
    for line in shown:
        groups.setdefault((*_identity(line), _training_key(line)), []).append(line)
    failed: dict[tuple[str, ...], list[Line]] = {}
    for line in failures:
        # A failure does not record its training: it joins the first group of its method and ratio.
        identity = _identity(line)
        key = next((key for key in groups if key[:-1] == identity), (*identity, ""))
        failed.setdefault(key, []).append(line)
    keys = unique([*groups, *failed])
    first = [(groups.get(key) or failed[key])[0] for key in keys]
    labels = differences([(line["name"], _label_settings(line)) for line in first])
    return Study(
        label,
        tuple(
            LineGroup(f"{line['name']}{label}", tuple(groups.get(key, ())), tuple(failed.get(key, ())))
            for key, line, label in zip(keys, first, labels, strict=True)
        ),
        tuple(notes),
    )


def _shown(results: Sequence[Line]) -> tuple[list[Line], list[str]]:
    """The results to show, the newest of each measurement, and sentences on those left out."""
    notes = []
    same_shape = _one_shape(results)
    if len(same_shape) < len(results):
        last = of_metric(same_shape, "cost")[-1]
        notes.append(
            "Speed was measured on several shapes; the latest is shown: prefill of "
            f"{last.get('batch_size')} x {last.get('length')} and {last.get('new_tokens')} new tokens."
        )
    newest: dict[tuple[str, ...], Line] = {}
    for line in _with_labelled_tasks(same_shape):
        measurement = (line["metric"], task_key(line), str(line.get("seed", 0)))
        newest[(*_identity(line), _training_key(line), *measurement)] = line
    if len(newest) < len(same_shape):
        notes.append(
            f"{len(same_shape) - len(newest)} lines were left out: later lines repeat their measurements, or "
            "differ only in settings that are not recorded."
        )
    return list(newest.values()), notes


def _one_shape(lines: Sequence[Line]) -> list[Line]:
    """All lines, except those of cost whose shape differs from that of the last one."""
    costs = of_metric(lines, "cost")
    return [line for line in lines if line["metric"] != "cost" or _measured(line) == _measured(costs[-1])]


def _with_labelled_tasks(lines: Sequence[Line]) -> list[Line]:
    """The lines, with tasks labelled where the same one was measured with different settings."""

    def key(line: Line) -> tuple[str, str, str]:
        return line["metric"], task_key(line), json.dumps(_measured(line))

    kinds = {key(line): _measured(line) for line in lines}
    labels = differences([(f"{metric} {task}", settings) for (metric, task, _), settings in kinds.items()])
    label_of = dict(zip(kinds, labels, strict=True))
    return [{**line, "task": f"{line['task']}{label_of[key(line)]}"} for line in lines]


def _measured(line: Line) -> Settings:
    """Settings of the line's measurement."""
    known: Settings = line
    return {key: known.get(key) for key in MEASUREMENT_SETTINGS[line["metric"]]}


def _identity(line: Line) -> tuple[str, ...]:
    """Everything but seed, measurement and training."""
    method = json.dumps(without_seed(line["method"]), sort_keys=True)
    calibration = json.dumps(line.get("calibration"), sort_keys=True)
    return line["name"], method, repr(float(line["ratio"])), calibration


def _training(line: Line) -> Settings | None:
    """The settings of the line's training; None without training."""
    training: Settings | None = line.get("training")
    return {key: training.get(key) for key in TRAINING_SETTINGS} if training else None


def _training_key(line: Line) -> str:
    training = _training(line)
    return json.dumps(training) if training else ""


def _label_settings(line: Line) -> Settings:
    """The settings that may appear in the label of the line's group."""
    settings = {key: value for key, value in without_seed(line["method"]).items() if key != "training"}
    records = {"training": _training(line), "calibration": line.get("calibration")}
    return {**settings, **{key: record for key, record in records.items() if record}}
