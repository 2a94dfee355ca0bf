"""Result lines put together: one entry for each method, ratio and training, its seeds aggregated.

Knows nothing of how entries are shown.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any

from probeprune.report.grouping import Group, Study, is_dense, metric, protocol, studies, task_key, unique
from probeprune.report.reading import Row


@dataclass(frozen=True)
class Estimate:
    """A figure and how sure it is.

    Attributes:
        value: mean over seeds.
        spread: with several seeds the standard deviation over them; with one, the standard error over windows
            or items, which is another thing. None where it is unknown.
        seeds: how many.
    """

    value: float
    spread: float | None = None
    seeds: int = 1


@dataclass(frozen=True)
class Speed:
    """Measured speed over dense: the median of interleaved rounds, and the range of the rounds."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Failure:
    """What could not be measured, and the sentence that says why."""

    task: str
    error: str


@dataclass(frozen=True)
class Entry:
    """One line of the table. Shares are of the dense model's; None or a missing key is not measured.

    Attributes:
        model, name, ratio: as in the result lines; `label` also tells methods of one name apart.
        method, training: all parameters of the first of its lines.
        dense: whether it is the unpruned, untrained model.
        seeds: the seeds it was run with.
        perplexity, over_dense: by text; the second is the factor over dense on the same windows.
        accuracy: by task, a share of 1; tasks under the published protocol are keyed apart.
        mean_accuracy: by protocol, over all tasks that anything here was measured on under it.
        prefill, decode: from interleaved rounds.
        speed_in_passing: tokens per second over dense while perplexity was measured, one after the other.
        memory: peak in bytes.
        rows: its lines.
    """

    model: str
    name: str
    label: str
    ratio: float
    method: Row
    training: Row | None
    dense: bool
    seeds: tuple[int, ...]
    removed_share: float | None
    perplexity: dict[str, Estimate]
    over_dense: dict[str, Estimate]
    accuracy: dict[str, Estimate]
    mean_accuracy: dict[str, Estimate]
    flops_share: float | None
    probe_flops_share: float | None
    prefill: Speed | None
    decode: Speed | None
    speed_in_passing: float | None
    memory: float | None
    memory_over_dense: float | None
    kv_cache_share: float | None
    stages: dict[str, float]
    failures: tuple[Failure, ...]
    rows: tuple[Row, ...]

    @property
    def name_and_ratio(self) -> str:
        """For people: `probe 40%`."""
        return f"{self.label} {self.ratio:.0%}" if self.ratio else self.label

    def on(self, text: str) -> list[Row]:
        """Its lines of perplexity on that text."""
        return [r for r in self.rows if metric(r) == "perplexity" and r["task"] == text]

    def at(self, task: str) -> list[Row]:
        """Its lines of accuracy under that key."""
        return [r for r in self.rows if metric(r) == "accuracy" and task_key(r) == task]


@dataclass(frozen=True)
class Summary:
    """All entries of one model: dense first, then by ratio, each ratio best last.

    Attributes:
        labels: of the methods, dense left out, in order of measuring.
        texts: what perplexity was measured on, likewise.
        protocols: keys of `Entry.accuracy` by the protocol they were run under, likewise.
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
        """All keys of `Entry.accuracy`."""
        return tuple(t for own in self.protocols.values() for t in own)

    @property
    def dense(self) -> Entry | None:
        """The unpruned model."""
        return next((e for e in self.entries if e.dense), None)

    @property
    def ratios(self) -> dict[float, list[Entry]]:
        """Entries by ratio; 0 holds the dense model, also trained."""
        return {r: [e for e in self.entries if e.ratio == r] for r in unique(e.ratio for e in self.entries)}

    def records(self) -> list[dict[str, Any]]:
        """All entries as JSON has them, without their lines and with their PRR by text."""
        return [
            {k: v for k, v in asdict(e).items() if k != "rows"}
            | {"prr": {t: prr(lost, e.prefill) for t in self.texts if (lost := self.lost(e, t)) is not None}}
            for e in self.entries
        ]

    def lost(self, entry: Entry, text: str) -> float | None:
        """Perplexity of the entry above dense."""
        if (
            self.dense is None
            or entry.dense
            or not {text} <= entry.perplexity.keys() & self.dense.perplexity.keys()
        ):
            return None
        return entry.perplexity[text].value - self.dense.perplexity[text].value


def summarise(rows: Sequence[Row]) -> list[Summary]:
    """One summary for each model in the lines, and number type and device where there are several."""
    return [_summary(study) for study in studies(rows)]


def paired_factor(row: Row, other: Row) -> tuple[float, float]:
    """Perplexity over another's on the same windows, and its standard error.

    Windows differ far more from each other than methods do on one window, so the error is that of the mean
    difference of losses, window by window (delta method). NaN where that cannot be known.
    """
    factor = row["value"] / other["value"]
    a, b = row.get("losses", []), other.get("losses", [])
    if len(a) != len(b) or len(a) < 2:
        return factor, math.nan
    return factor, factor * stdev(x - y for x, y in zip(a, b, strict=True)) / math.sqrt(len(a))


def pairs(rows: Sequence[Row], others: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Lines of one task matched by seed; what was run once, having nothing to draw, goes with every seed."""
    a, b = ({r.get("seed", 0): r for r in side} for side in (rows, others))
    if len(a) == 1 and len(b) > 1:
        return [(rows[0], other) for other in others]
    if len(b) == 1 and len(a) > 1:
        return [(row, others[0]) for row in rows]
    return [(a[seed], b[seed]) for seed in a if seed in b]


