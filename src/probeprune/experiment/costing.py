"""The line of a cost measure: time and memory of a method beside the dense model, interleaved with it."""

import time
from typing import Any

from probeprune.bench.measure import Point
from probeprune.bench.measure import measure as measure_point
from probeprune.bench.profiling import OVERHEAD
from probeprune.bench.targets import from_loaded
from probeprune.calibration.collecting import calibrate
from probeprune.experiment.cells import Cell, CostMeasure
from probeprune.experiment.workbench import Workbench
from probeprune.progress import Progress
from probeprune.strategies.allocation import removed_parameters
from probeprune.surgery import method_consumers, method_saliences

_TIMES = ("seconds", "tokens_per_second", "speedup", "speedup_range", "efficiency")
_STAGES = ("run_ahead", *OVERHEAD)


def cost_line(bench: Workbench, cell: Cell, progress: Progress) -> dict[str, Any]:
    """What is measured of the cell: prefill, decode, memory, cache, parameters, time to calibrate.

    Times are medians over rounds; `speedup` is that over the dense model in the same round.
    """
    subject, measure = cell.subject, cell.measure
    assert isinstance(measure, CostMeasure)
    loaded, known = bench.dense(subject), bench.statistics(subject)
    with bench.prepared(subject) as prepared:
        gone, removed = removed_parameters(prepared.blocks, prepared.kept), prepared.removed_share
    methods = [] if subject.method.when == "never" else [subject.method]
    figures = measure_point(
        from_loaded(loaded),
        methods,
        subject.ratio,
        Point(measure.batch_size, measure.length),
        known={subject.method.name: known},
        new_tokens=measure.new_tokens,
        rounds=measure.rounds,
        progress=progress,
    )
    own = {f["stage"]: f for f in figures if f["method"] == subject.method.name}
    prefill = own["prefill"]
    total = sum(prefill["profile_ms"].values())
    parameters = sum(p.numel() for p in loaded.model.parameters())
    return {
        "task": "cost",
        "metric": "cost",
        "value": prefill["speedup"],
        "standard_error": 0.0,
        "removed_share": removed,
        **{stage: {k: f[k] for k in _TIMES} for stage, f in own.items()},
        "batch_size": measure.batch_size,
        "length": measure.length,
        "new_tokens": measure.new_tokens,
        "rounds": measure.rounds,
        "flops_share": prefill["work_share"],
        "stages": {s: prefill["profile_ms"][s] / total for s in _STAGES},
        "peak_memory": prefill["peak_memory"],
        "memory_over_dense": prefill["memory_over_dense"],
        "kv_cache_bytes_per_token": prefill["cache_bytes"] // (measure.batch_size * measure.length),
        "kv_cache_share": prefill["cache_over_dense"],
        "parameters": [parameters, parameters - gone],
        "calibration_seconds": _calibration_seconds(bench, cell),
    }


def _calibration_seconds(bench: Workbench, cell: Cell) -> float | None:
    """Time to calibrate the method, from a part of its windows: the whole would come from the cache."""
    subject = cell.subject
    method, text = subject.method, subject.calibration
    if text is None:
        return None
    model, seconds = bench.dense(subject).model, 0.0
    if method.needs_moments:
        windows = bench.windows(subject, text)[:8]
        started = time.perf_counter()
        calibrate(model, windows, batch_size=len(windows))
        seconds += (time.perf_counter() - started) * text.windows / len(windows)
    if method.needs_gradients:
        windows = bench.gradient_windows(subject)
        started = time.perf_counter()
        method_saliences(model, method, windows)
        seconds += time.perf_counter() - started
    if method.needs_refit:
        windows = bench.windows(subject, text)[:8]
        known = bench.statistics(subject)
        started = time.perf_counter()
        method_consumers(model, method, subject.ratio, windows, statistics=known, batch_size=len(windows))
        seconds += (time.perf_counter() - started) * text.windows / len(windows)
    return seconds
