"""Measure one point of the grid: dense and every method in turn, prefill and decode.

Each round runs all of them on the same batch, so that drift in the machine's speed affects all alike; ratios
are medians over rounds of that round's ratio to dense. Only the decoder is measured, without embedding and
head, which pruning leaves alone. With compiled layers every method has a copy of the model, so that it is
compiled once.
"""

import copy
import statistics
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from transformers import DynamicCache

from probeprune.bench.lines import BenchLine, Measured, PhaseName
from probeprune.bench.profiling import profiled
from probeprune.bench.targets import Target
from probeprune.methods import METHODS, Method
from probeprune.model.blocks import Block
from probeprune.model.cost import PeakMemory, counting_flops, synced_clock
from probeprune.model.passes import cache_argument, find_decoder
from probeprune.prepare import Calibration
from probeprune.progress import Progress
from probeprune.provenance import dtype_name
from probeprune.ranges import check_fields, plain
from probeprune.runtime.attaching import attach
from probeprune.runtime.compiled import check_compilable
from probeprune.runtime.handle import Handle
from probeprune.stages import OVERHEAD
from probeprune.strategies.allocation import removed_parameters


@dataclass(frozen=True)
class GridPoint:
    """A batch size, and the length of the prompt in tokens. Raises `UsageError` for values out of range."""

    batch_size: int
    length: int

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass
class _Run:
    """The measurements of one method over all rounds."""

    seconds: dict[PhaseName, list[float]]
    memory: int = 0
    flops: int = 0
    weights: int = 0
    cache: int = 0
    profile: dict[PhaseName, dict[str, float]] | None = None


def measure_point(
    target: Target,
    methods: Sequence[Method],
    ratio: float,
    point: GridPoint,
    *,
    calibration: Calibration | None,
    new_tokens: int,
    rounds: int,
    progress: Progress,
    compile: bool = False,
) -> list[BenchLine]:
    """Measure dense and each method; a line for prefill and one for decode, for each.

    Args:
        target: the model.
        methods: compared with dense.
        ratio: pruning ratio.
        point: batch size and prompt length.
        calibration: prepared for these methods at this ratio.
        new_tokens: tokens decoded after the prompt, one at a time; 0 measures prefill alone.
        rounds: at least 1, each on another batch. One more round runs first, for profiles and counts.
        progress: called with (what, done, total).
        compile: whether all are timed with compiled layers, dense too. FLOPs, memory and profiles are those
            of uncompiled passes.

    Raises `UsageError` for `compile` where the model cannot be compiled.
    """
    if compile:
        check_compilable(target.model)
    everything = [METHODS["dense"], *(m for m in methods if m.when.prunes)]
    runs = {m.name: _Run({"prefill": [], "decode": []}) for m in everything}
    new_tokens, rounds = plain("new_tokens", new_tokens), plain("rounds", rounds)
    windows = target.windows((rounds + 2) * point.batch_size, point.length + new_tokens)
    batches = [b.to(target.device) for b in windows.split(point.batch_size)]
    with ExitStack() as stack:

        def ready(m: Method, previous: torch.Tensor) -> AbstractContextManager[Handle]:
            return _warm(target, m, ratio, calibration, previous, point)

        for m in everything:
            with ready(m, batches[0]) as handle:
                _first_round(target, handle, batches[1], point.length, runs[m.name])
        progress(f"{point.batch_size} x {point.length}", 0, rounds)
        kept: dict[str, Target] = {}
        if compile:
            for m in everything:
                own = _compiled(target, m, ratio, calibration, batches[1], point.length)
                kept[m.name] = stack.enter_context(own)
        for done, (previous, batch) in enumerate(pairwise(batches[1:]), start=1):
            for m in everything:
                with nullcontext() if compile else ready(m, previous):
                    _round(kept.get(m.name, target), batch, point.length, runs[m.name])
            progress(f"{point.batch_size} x {point.length}", done, rounds)
    phases: tuple[PhaseName, ...] = ("prefill", "decode") if new_tokens else ("prefill",)
    return [
        {
            "model": target.name,
            "ratio": ratio,
            "batch_size": point.batch_size,
            "length": point.length,
            "new_tokens": new_tokens,
            "rounds": rounds,
            "dtype": dtype_name(target.dtype),
            "device": str(target.device),
            "threads": torch.get_num_threads(),
            "compiled": compile,
            "method": name,
            "phase": phase,
            **_figures(phase, point, run, runs["dense"]),
        }
        for phase in phases
        for name, run in runs.items()
    ]