def prr(lost: float, speed: Speed | None) -> float | None:
    """PRR, Probe Pruning's measure of cost: performance lost per share of run time saved; lower is better.

    None where no time was saved or none was measured.

    Args:
        lost: perplexity above dense, or points of accuracy below it.
        speed: measured prefill speed over dense; 1.25 saves a fifth of the time.
    """
    return None if speed is None or speed.value <= 1 else lost / (1 - 1 / speed.value)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which points no other beats: at most as much in both coordinates, and less in one."""
    front: list[int] = []
    best = math.inf
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        if points[i][1] < best or (front and points[front[-1]] == points[i]):
            front.append(i)
            best = points[i][1]
    return sorted(front)


def _summary(study: Study) -> Summary:
    results = [r for group in study.groups for r in group.rows]
    accuracies = [r for r in results if metric(r) == "accuracy"]
    shared = _Shared(
        texts=tuple(unique(r["task"] for r in results if metric(r) == "perplexity")),
        tasks={
            name: tuple(unique(task_key(r) for r in accuracies if protocol(r) == name))
            for name in unique(map(protocol, accuracies))
        },
        dense=tuple(r for r in results if is_dense(r)),
        interleaved=any(metric(r) == "cost" for r in results),
    )
    entries = [_entry(group, shared) for group in study.groups]
    labels = unique(e.label for e in entries if not e.dense)
    for text in shared.texts[:1]:
        entries.sort(key=lambda e: -e.perplexity[text].value if text in e.perplexity else -math.inf)
    entries.sort(key=lambda e: (not e.dense, e.ratio))
    return Summary(study.label, tuple(entries), tuple(labels), shared.texts, shared.tasks, study.notes)


@dataclass(frozen=True)
class _Shared:
    """What an entry needs to know of the others."""

    texts: tuple[str, ...]
    tasks: dict[str, tuple[str, ...]]
    dense: tuple[Row, ...]
    interleaved: bool


def _entry(group: Group, shared: _Shared) -> Entry:
    rows = group.rows
    first = (*rows, *group.failures)[0]
    on = {text: [r for r in rows if metric(r) == "perplexity" and r["task"] == text] for text in shared.texts}
    dense_on = {
        text: [r for r in shared.dense if metric(r) == "perplexity" and r["task"] == text] for text in on
    }
    texts = [r for own in on.values() for r in own]
    costs = [r for r in rows if metric(r) == "cost"]
    by_task: dict[str, list[Row]] = {}
    for row in rows:
        if metric(row) == "accuracy":
            by_task.setdefault(task_key(row), []).append(row)
    flops = [
        row["flops_per_token"] / other["flops_per_token"]
        for text, own in on.items()
        for row, other in _with_any(own, dense_on[text])
        if "flops_per_token" in row and "flops_per_token" in other
    ]
    passing = [
        row["tokens_per_second"] / other["tokens_per_second"]
        for text, own in on.items()
        for row, other in _with_any(own, dense_on[text])
        if "tokens_per_second" in row and "tokens_per_second" in other
    ]
    memory = _known(costs if shared.interleaved else texts, "peak_memory")
    return Entry(
        model=first.get("model", ""),
        name=first["name"],
        label=group.label,
        ratio=first["ratio"],
        method=first["method"],
        training=first.get("training"),
        dense=is_dense(first),
        seeds=tuple(sorted({r.get("seed", 0) for r in [*rows, *group.failures]})),
        removed_share=_mean(_known(rows, "removed_share")),
        perplexity={t: _estimate(own) for t, own in on.items() if own},
        over_dense={
            t: factor
            for t, own in on.items()
            if not is_dense(first) and (factor := _factor(own, dense_on[t]))
        },
        accuracy={t: _estimate(own) for t, own in by_task.items()},
        mean_accuracy={p: mean for p, names in shared.tasks.items() if (mean := _mean_accuracy(rows, names))},
        flops_share=_mean(flops) if flops else _mean(_known(costs, "flops_share")),
        probe_flops_share=_mean(_known(texts, "probe_flops_share")),
        prefill=_speed(costs, "prefill"),
        decode=_speed(costs, "decode"),
        speed_in_passing=_mean(passing),
        memory=max(memory, default=None),
        memory_over_dense=_mean(_known(costs, "memory_over_dense")),
        kv_cache_share=_mean(_known(costs, "kv_cache_share")),
        stages=next((r["stages"] for r in costs if r.get("stages")), {}),
        failures=tuple(unique(Failure(r.get("task") or "", str(r["error"])) for r in group.failures)),
        rows=rows,
    )


def _estimate(rows: Sequence[Row]) -> Estimate:
    return _over_seeds([r["value"] for r in rows], rows[0].get("standard_error"))


def _over_seeds(values: Sequence[float], error: float | None) -> Estimate:
    """The estimate from one value a seed; `error` is that of the only one."""
    if len(values) > 1:
        return Estimate(fmean(values), stdev(values), len(values))
    return Estimate(values[0], None if error is None or not math.isfinite(error) else error)


def _factor(rows: Sequence[Row], dense: Sequence[Row]) -> Estimate | None:
    if matched := pairs(rows, dense):
        factors = [paired_factor(row, other) for row, other in matched]
        return _over_seeds([f for f, _ in factors], factors[0][1])
    return None


def _mean_accuracy(rows: Sequence[Row], tasks: Sequence[str]) -> Estimate | None:
    """Over the seeds that have every task: a mean over some of the tasks could not be compared."""
    by_seed: dict[int, dict[str, Row]] = {}
    for row in rows:
        if metric(row) == "accuracy" and task_key(row) in tasks:
            by_seed.setdefault(row.get("seed", 0), {})[task_key(row)] = row
    complete = [own for own in by_seed.values() if len(own) == len(tasks)]
    if not complete:
        return None
    errors = _known(list(complete[0].values()), "standard_error")
    error = math.hypot(*errors) / len(tasks) if len(errors) == len(tasks) else None
    return _over_seeds([fmean(r["value"] for r in own.values()) for own in complete], error)


def _speed(costs: Sequence[Row], phase: str) -> Speed | None:
    found = [r[phase] for r in costs if r.get(phase) and r[phase].get("speedup") is not None]
    if not found:
        # Whatever it took, dense is as fast as itself.
        return Speed(1.0, 1.0, 1.0) if costs and is_dense(costs[0]) else None
    ranges = [f.get("speedup_range") or [f["speedup"]] for f in found]
    return Speed(fmean(f["speedup"] for f in found), min(map(min, ranges)), max(map(max, ranges)))


def _with_any(rows: Sequence[Row], others: Sequence[Row]) -> Iterable[tuple[Row, Row]]:
    """Each line with the other one of its seed, or else the first: for what hardly depends on the seed."""
    by_seed = {r.get("seed", 0): r for r in others}
    return [(r, by_seed.get(r.get("seed", 0), others[0])) for r in rows] if others else []


def _known(rows: Sequence[Row], part: str) -> list[float]:
    return [r[part] for r in rows if r.get(part) is not None]


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None
