"""Figures aggregated over seeds, with their spread. Result lines in, estimates out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

from probeprune.result_lines import Line


@dataclass(frozen=True)
class Estimate:
    """A figure and its uncertainty.

    Attributes:
        value: mean over seeds.
        spread: with several seeds, the standard deviation over them; with one, the standard error over
            windows or items, which is a different quantity. None where it is unknown.
        seeds: number of seeds.
    """

    value: float
    spread: float | None = None
    seeds: int = 1


WIDEST = 1.5
"""Largest ratio of the fastest round to the slowest at which a speed is a figure."""


@dataclass(frozen=True)
class Speed:
    """Measured speed over dense: the median of interleaved rounds, and the range of the rounds."""

    value: float
    low: float
    high: float

    @property
    def clear(self) -> bool:
        """Whether the rounds agree well enough for the median to mean anything."""
        return self.high <= WIDEST * self.low


def estimate(lines: Sequence[Line]) -> Estimate:
    """The estimate of `value` from lines of one measurement with different seeds."""
    return over_seeds([line["value"] for line in lines], lines[0].get("standard_error"))


def agreement(lines: Sequence[Line], what: Literal["top1", "divergence"]) -> Estimate | None:
    """How far a method agrees with the dense model on a text; None where it was not measured."""
    records = [record for line in lines if (record := line.get("agreement"))]
    if not records:
        return None
    error = records[0].get("top1_error") if what == "top1" else records[0].get("divergence_error")
    return over_seeds([record[what] for record in records], error)


def over_seeds(values: Sequence[float], error: float | None) -> Estimate:
    """The estimate from one value a seed; `error` is the standard error where there is only one."""
    if len(values) > 1:
        return Estimate(fmean(values), stdev(values), len(values))
    return Estimate(values[0], None if error is None or not math.isfinite(error) else error)


def paired_factor(line: Line, other: Line) -> tuple[float, float]:
    """Perplexity over another's on the same windows, and its standard error.

    Windows differ far more from each other than methods do on one window, so the error is that of the mean
    difference of losses, window by window (delta method). NaN where the windows cannot be paired.
    """
    factor = line["value"] / other["value"]
    a, b = line.get("losses", []), other.get("losses", [])
    if len(a) != len(b) or len(a) < 2:
        return factor, math.nan
    return factor, factor * stdev(x - y for x, y in zip(a, b, strict=True)) / math.sqrt(len(a))


def factor_over(lines: Sequence[Line], dense: Sequence[Line]) -> Estimate | None:
    """The perplexity factor over dense, over seeds; None where no line has a counterpart."""
    factors = [paired_factor(line, other) for line, other in pairs(lines, dense)]
    return over_seeds([factor for factor, _ in factors], factors[0][1]) if factors else None


def mean_accuracy(by_task: Sequence[Sequence[Line]]) -> Estimate | None:
    """Mean accuracy over tasks, from the lines of each task.

    Only seeds that have every task count: a mean over some of the tasks could not be compared.
    """
    by_seed: dict[int, list[Line]] = {}
    for lines in by_task:
        for line in lines:
            by_seed.setdefault(line.get("seed", 0), []).append(line)
    complete = [lines for lines in by_seed.values() if len(lines) == len(by_task)]
    if not complete:
        return None
    errors = [e for line in complete[0] if (e := line.get("standard_error")) is not None]
    error = math.hypot(*errors) / len(by_task) if len(errors) == len(by_task) else None
    return over_seeds([fmean(line["value"] for line in lines) for lines in complete], error)


def pairs(lines: Sequence[Line], others: Sequence[Line]) -> list[tuple[Line, Line]]:
    """Lines of one task matched by seed; a side with a single line, such as dense, matches every seed."""
    a, b = ({line.get("seed", 0): line for line in side} for side in (lines, others))
    if len(a) == 1 and len(b) > 1:
        return [(lines[0], other) for other in others]
    if len(b) == 1 and len(a) > 1:
        return [(line, others[0]) for line in lines]
    return [(a[seed], b[seed]) for seed in a if seed in b]


def with_any(lines: Sequence[Line], others: Sequence[Line]) -> list[tuple[Line, Line]]:
    """Each line with the other of its seed, or else the first: for costs, which hardly depend on the seed."""
    by_seed = {line.get("seed", 0): line for line in others}
    return [(line, by_seed.get(line.get("seed", 0), others[0])) for line in lines] if others else []


def prr(lost: float, speed: Speed | None) -> float | None:
    """PRR, Probe Pruning's measure of cost: performance lost per share of run time saved; lower is better.

    None where no time was saved, or none was measured clearly.

    Args:
        lost: perplexity above dense, or points of accuracy below it.
        speed: measured prefill speed over dense; 1.25 saves a fifth of the time.
    """
    return None if speed is None or not speed.clear or speed.value <= 1 else lost / (1 - 1 / speed.value)


def mean(values: Sequence[float]) -> float | None:
    """The mean; None of nothing."""
    return fmean(values) if values else None
