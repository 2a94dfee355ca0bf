"""Measure cost: time and memory of a method beside the dense model, interleaved with it."""

import time
from dataclasses import replace
from typing import Any

from probeprune.bench.lines import BenchLine
from probeprune.bench.measure import GridPoint, measure_point
from probeprune.bench.targets import from_loaded
from probeprune.experiment.cells import Cell, CostMeasure
from probeprune.experiment.workbench import Workbench
from probeprune.preparation import Piece, Preparation, gather
from probeprune.progress import Progress
from probeprune.result_lines import CostLine, PhaseRecord
from probeprune.stages import STAGES
from probeprune.strategies.allocation import removed_parameters

FEW = 8
"""Windows that the time to calibrate is measured on."""


def cost_line(bench: Workbench, cell: Cell, progress: Progress) -> CostLine:
    """The measured part of a cost cell's line."""
    subject, measure = cell.subject, cell.measure
    assert isinstance(measure, CostMeasure)
    loaded = bench.dense(subject)
    with bench.prepared(subject) as prepared:
        removed, removed_share = removed_parameters(prepared.blocks, prepared.widths), prepared.removed_share
    methods = [subject.method] if subject.method.when.prunes else []
    timings = measure_point(
        from_loaded(loaded),
        methods,
        subject.ratio,
        GridPoint(measure.batch_size, measure.length),
        calibration=bench.preparation(subject),
        new_tokens=measure.new_tokens,
        rounds=measure.rounds,
        progress=progress,
    )
    phases = {line["phase"]: line for line in timings if line["method"] == subject.method.name}
    prefill = phases["prefill"]
    total = sum(prefill["profile_ms"].values())
    parameters = sum(p.numel() for p in loaded.model.parameters())
    result: CostLine = {
        "task": "cost",
        "metric": "cost",
        "value": prefill["speedup"],
        "standard_error": 0.0,
        "removed_share": removed_share,
        "prefill": _phase(prefill),
        "batch_size": measure.batch_size,
        "length": measure.length,
        "new_tokens": measure.new_tokens,
        "rounds": measure.rounds,
        "flops_share": prefill["work_share"],
        "stages": {stage.name: prefill["profile_ms"][stage.name] / total for stage in STAGES},
        "peak_memory": prefill["peak_memory"],
        "memory_over_dense": prefill["memory_over_dense"],
        "kv_cache_bytes_per_token": prefill["cache_bytes"] // (measure.batch_size * measure.length),
        "kv_cache_share": prefill["cache_over_dense"],
        "parameters": [parameters, parameters - removed],
        "calibration_seconds": _calibration_seconds(bench, cell) if measure.time_calibration else None,
    }
    if "decode" in phases:
        result["decode"] = _phase(phases["decode"])
    return result


def _phase(line: BenchLine) -> PhaseRecord:
    return {
        "seconds": line["seconds"],
        "tokens_per_second": line["tokens_per_second"],
        "speedup": line["speedup"],
        "speedup_range": line["speedup_range"],
        "efficiency": line["efficiency"],
    }


def _calibration_seconds(bench: Workbench, cell: Cell) -> float | None:
    """Seconds to calibrate the method, extrapolated from a few windows: with all, the cache would answer."""
    subject = cell.subject
    source = bench.source(subject)
    if source is None:
        return None
    model, seconds = bench.dense(subject).model, 0.0
    few = Preparation(model, replace(source, windows=FEW), batch_size=FEW)

    def timed(piece: Piece) -> dict[str, Any]:
        nonlocal seconds
        started = time.perf_counter()
        value = few.get(piece)
        # Gradients and gates take as many windows whatever the calibration text.
        scale = 1 if piece.part in ("saliences", "gates") else source.windows / FEW
        seconds += (time.perf_counter() - started) * scale
        return value

    gather(model, subject.method, subject.ratio, timed)
    return seconds
