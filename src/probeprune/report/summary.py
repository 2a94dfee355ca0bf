"""Result lines put together: one entry for each method, ratio and training, its seeds aggregated.

Knows nothing of how entries are shown.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, Literal

from probeprune.report.estimates import (
    Estimate,
    Speed,
    agreement,
    estimate,
    factor_over,
    mean,
    mean_accuracy,
    prr,
    with_any,
)
from probeprune.report.grouping import (
    LineGroup,
    Study,
    is_dense_line,
    of_metric,
    studies,
    task_key,
    unique,
)
from probeprune.result_lines import Line, MethodRecord, TrainingRecord


@dataclass(frozen=True)
class FailedMeasurement:
    """The text or task, empty where unknown, and the sentence that says why it failed."""

    task: str
    error: str


@dataclass(frozen=True)
class Quality:
    """How good a model is. A missing key was not measured.

    Attributes:
        perplexity: by text.
        over_dense: by text, the factor over dense on the same windows.
        top1, divergence: by text, the agreement with the dense model's predictions (`AgreementRecord`).
        accuracy: by task, a share of 1; tasks under the published protocol have keys of their own.
        mean_accuracy: by protocol, over all tasks that any entry was measured on under it.
    """

    perplexity: dict[str, Estimate]
    over_dense: dict[str, Estimate]
    top1: dict[str, Estimate]
    divergence: dict[str, Estimate]
    accuracy: dict[str, Estimate]
    mean_accuracy: dict[str, Estimate]


@dataclass(frozen=True)
class Cost:
    """The cost of a model. Shares are of the dense model's; None was not measured.

    Attributes:
        removed_share: of all blocks' parameters.
        flops_share: of the decoder, the probe included.
        probe_flops_share: of the probe, over all dense blocks.
        prefill, decode: speed, from interleaved rounds.
        memory: peak in bytes.
        memory_over_dense: peak over dense.
        kv_cache_share: of its bytes.
        stages: shares of the prefill time by stage of a dynamic method.
    """

    removed_share: float | None
    flops_share: float | None
    probe_flops_share: float | None
    prefill: Speed | None
    decode: Speed | None
    memory: float | None
    memory_over_dense: float | None
    kv_cache_share: float | None
    stages: dict[str, float]


@dataclass(frozen=True)
class Entry:
    """One row of the table.

    Attributes:
        model, name, ratio: as in the result lines.
        label: the name, with settings where several methods share it.
        method, training: all settings of the first of its lines.
        dense: whether it is the unpruned, untrained model.
        seeds: the seeds it was run with.
        lines: its result lines.
    """

    model: str
    name: str
    label: str
    ratio: float
    method: MethodRecord
    training: TrainingRecord | None
    dense: bool
    seeds: tuple[int, ...]
    quality: Quality
    cost: Cost
    failures: tuple[FailedMeasurement, ...]
    lines: tuple[Line, ...]

    @property
    def title(self) -> str:
        """Label and ratio: `probe 40%`."""
        return f"{self.label} {self.ratio:.0%}" if self.ratio else self.label

    def on_text(self, text: str) -> list[Line]:
        """Its perplexity lines on that text."""
        return [line for line in of_metric(self.lines, "perplexity") if line["task"] == text]

    def on_task(self, task: str) -> list[Line]:
        """Its accuracy lines with that key."""
        return [line for line in of_metric(self.lines, "accuracy") if task_key(line) == task]


@dataclass(frozen=True)
class Summary:
    """All entries of one model: dense first, then by ratio, each ratio best last.

    Attributes:
        model: its label.
        labels: of the methods, without dense, in order of measuring.
        texts: the texts of perplexity, in order of measuring.
        protocols: keys of `Quality.accuracy` by protocol, in order of measuring.
        notes: sentences on lines that are not shown.
    """

    model: str
    entries: tuple[Entry, ...]
    labels: tuple[str, ...]
    texts: tuple[str, ...]
    protocols: dict[str, tuple[str, ...]]
    notes: tuple[str, ...]

    @property
    def tasks(self) -> tuple[str, ...]:
        """All keys of `Quality.accuracy`."""
        return tuple(task for tasks in self.protocols.values() for task in tasks)

    @property
    def dense(self) -> Entry | None:
        """The unpruned model."""
        return next((e for e in self.entries if e.dense), None)

    @property
    def ratios(self) -> dict[float, list[Entry]]:
        """Entries by ratio; 0 holds the dense model, trained or not."""
        return {r: [e for e in self.entries if e.ratio == r] for r in unique(e.ratio for e in self.entries)}

    def series(self, entry: Entry) -> int | None:
        """The index of the entry's method, which decides its style; None is dense."""
        return None if entry.dense else self.labels.index(entry.label)

    def records(self) -> list[dict[str, Any]]:
        """All entries as flat JSON objects, without their lines and with their PRR by text."""
        return [self._record(entry) for entry in self.entries]

    def _record(self, entry: Entry) -> dict[str, Any]:
        record = asdict(entry)
        del record["lines"]
        quality, cost = record.pop("quality"), record.pop("cost")
        lost = {text: self.perplexity_lost(entry, text) for text in self.texts}
        ratios = {text: prr(value, entry.cost.prefill) for text, value in lost.items() if value is not None}
        return {**record, **quality, **cost, "prr": ratios}

    def perplexity_lost(self, entry: Entry, text: str) -> float | None:
        """Perplexity of the entry above dense; None for dense, and where one of them was not measured."""
        if self.dense is None or entry.dense:
            return None
        ours, theirs = entry.quality.perplexity.get(text), self.dense.quality.perplexity.get(text)
        return None if ours is None or theirs is None else ours.value - theirs.value


