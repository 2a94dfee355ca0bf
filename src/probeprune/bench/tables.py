"""Tables of bench lines for a terminal: one a phase, and one of profiles. Made from the lines alone."""

from collections.abc import Sequence

from rich.table import Table

from probeprune.bench.lines import BenchLine, PhaseName
from probeprune.bench.profiling import PARTS
from probeprune.stages import OVERHEAD, STAGES

_CAPTIONS: dict[PhaseName, str] = {
    "prefill": "speed-up: median over rounds of that round's dense time over the method's; work: decoder "
    "FLOPs over dense, including the probe; efficiency: speed-up x work, 1 where all FLOPs saved are time "
    f"saved; overhead: share of the pass spent on {', '.join(stage.label for stage in OVERHEAD)}",
    "decode": "one token at a time after the prompt; work: bytes of weights and KV cache that a step reads, "
    "over dense; efficiency: speed-up x work; KV cache: its bytes over dense; memory: peak over dense",
}
PROFILE_CAPTION = (
    "attention, mlp: arithmetic of the blocks; "
    f"{'; '.join(f'{stage.name}: {stage.label}' for stage in STAGES)}; rest: norms, residuals, Python. One "
    "pass each under the profiler, which takes time itself: compare parts with each other, not with the "
    "tables above."
)
_COLUMNS: dict[PhaseName, tuple[str, ...]] = {
    "prefill": ("work", "efficiency", "overhead"),
    "decode": ("work", "efficiency", "KV cache", "memory"),
}


def grid_values(line: BenchLine) -> dict[str, str]:
    """The settings that a run of bench may vary, by column name."""
    return {
        "dtype": line["dtype"],
        "threads": str(line["threads"]),
        "batch": str(line["batch_size"]),
        "length": str(line["length"]),
    }


def _grid(lines: Sequence[BenchLine]) -> list[str]:
    """The columns that name a point of the grid: batch and length always, the others where they vary."""
    values = [grid_values(line) for line in lines]
    return [name for name in values[0] if name in ("batch", "length") or len({v[name] for v in values}) > 1]


def tables(lines: Sequence[BenchLine]) -> list[Table]:
    """One table for prefill and one for decode."""
    phases = dict.fromkeys(line["phase"] for line in lines)
    return [_table([line for line in lines if line["phase"] == phase], phase) for phase in phases]


def _table(lines: Sequence[BenchLine], phase: PhaseName) -> Table:
    first, grid = lines[0], _grid(lines)
    title = f"{phase}: {first['model']}, {first['dtype']}, {first['device']}, {first['threads']} threads"
    if len(grid) > 2:
        title = f"{phase}: {first['model']}, {first['device']}"
    title += f"{', compiled' * first['compiled']}, {first['rounds']} interleaved rounds"
    if phase == "decode":
        title += f" of {first['new_tokens']} tokens"
    table = Table(title=title, title_justify="left", caption=_CAPTIONS[phase], caption_justify="left")
    for name in (*grid, "method", "pruned", "tokens/s", "speed-up", "range", *_COLUMNS[phase]):
        table.add_column(name, justify="left" if name in ("dtype", "method") else "right", no_wrap=True)
    previous: list[str] | None = None
    for line in lines:
        point = [grid_values(line)[name] for name in grid]
        if previous not in (None, point):
            table.add_section()
        low, high = line["speedup_range"]
        cells = {
            "work": f"{line['work_share']:.1%}",
            "efficiency": f"{line['efficiency']:.2f}",
            "overhead": f"{line['overhead_share']:.1%}",
            "KV cache": f"{line['cache_over_dense']:.1%}",
            "memory": f"{line['memory_over_dense']:.3f}x",
        }
        table.add_row(
            *(point if point != previous else [""] * len(point)),
            line["method"],
            "-" if line["method"] == "dense" else f"{line['ratio']:.0%}",
            f"{line['tokens_per_second']:.1f}",
            f"{line['speedup']:.2f}x",
            f"{low:.2f}-{high:.2f}",
            *(cells[column] for column in _COLUMNS[phase]),
        )
        previous = point
    return table


def profile_table(lines: Sequence[BenchLine]) -> Table:
    """Milliseconds of one pass by part: a row for each line."""
    table = Table(
        title="milliseconds of one pass",
        title_justify="left",
        caption=PROFILE_CAPTION,
        caption_justify="left",
    )
    grid = _grid(lines)
    for name in ("phase", *grid, "method"):
        table.add_column(name, no_wrap=True)
    for name in (*PARTS, "sum"):
        table.add_column(name, justify="right", no_wrap=True)
    previous = None
    for line in lines:
        point = [line["phase"], *(grid_values(line)[name] for name in grid)]
        if previous not in (None, point):
            table.add_section()
        parts = [line["profile_ms"][part] for part in PARTS]
        table.add_row(
            *(point if point != previous else [""] * len(point)),
            line["method"],
            *(f"{ms:.1f}" if ms else "-" for ms in [*parts, sum(parts)]),
        )
        previous = point
    return table
