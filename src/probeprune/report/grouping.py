"""Which result lines belong together, and what they are called.

A study is one model in one number type on one device; a group in it is one method, ratio and training; a
column is one text or task under one protocol. What lines say to be different gets different names, so that
nothing is averaged but seeds. Knows nothing of figures.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from probeprune.report.reading import Row

_BUDGET = ("corpus", "steps", "batch_size", "length", "learning_rate")
"""What of a training record is a setting; the rest of it was measured."""

_MEASURED_ON = {
    "perplexity": ("windows", "length", "batch_size", "sampling", "averaging"),
    "accuracy": ("items", "batch_size", "order"),
    "cost": ("batch_size", "length", "new_tokens"),
}
"""Settings of a measurement, by metric."""


@dataclass(frozen=True)
class Group:
    """The lines of one method, ratio and training, results and failures."""

    label: str
    rows: tuple[Row, ...]
    failures: tuple[Row, ...]


@dataclass(frozen=True)
class Study:
    """What is compared with one dense model.

    Attributes:
        label: the model, with number type and device where the lines have several.
        groups: in order of measuring.
        notes: sentences on lines that are not shown.
    """

    label: str
    groups: tuple[Group, ...]
    notes: tuple[str, ...]


def is_dense(row: Row) -> bool:
    """Whether the line is of the unpruned, untrained model."""
    method = row["method"]
    return method["when"] == "never" and method.get("training", "none") == "none"


def metric(row: Row) -> str:
    """The line's metric; older lines are all of perplexity."""
    return str(row.get("metric", "perplexity"))


def protocol(row: Row) -> str:
    """The protocol of a task's line."""
    return str(row.get("protocol", "harness"))


def task_key(row: Row) -> str:
    """A task's name; figures of the published protocol never share a column with the harness's."""
    return str(row["task"]) if protocol(row) == "harness" else f"{row['task']} ({protocol(row)})"


def unique(values: Iterable[Any]) -> list[Any]:
    """Each value once, in order."""
    return list(dict.fromkeys(values))


def studies(rows: Sequence[Row]) -> list[Study]:
    """The lines by study; those that are neither results nor failures are ignored."""
    results = [r for r in rows if r.get("kind", "result") == "result"]
    failures = [r for r in rows if r.get("kind") == "failure"]
    kinds = unique((r.get("model", ""), r.get("dtype"), r.get("device")) for r in results)
    # A failure does not say on what device: it goes with the first study of its model.
    known = {model for model, _, _ in kinds}
    kinds += [(m, None, None) for m in unique(r.get("model", "") for r in failures) if m not in known]
    told = differences([(model, {"dtype": dtype, "device": device}) for model, dtype, device in kinds])
    found, seen = [], set()
    for kind, said in zip(kinds, told, strict=True):
        own = [r for r in results if (r.get("model", ""), r.get("dtype"), r.get("device")) == kind]
        failed = [r for r in failures if r.get("model", "") == kind[0] and kind[0] not in seen]
        seen.add(kind[0])
        found.append(_study(f"{kind[0]}{said}", own, failed))
    return found


def differences(named: Sequence[tuple[str, Row]]) -> list[str]:
    """What tells each from others of its name: `" (length=512)"`, or nothing where its name does."""
    found = []
    for name, own in named:
        others = [other for namesake, other in named if namesake == name]
        different = [k for k in own if any(other.get(k, own[k]) != own[k] for other in others)]
        found.append(f" ({', '.join(f'{k}={own[k]}' for k in different)})" if different else "")
    return found


def _study(label: str, results: Sequence[Row], failures: Sequence[Row]) -> Study:
    notes = []
    shown = _one_shape(results)
    if len(shown) < len(results):
        last = next(r for r in reversed(shown) if metric(r) == "cost")
        notes.append(
            "Speed was measured on several shapes; the latest is shown, prefill of "
            f"{last.get('batch_size')} x {last.get('length')} and {last.get('new_tokens')} new tokens."
        )
    newest: dict[tuple[str, ...], Row] = {}
    for row in _named(shown):
        newest[(*_identity(row), _budget(row), metric(row), task_key(row), str(row.get("seed", 0)))] = row
    if len(newest) < len(shown):
        notes.append(
            f"{len(shown) - len(newest)} lines measure what a later line measures too, the same or with "
            "settings that lines do not tell; the later ones are shown."
        )
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in newest.values():
        groups.setdefault((*_identity(row), _budget(row)), []).append(row)
    failed: dict[tuple[str, ...], list[Row]] = {}
    for row in failures:
        # A failure does not say how it was to be trained: it joins what is there of its method and ratio.
        own = _identity(row)
        failed.setdefault(next((key for key in groups if key[:-1] == own), (*own, "")), []).append(row)
    keys = unique([*groups, *failed])
    first = [(groups.get(key) or failed[key])[0] for key in keys]
    told = differences(list(map(_parameters, first)))
    return Study(
        label,
        tuple(
            Group(f"{row['name']}{said}", tuple(groups.get(key, ())), tuple(failed.get(key, ())))
            for key, row, said in zip(keys, first, told, strict=True)
        ),
        tuple(notes),
    )


def _one_shape(rows: Sequence[Row]) -> list[Row]:
    """The lines without those of cost that have another shape than the last of them."""
    shapes = [_measured_on(r) for r in rows if metric(r) == "cost"]
    return [r for r in rows if metric(r) != "cost" or _measured_on(r) == shapes[-1]]


def _named(rows: Sequence[Row]) -> list[Row]:
    """The lines, their task named with what tells it from the same one measured otherwise."""
    kinds = {(metric(r), task_key(r), json.dumps(_measured_on(r))): r for r in rows}
    named = [(f"{kind} {task}", _measured_on(r)) for (kind, task, _), r in kinds.items()]
    told = dict(zip(kinds, differences(named), strict=True))
    return [
        r | {"task": f"{r['task']}{told[metric(r), task_key(r), json.dumps(_measured_on(r))]}"} for r in rows
    ]


def _measured_on(row: Row) -> Row:
    return {k: row.get(k) for k in _MEASURED_ON.get(metric(row), ())}


def _identity(row: Row) -> tuple[str, ...]:
    """What lines that differ in nothing but seed, measurement and training have in common."""
    method = {k: v for k, v in row["method"].items() if k != "seed"}
    calibration = json.dumps(row.get("calibration"), sort_keys=True)
    return row["name"], json.dumps(method, sort_keys=True), repr(float(row["ratio"])), calibration


def _budget(row: Row) -> str:
    training = row.get("training")
    return json.dumps({k: training.get(k) for k in _BUDGET}) if training else ""


def _parameters(row: Row) -> tuple[str, Row]:
    method = {k: v for k, v in row["method"].items() if k != "seed"}
    training = {k: v for k, v in (row.get("training") or {}).items() if k in _BUDGET}
    calibration = {f"calibration {k}": v for k, v in (row.get("calibration") or {}).items()}
    return row["name"], method | training | calibration