def summarise(lines: Sequence[Line]) -> list[Summary]:
    """One summary for each model in the lines, and number type and device where there are several."""
    return [_summary(study) for study in studies(lines)]


def _summary(study: Study) -> Summary:
    results = [line for group in study.groups for line in group.results]
    accuracies = of_metric(results, "accuracy")
    context = _Context(
        texts=tuple(unique(line["task"] for line in of_metric(results, "perplexity"))),
        protocols={
            name: tuple(unique(task_key(line) for line in accuracies if line["protocol"] == name))
            for name in unique(line["protocol"] for line in accuracies)
        },
        dense=tuple(line for line in results if is_dense_line(line)),
        interleaved=bool(of_metric(results, "cost")),
    )
    entries = [_entry(group, context) for group in study.groups]
    labels = unique(e.label for e in entries if not e.dense)
    for text in context.texts[:1]:
        entries.sort(key=lambda e: _worst_first(e, text))
    entries.sort(key=lambda e: (not e.dense, e.ratio))
    return Summary(study.label, tuple(entries), tuple(labels), context.texts, context.protocols, study.notes)


def _worst_first(entry: Entry, text: str) -> float:
    found = entry.quality.perplexity.get(text)
    return -math.inf if found is None else -found.value


@dataclass(frozen=True)
class _Context:
    """Facts about the whole study that every entry needs.

    Attributes:
        texts, protocols: as in `Summary`.
        dense: lines of the dense model.
        interleaved: whether cost was measured in rounds interleaved with dense.
    """

    texts: tuple[str, ...]
    protocols: dict[str, tuple[str, ...]]
    dense: tuple[Line, ...]
    interleaved: bool


def _entry(group: LineGroup, context: _Context) -> Entry:
    first = (*group.results, *group.failures)[0]
    return Entry(
        model=first.get("model", ""),
        name=first["name"],
        label=group.label,
        ratio=first["ratio"],
        method=first["method"],
        training=first.get("training"),
        dense=is_dense_line(first),
        seeds=tuple(sorted({line.get("seed", 0) for line in [*group.results, *group.failures]})),
        quality=_quality(group.results, context),
        cost=_cost(group.results, context),
        failures=tuple(unique(FailedMeasurement(f.get("task", ""), str(f["error"])) for f in group.failures)),
        lines=group.results,
    )


