"""How close speed comes to its limit: measured speed-up times work left, by case, with goals and profiles.

Run: MALLOC_TRIM_THRESHOLD_=4294967296 MALLOC_MMAP_THRESHOLD_=4294967296 \\
     .venv/bin/python benchmarks/speed.py --dtypes bfloat16,float32 --threads 2

About 20 minutes per dtype on 2 cores; `--cases` selects cases. Work is FLOPs (probe included) in prefill and
bytes of weights and cache in decoding, over the dense model's; all ratios are medians over rounds in which
dense and pruned take turns. The profile is of one pass, in milliseconds.
"""

import argparse
import dataclasses
from dataclasses import dataclass

import torch

import probeprune
from probeprune.bench.lines import BenchLine
from probeprune.bench.measure import GridPoint, measure_point
from probeprune.bench.profiling import PARTS
from probeprune.bench.targets import Target, from_loaded, of_shape

RATIO = 0.4


@dataclass(frozen=True)
class Case:
    """One line of the table: the measurement, and the minimum efficiency as its goal."""

    method: str
    phase: str
    point: GridPoint
    goal: float
    new_tokens: int = 0
    shape: str | None = None
    """Two layers of this shape in place of SmolLM2-135M."""


CASES = {
    "static": Case("ppsp", "prefill", GridPoint(16, 512), 0.95),
    "probe": Case("probe", "prefill", GridPoint(16, 512), 0.90),
    "large": Case("probe", "prefill", GridPoint(4, 1024), 0.95, shape="llama-2-7b"),
    "decode": Case("probe", "decode", GridPoint(1, 512), 0.85, new_tokens=128),
}
OVERHEAD, MEMORY = 0.02, 1.02
"""Maximum share of choosing, scoring, swapping and history; maximum peak memory over dense."""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--dtypes", default="bfloat16,float32")
    options.add_argument("--threads", type=int, default=torch.get_num_threads())
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--cases", default=",".join(CASES))
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    print(f"{given.threads} threads, {given.rounds} rounds, ratio {RATIO:.0%}")
    for dtype in given.dtypes.split(","):
        for name in given.cases.split(","):
            report(name, CASES[name], dtype, given.rounds)


def report(name: str, case: Case, dtype: str, rounds: int) -> None:
    """Run one case and print its lines."""
    method = probeprune.METHODS[case.method]
    if case.shape is not None:
        method = dataclasses.replace(method, skip_layers=0)
    target = load(case, dtype)
    windows = target.windows(8, case.point.length)
    prepared = probeprune.prepare(target.model, method, RATIO, windows, batch_size=4)
    with probeprune.attach(target.model, method, RATIO, calibration=prepared) as handle:
        heads = [
            k / b.units for b, k in zip(handle.blocks, handle.widths, strict=True) if b.kind == "attention"
        ]
    lines = measure_point(
        target,
        [method],
        RATIO,
        case.point,
        calibration=prepared,
        new_tokens=case.new_tokens,
        rounds=rounds,
        progress=lambda what, done, total: None,
    )
    dense, pruned = (
        next(f for f in lines if f["method"] == m and f["phase"] == case.phase)
        for m in ("dense", case.method)
    )
    point = f"{case.point.batch_size} x {case.point.length}"
    print(f"\n{name}: {case.method}, {case.phase} of {point}, {target.name}, {dtype}")
    low, high = pruned["speedup_range"]
    work, efficiency = pruned["work_share"], pruned["efficiency"]
    overhead, memory = pruned["overhead_share"], pruned["memory_over_dense"]
    cache, kept = pruned["cache_over_dense"], sum(heads) / len(heads)
    print(f"  speed-up    {pruned['speedup']:.3f}x ({low:.3f}-{high:.3f}) at {work:.1%} of the work")
    print(f"  efficiency  {efficiency:.3f}   {against(efficiency, case.goal, case.goal)}")
    print(f"  overhead    {overhead:.2%}   {against(OVERHEAD, overhead, OVERHEAD)}")
    size = f"{dense['peak_memory'] / 2**20:.0f} MiB"
    print(f"  memory      {memory:.3f}x of {size}   {against(MEMORY, memory, MEMORY)}")
    print(f"  KV cache    {cache:.2%}; key-value heads kept: {kept:.2%}")
    for f in (dense, pruned):
        print(f"  profile of {f['method']:<7}{profile(f)}", flush=True)


def load(case: Case, dtype: str) -> Target:
    """The model of a case."""
    if case.shape is None:
        return from_loaded(probeprune.load_model("smollm2-135m", dtype=dtype, device="cpu"))
    return of_shape(case.shape, 2, getattr(torch, dtype), torch.device("cpu"))


def against(larger: float, smaller: float, goal: float) -> str:
    """Whether a goal is met."""
    return f"goal {goal:g}: {'met' if larger >= smaller else 'missed'}"


def profile(f: BenchLine) -> str:
    """Milliseconds by part."""
    parts = f["profile_ms"]
    return ", ".join(f"{p} {parts[p]:.1f}" for p in PARTS if parts[p]) + f"; sum {sum(parts.values()):.1f}"


if __name__ == "__main__":
    main()
