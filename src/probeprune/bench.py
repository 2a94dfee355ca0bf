"""Measured speed and memory: dense against pruned, interleaved in one run.

Each round times the dense model and every method on the same batch, so that a machine whose speed drifts
does so for all. Ratios are medians over rounds of that round's ratio to dense. Stages come from torch's
profiler and the labels that `dynamic.py` puts around them.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from probeprune.calibration import calibrate, collecting
from probeprune.data import calibration_windows, load_corpus
from probeprune.dynamic import attach
from probeprune.evaluation.cost import PeakMemory, counting_flops
from probeprune.methods import METHODS, Method
from probeprune.models import LoadedModel
from probeprune.passes import find_decoder
from probeprune.progress import Progress

OVERHEAD = ("choose", "score", "swap", "history")
"""Stages that are neither the probe's nor the pruned block's own arithmetic."""


def bench(
    loaded: LoadedModel,
    methods: Sequence[Method],
    ratio: float,
    *,
    batch_size: int,
    length: int,
    rounds: int,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Prefill through the decoder: one dictionary for dense and one a method.

    Args:
        loaded: the model.
        methods: what to compare with dense.
        ratio: pruning ratio.
        batch_size, length: of a batch of C4 text.
        rounds: at least 1; each round uses another batch.
        progress: called with (what, done, total).
    """
    model, decoder = loaded.model, find_decoder(loaded.model)
    count = (rounds + 2) * batch_size
    windows = calibration_windows(load_corpus("c4"), loaded.tokenizer, count=count, length=length, seed=0)
    batches = [b.to(loaded.device) for b in windows.split(batch_size)]
    collected = calibrate(
        model,
        windows[: 2 * batch_size],
        batch_size=batch_size,
        progress=lambda n, of: progress("calibration", n, of),
    )

    def forward(ids: torch.Tensor) -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            decoder(input_ids=ids, use_cache=False)
        if ids.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    everything = [METHODS["dense"], *(m for m in methods if m.when != "never")]
    seconds: dict[str, list[float]] = {m.name: [] for m in everything}
    calibrating: list[float] = []
    memory: dict[str, int] = {m.name: 0 for m in everything}
    flops: dict[str, int] = {}
    stages: dict[str, dict[str, float]] = {}
    for done, batch in enumerate(batches[1:]):
        warm = done == 0
        for m in everything:
            with PeakMemory(loaded.device) as peak, attach(model, m, ratio, statistics=collected):
                if warm:
                    with counting_flops() as counted:
                        forward(batch)
                    flops[m.name] = counted.flops
                    stages[m.name] = _stages(lambda batch=batch: forward(batch))  # type: ignore[misc]
                else:
                    if m.when == "batch":  # the batch before: this one's swaps are then what they are in use
                        forward(batches[done][: max(1, batch_size // 4)])
                    seconds[m.name].append(forward(batch))
            if not warm:
                memory[m.name] = max(memory[m.name], peak.bytes)
        if not warm:
            with collecting(model):
                calibrating.append(forward(batch))
        progress("rounds", done, len(batches) - 1)
    dense = seconds["dense"]
    calibration_rate = statistics.median(d / c for d, c in zip(dense, calibrating, strict=True))
    figures = []
    for m in everything:
        speedups = [d / s for d, s in zip(dense, seconds[m.name], strict=True)]
        speedup, share = statistics.median(speedups), flops[m.name] / flops["dense"]
        figures.append(
            {
                "method": m.name,
                "ratio": 0.0 if m.when == "never" else ratio,
                "batch_size": batch_size,
                "length": length,
                "rounds": rounds,
                "tokens_per_second": batch_size * length / statistics.median(seconds[m.name]),
                "speedup": speedup,
                "speedup_range": [min(speedups), max(speedups)],
                "flops_share": share,
                "efficiency": speedup * share,
                "overhead_share": sum(stages[m.name].get(s, 0.0) for s in OVERHEAD),
                "stages": stages[m.name],
                "peak_memory": memory[m.name],
                "memory_over_dense": memory[m.name] / memory["dense"],
                "calibration_over_dense": calibration_rate,
                "dtype": str(loaded.dtype).removeprefix("torch."),
                "device": str(loaded.device),
                "threads": torch.get_num_threads(),
            }
        )
    return figures


def _stages(forward: Callable[[], float]) -> dict[str, float]:
    """Share of a forward pass's time that each labelled stage took."""
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as trace:
        total = forward()
    prefix = "probeprune::"
    return {
        e.key.removeprefix(prefix): e.cpu_time_total / 1e6 / total
        for e in trace.key_averages()
        if e.key.startswith(prefix)
    }


def table(figures: Sequence[dict[str, Any]]) -> Table:
    """The figures for a terminal."""
    first = figures[0]
    title = (
        f"prefill {first['batch_size']} x {first['length']}, {first['dtype']}, {first['device']}, "
        f"{first['threads']} threads; medians of {first['rounds']} interleaved rounds; calibration runs at "
        f"{first['calibration_over_dense']:.2f} of the dense rate"
    )
    result = Table(title=title, title_justify="left")
    for name in (
        "method",
        "ratio",
        "tokens/s",
        "speed-up",
        "range",
        "FLOPs",
        "efficiency",
        "overhead",
        "memory",
    ):
        result.add_column(name, justify="left" if name == "method" else "right")
    for f in figures:
        low, high = f["speedup_range"]
        result.add_row(
            f["method"],
            f"{f['ratio']:.0%}",
            f"{f['tokens_per_second']:.0f}",
            f"{f['speedup']:.2f}x",
            f"{low:.2f}-{high:.2f}",
            f"{f['flops_share']:.1%}",
            f"{f['efficiency']:.2f}",
            f"{f['overhead_share']:.1%}",
            f"{f['memory_over_dense']:.3f}x",
        )
    return result