@contextmanager
def _warm(
    target: Target,
    method: Method,
    ratio: float,
    calibration: Calibration | None,
    batch: torch.Tensor,
    point: GridPoint,
) -> Iterator[Handle]:
    """The target under a method that has seen a batch, so that its next swaps are those of steady use."""
    with attach(target.model, method, ratio, calibration=calibration) as handle:
        _prefill(target, batch[: max(1, point.batch_size // 4), : point.length])
        yield handle


@contextmanager
def _compiled(
    target: Target,
    method: Method,
    ratio: float,
    calibration: Calibration | None,
    batch: torch.Tensor,
    length: int,
) -> Iterator[Target]:
    """A copy of the target under a method, compiled for rounds on batches of this shape."""
    own = replace(target, model=copy.deepcopy(target.model))
    with attach(own.model, method, ratio, calibration=calibration, compile=True):
        for _ in range(2):  # torch compiles a size that changes once more, to leave it open
            _round(own, batch, length, _Run({"prefill": [], "decode": []}))
        yield own


def _decode(target: Target, ids: torch.Tensor, cache: DynamicCache) -> None:
    decoder = find_decoder(target.model)
    decoder(input_ids=ids, **{cache_argument(decoder): cache})


def _prefill(target: Target, ids: torch.Tensor) -> DynamicCache:
    cache = DynamicCache(config=target.model.config)
    with torch.inference_mode():
        _decode(target, ids, cache)
    return cache


def _step(target: Target, ids: torch.Tensor, cache: DynamicCache) -> None:
    with torch.inference_mode():
        _decode(target, ids, cache)


def _round(target: Target, batch: torch.Tensor, length: int, run: _Run) -> None:
    """Time one prompt and the tokens after it."""
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


def _first_round(target: Target, handle: Handle, batch: torch.Tensor, length: int, run: _Run) -> None:
    """Count FLOPs, measure memory and profile. All slow a pass down, so they are off in the timed rounds."""
    prompt, token = batch[:, :length], batch[:, -1:]
    blocks = [b for b in handle.blocks if isinstance(b, Block)]
    run.weights = _weight_bytes(target, handle)
    with PeakMemory(target.device) as peak, counting_flops() as counted:
        _prefill(target, prompt)
    run.flops, run.memory = counted.flops, peak.bytes
    profile, cache = profiled(blocks, target.device, lambda: _prefill(target, prompt))
    run.profile = {"prefill": profile}
    run.cache = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    if batch.shape[1] > length:
        _step(target, token, cache)
        run.profile["decode"], _ = profiled(blocks, target.device, lambda: _step(target, token, cache))


def _weight_bytes(target: Target, handle: Handle) -> int:
    """Bytes of the decoder layers' weights that a pass reads."""
    removed = removed_parameters(handle.blocks, handle.widths)
    return target.dtype.itemsize * (sum(b.parameters for b in handle.blocks) - removed)


def _figures(phase: PhaseName, point: GridPoint, run: _Run, dense: _Run) -> Measured:
    """The measured part of a line.

    Work bounds the speed-up at its best: FLOPs in prefill; in decode, the bytes of weights and cache that a
    step reads.
    """
    speedups = [d / s for d, s in zip(dense.seconds[phase], run.seconds[phase], strict=True)]
    speedup = statistics.median(speedups)
    if phase == "prefill":
        work, tokens = run.flops / dense.flops, point.batch_size * point.length
    else:
        work, tokens = (run.weights + run.cache) / (dense.weights + dense.cache), point.batch_size
    assert run.profile is not None
    profile = run.profile[phase]
    seconds = statistics.median(run.seconds[phase])
    return {
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "speedup": speedup,
        "speedup_range": [min(speedups), max(speedups)],
        "work_share": work,
        "efficiency": speedup * work,
        "overhead_share": sum(profile[stage.name] for stage in OVERHEAD) / sum(profile.values()),
        "profile_ms": profile,
        "peak_memory": run.memory,
        "memory_over_dense": run.memory / dense.memory,
        "cache_bytes": run.cache,
        "cache_over_dense": run.cache / dense.cache,
    }
