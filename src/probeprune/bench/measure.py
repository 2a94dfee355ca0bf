"""One point of the grid: a batch size and a length, dense and every method in turn, prefill and decode.

Each round runs them all on the same batch, so that a machine whose speed drifts does so for all; ratios are
medians over rounds of that round's ratio to dense. The decoder is measured, without embedding and head, which
pruning leaves alone.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from transformers import DynamicCache

from probeprune.bench.profiling import OVERHEAD, profiled
from probeprune.bench.targets import Target
from probeprune.calibration.statistics import Statistics
from probeprune.methods import METHODS, Method
from probeprune.model.blocks import Block
from probeprune.model.cost import PeakMemory, counting_flops, synced_clock
from probeprune.model.passes import find_decoder
from probeprune.progress import Progress
from probeprune.provenance import dtype_name
from probeprune.runtime.handle import attach
from probeprune.strategies.allocation import removed_parameters

Figures = dict[str, Any]
"""One line: a method, a stage (prefill or decode) and a point of the grid."""


@dataclass(frozen=True)
class Point:
    """A batch size and a length, in tokens, of the prompt."""

    batch_size: int
    length: int


@dataclass
class _Run:
    """What one method gave in all rounds."""

    seconds: dict[str, list[float]]
    memory: int = 0
    flops: int = 0
    weights: int = 0
    cache: int = 0
    profile: dict[str, dict[str, float]] | None = None


def measure(
    target: Target,
    methods: Sequence[Method],
    ratio: float,
    point: Point,
    *,
    known: Mapping[str, Statistics],
    new_tokens: int,
    rounds: int,
    progress: Progress,
) -> list[Figures]:
    """Two lines, prefill and decode, for dense and for each method.

    Args:
        target: the model.
        methods: what to set beside dense.
        ratio: pruning ratio.
        point: of the grid.
        known: by method name, what it needs to know of the target.
        new_tokens: tokens decoded behind the prompt, one at a time; 0 measures prefill alone.
        rounds: at least 1; each runs another batch. One more runs before, for profiles and counts.
        progress: called with (what, done, total).
    """
    everything = [METHODS["dense"], *(m for m in methods if m.when != "never")]
    runs = {m.name: _Run({"prefill": [], "decode": []}) for m in everything}
    windows = target.windows((rounds + 2) * point.batch_size, point.length + new_tokens)
    batches = [b.to(target.device) for b in windows.split(point.batch_size)]
    what = f"{point.batch_size} x {point.length}"
    for done, (before, batch) in enumerate(pairwise(batches)):
        for m in everything:
            with attach(target.model, m, ratio, statistics=known.get(m.name)) as handle:
                # The batch before sets the machine up; what this one swaps is then what it swaps in use.
                _prefill(target, before[: max(1, point.batch_size // 4), : point.length])
                if done:
                    with PeakMemory(target.device) as peak:
                        _round(target, batch, point.length, runs[m.name])
                    runs[m.name].memory = max(runs[m.name].memory, peak.bytes)
                else:
                    _first_round(target, handle.blocks, batch, point.length, runs[m.name])
                    runs[m.name].weights = _weight_bytes(target, handle)
        progress(what, done, rounds)
    shared = {
        "model": target.name,
        "ratio": ratio,
        **vars(point),
        "new_tokens": new_tokens,
        "rounds": rounds,
        "dtype": dtype_name(target.dtype),
        "device": str(target.device),
        "threads": torch.get_num_threads(),
    }
    stages = ("prefill", "decode") if new_tokens else ("prefill",)
    return [
        {**shared, "method": name, "stage": stage, **_figures(stage, point, run, runs["dense"])}
        for stage in stages
        for name, run in runs.items()
    ]


def _prefill(target: Target, ids: torch.Tensor) -> DynamicCache:
    cache = DynamicCache(config=target.model.config)
    with torch.inference_mode():
        find_decoder(target.model)(input_ids=ids, past_key_values=cache)
    return cache


def _step(target: Target, ids: torch.Tensor, cache: DynamicCache) -> None:
    with torch.inference_mode():
        find_decoder(target.model)(input_ids=ids, past_key_values=cache)


def _round(target: Target, batch: torch.Tensor, length: int, run: _Run) -> None:
    """Time one prompt and the tokens behind it."""
    times = [synced_clock(target.device)]
    cache = _prefill(target, batch[:, :length])
    times.append(synced_clock(target.device))
    steps = batch[:, length:].split(1, dim=1) if batch.shape[1] > length else ()
    for token in steps:
        _step(target, token, cache)
    times.append(synced_clock(target.device))
    run.seconds["prefill"].append(times[1] - times[0])
    if steps:
        run.seconds["decode"].append((times[2] - times[1]) / len(steps))


def _first_round(
    target: Target, blocks: Sequence[Block], batch: torch.Tensor, length: int, run: _Run
) -> None:
    """Count and profile: neither may be on while time is taken."""
    prompt, token = batch[:, :length], batch[:, -1:]
    with counting_flops() as counted:
        _prefill(target, prompt)
    run.flops = counted.flops
    profile, cache = profiled(blocks, target.device, lambda: _prefill(target, prompt))
    run.profile = {"prefill": profile}
    run.cache = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    if batch.shape[1] > length:
        _step(target, token, cache)
        run.profile["decode"], _ = profiled(blocks, target.device, lambda: _step(target, token, cache))


def _weight_bytes(target: Target, handle: Any) -> int:
    """Bytes of the decoder layers' weights that a pass reads."""
    gone = removed_parameters(handle.blocks, handle.kept)
    return target.dtype.itemsize * (sum(b.parameters for b in handle.blocks) - gone)


def _figures(stage: str, point: Point, run: _Run, dense: _Run) -> Figures:
    """Work is FLOPs in prefill, and the bytes of weights and cache that a step reads in decode: what bounds
    either at its best."""
    speedups = [d / s for d, s in zip(dense.seconds[stage], run.seconds[stage], strict=True)]
    speedup = statistics.median(speedups)
    if stage == "prefill":
        work, tokens = run.flops / dense.flops, point.batch_size * point.length
    else:
        work, tokens = (run.weights + run.cache) / (dense.weights + dense.cache), point.batch_size
    assert run.profile is not None
    profile = run.profile[stage]
    seconds = statistics.median(run.seconds[stage])
    return {
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "speedup": speedup,
        "speedup_range": [min(speedups), max(speedups)],
        "work_share": work,
        "efficiency": speedup * work,
        "overhead_share": sum(profile.get(s, 0.0) for s in OVERHEAD) / sum(profile.values()),
        "profile_ms": profile,
        "peak_memory": run.memory,
        "memory_over_dense": run.memory / dense.memory,
        "cache_bytes": run.cache,
        "cache_over_dense": run.cache / dense.cache,
    }