def _by_text(lines: Sequence[Line], texts: Sequence[str]) -> dict[str, list[Line]]:
    """Perplexity lines by text."""
    perplexities = of_metric(lines, "perplexity")
    return {text: [line for line in perplexities if line["task"] == text] for text in texts}


def _quality(lines: Sequence[Line], context: _Context) -> Quality:
    by_text, dense = _by_text(lines, context.texts), _by_text(context.dense, context.texts)
    by_task: dict[str, list[Line]] = {}
    for line in of_metric(lines, "accuracy"):
        by_task.setdefault(task_key(line), []).append(line)
    factors = {
        text: factor_over(own, dense[text])
        for text, own in by_text.items()
        if not any(map(is_dense_line, own))
    }
    top1 = {text: agreement(own, "top1") for text, own in by_text.items()}
    divergence = {text: agreement(own, "divergence") for text, own in by_text.items()}
    means = {p: mean_accuracy([by_task.get(t, []) for t in tasks]) for p, tasks in context.protocols.items()}
    return Quality(
        perplexity={text: estimate(own) for text, own in by_text.items() if own},
        over_dense={text: factor for text, factor in factors.items() if factor is not None},
        top1={text: found for text, found in top1.items() if found is not None},
        divergence={text: found for text, found in divergence.items() if found is not None},
        accuracy={task: estimate(own) for task, own in by_task.items()},
        mean_accuracy={protocol: found for protocol, found in means.items() if found is not None},
    )


def _cost(lines: Sequence[Line], context: _Context) -> Cost:
    by_text, dense = _by_text(lines, context.texts), _by_text(context.dense, context.texts)
    texts = [line for own in by_text.values() for line in own]
    costs = of_metric(lines, "cost")
    matched = [pair for text, own in by_text.items() for pair in with_any(own, dense[text])]
    flops = _ratios(matched, "flops_per_token")
    memory = _values(costs if context.interleaved else texts, "peak_memory")
    return Cost(
        removed_share=mean(_values(lines, "removed_share")),
        flops_share=mean(flops or _values(costs, "flops_share")),
        probe_flops_share=mean(_values(texts, "probe_flops_share")),
        prefill=_speed(costs, "prefill"),
        decode=_speed(costs, "decode"),
        memory=max(memory, default=None),
        memory_over_dense=mean(_values(costs, "memory_over_dense")),
        kv_cache_share=mean(_values(costs, "kv_cache_share")),
        stages=next((line["stages"] for line in costs if line.get("stages")), {}),
    )


def _speed(costs: Sequence[Line], phase: Literal["prefill", "decode"]) -> Speed | None:
    records = [line[phase] for line in costs if line.get(phase)]
    records = [record for record in records if record.get("speedup") is not None]
    if not records:
        # Dense is as fast as itself, whatever was measured.
        return Speed(1.0, 1.0, 1.0) if costs and is_dense_line(costs[0]) else None
    ranges = [record.get("speedup_range") or [record["speedup"]] for record in records]
    speed = fmean(record["speedup"] for record in records)
    return Speed(speed, min(map(min, ranges)), max(map(max, ranges)))


_Number = Literal[
    "removed_share",
    "flops_share",
    "flops_per_token",
    "probe_flops_share",
    "peak_memory",
    "memory_over_dense",
    "kv_cache_share",
]


def _values(lines: Sequence[Line], key: _Number) -> list[float]:
    """The values of that key, from the lines that have one."""
    return [value for line in lines if (value := line.get(key)) is not None]


def _ratios(matched: Sequence[tuple[Line, Line]], key: _Number) -> list[float]:
    """The values of that key over those of dense, from the pairs that have both."""
    return [line[key] / dense[key] for line, dense in matched if key in line and key in dense]
