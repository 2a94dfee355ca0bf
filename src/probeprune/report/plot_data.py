"""The points and bars of the plots, shared by the page and by figures for papers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from probeprune.report.estimates import Speed
from probeprune.report.summary import Entry, Summary

QUALITY_LABEL = "perplexity (log scale)"


@dataclass(frozen=True)
class Interval:
    """A value with the ends of its error bar, which are the value itself where there is none."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class CostAxis:
    """A cost to plot quality against.

    Attributes:
        unit: one word for it.
        label: of the axis.
        cost: of an entry, in percent of dense; None where it was not measured.
    """

    unit: str
    label: str
    cost: Callable[[Entry], Interval | None]


@dataclass(frozen=True)
class QualityPoint:
    """Cost in percent of dense and perplexity of an entry."""

    entry: Entry
    cost: Interval
    perplexity: Interval


@dataclass(frozen=True)
class TaskBar:
    """Accuracy of an entry in percent, with half the length of its error bar."""

    entry: Entry
    value: float
    spread: float | None


def _flops(entry: Entry) -> Interval | None:
    share = entry.cost.flops_share
    return None if share is None else Interval(100 * share, 100 * share, 100 * share)


def _time(entry: Entry) -> Interval | None:
    speed: Speed | None = entry.cost.prefill
    if speed is None or not speed.clear:
        return None
    return Interval(100 / speed.value, 100 / speed.high, 100 / speed.low)


FLOPS = CostAxis("FLOPs", "decoder FLOPs with the probe, % of dense (cheaper to the right)", _flops)
TIME = CostAxis("time", "measured prefill time, % of dense (faster to the right)", _time)


def quality_points(summary: Summary, text: str, axis: CostAxis) -> list[QualityPoint]:
    """Points of all entries measured on that text and axis; error bars are those of `perplexity_spread`."""
    points = []
    for entry in summary.entries:
        cost = axis.cost(entry)
        if cost is None or text not in entry.quality.perplexity:
            continue
        value = entry.quality.perplexity[text].value
        spread = perplexity_spread(summary, entry, text) or 0.0
        points.append(QualityPoint(entry, cost, Interval(value, value - spread, value + spread)))
    return points


def perplexity_spread(summary: Summary, entry: Entry, text: str) -> float | None:
    """The spread of perplexity as plots show it: of the paired difference to dense, or over seeds."""
    factor = entry.quality.over_dense.get(text)
    dense = None if summary.dense is None else summary.dense.quality.perplexity.get(text)
    return None if dense is None or factor is None or factor.spread is None else factor.spread * dense.value


def task_bars(summary: Summary, task: str, entries: Sequence[Entry]) -> list[TaskBar]:
    """Bars of the entries measured on that task, in the order of the legend; dense has none."""
    measured = [e for e in entries if not e.dense and task in e.quality.accuracy]
    bars = []
    for entry in sorted(measured, key=lambda e: summary.labels.index(e.label)):
        accuracy = entry.quality.accuracy[task]
        spread = None if accuracy.spread is None else 100 * accuracy.spread
        bars.append(TaskBar(entry, 100 * accuracy.value, spread))
    return bars


def dense_accuracy(summary: Summary, task: str) -> float | None:
    """Accuracy of the dense model in percent; None where it was not measured."""
    if summary.dense is None or task not in summary.dense.quality.accuracy:
        return None
    return 100 * summary.dense.quality.accuracy[task].value


def ratio_label(ratio: float) -> str:
    """`20% pruned`, or `not pruned`."""
    return f"{ratio:.0%} pruned" if ratio else "not pruned"
