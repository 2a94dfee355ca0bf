"""The figures for people: a table a stage, a profile, and a plot. Made from the lines alone."""

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from probeprune.bench.measure import Figures
from probeprune.bench.profiling import PARTS

LEGEND = {
    "prefill": "speed-up: median over rounds of that round's dense time over the method's; work: decoder "
    "FLOPs over dense, a probe included; efficiency: speed-up x work, 1 where FLOPs saved are time saved; "
    "overhead: share of the pass that is choosing, scoring, swapping, refitting and history",
    "decode": "one token at a time behind the prompt; work: bytes of weights and KV cache that a step reads, "
    "over dense; efficiency: speed-up x work; KV cache: its bytes over dense; memory: peak over dense",
}
PARTS_LEGEND = (
    "attention, mlp: the blocks' own arithmetic; run_ahead: the probe; choose, score, swap, history: what "
    "else a dynamic method does; rest: norms, residuals, Python. One pass each under the profiler, which "
    "takes time itself: compare parts with each other, not with the tables above."
)
_COLUMNS = {
    "prefill": ("work", "efficiency", "overhead"),
    "decode": ("work", "efficiency", "KV cache", "memory"),
}
_GRID = {"dtype": "dtype", "threads": "threads", "batch": "batch_size", "length": "length"}


def tables(figures: Sequence[Figures]) -> list[Table]:
    """One table for prefill and one for decode."""
    stages = dict.fromkeys(f["stage"] for f in figures)
    return [_table([f for f in figures if f["stage"] == stage], stage) for stage in stages]


def _table(figures: Sequence[Figures], stage: str) -> Table:
    first = figures[0]
    title = f"{stage}: {first['model']}, {first['dtype']}, {first['device']}, {first['threads']} threads"
    varying = [g for g, key in _GRID.items() if len({f[key] for f in figures}) > 1]
    grid = [g for g in _GRID if g in varying or g in ("batch", "length")]
    if len(grid) > 2:
        title = f"{stage}: {first['model']}, {first['device']}"
    title += f", {first['rounds']} interleaved rounds"
    if stage == "decode":
        title += f" of {first['new_tokens']} tokens"
    result = Table(title=title, title_justify="left", caption=LEGEND[stage], caption_justify="left")
    for name in (*grid, "method", "pruned", "tokens/s", "speed-up", "range", *_COLUMNS[stage]):
        result.add_column(name, justify="left" if name in ("dtype", "method") else "right", no_wrap=True)
    last: tuple[str, ...] | None = None
    for f in figures:
        where = tuple(str(f[_GRID[g]]) for g in grid)
        if last not in (None, where):
            result.add_section()
        low, high = f["speedup_range"]
        own = {
            "work": f"{f['work_share']:.1%}",
            "efficiency": f"{f['efficiency']:.2f}",
            "overhead": f"{f['overhead_share']:.1%}",
            "KV cache": f"{f['cache_over_dense']:.1%}",
            "memory": f"{f['memory_over_dense']:.3f}x",
        }
        result.add_row(
            *(where if where != last else ("",) * len(where)),
            f["method"],
            "-" if f["method"] == "dense" else f"{f['ratio']:.0%}",
            f"{f['tokens_per_second']:.1f}",
            f"{f['speedup']:.2f}x",
            f"{low:.2f}-{high:.2f}",
            *(own[c] for c in _COLUMNS[stage]),
        )
        last = where
    return result


def profile_table(figures: Sequence[Figures]) -> Table:
    """Milliseconds of one pass, by part: a row a line of the figures."""
    result = Table(
        title="milliseconds of one pass", title_justify="left", caption=PARTS_LEGEND, caption_justify="left"
    )
    grid = [g for g, key in _GRID.items() if g in ("batch", "length") or len({f[key] for f in figures}) > 1]
    for name in ("stage", *grid, "method"):
        result.add_column(name, no_wrap=True)
    for name in (*PARTS, "sum"):
        result.add_column(name, justify="right", no_wrap=True)
    last = None
    for f in figures:
        where = (f["stage"], *(str(f[_GRID[g]]) for g in grid))
        if last not in (None, where):
            result.add_section()
        parts = [f["profile_ms"][part] for part in PARTS]
        result.add_row(
            *(where if where != last else ("",) * len(where)),
            f["method"],
            *(f"{ms:.1f}" if ms else "-" for ms in [*parts, sum(parts)]),
        )
        last = where
    return result


def plot(figures: Sequence[Figures], path: Path) -> list[Path]:
    """Speed-up by method at every point of the grid, as PNG and SVG beside `path`, with a dash where it would
    be if all work saved were time saved. Returns the files written; none where dense is alone."""
    from matplotlib.figure import Figure

    pruned = [f for f in figures if f["method"] != "dense"]
    if not pruned:
        return []
    stages = list(dict.fromkeys(f["stage"] for f in pruned))
    names = list(dict.fromkeys(f["method"] for f in pruned))
    places = list(dict.fromkeys(_place(f, figures) for f in pruned))
    figure = Figure(figsize=(3.5 + 1.2 * len(places) * len(stages), 4), layout="constrained")
    # Okabe and Ito's colours: told apart by colour-blind readers too.
    colours = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
    width = 0.8 / len(names)
    for axes, stage in zip(
        figure.subplots(1, len(stages), squeeze=False, sharey=True)[0], stages, strict=True
    ):
        for f in (f for f in pruned if f["stage"] == stage):
            i = names.index(f["method"])
            x = places.index(_place(f, figures)) + (i - (len(names) - 1) / 2) * width
            low, high = f["speedup_range"]
            axes.bar(x, f["speedup"], 0.9 * width, color=colours[i % len(colours)])
            axes.vlines(x, low, high, color="black", linewidth=1)
            axes.plot(x, 1 / f["work_share"], "_", color="black", markersize=14)
        axes.axhline(1, color="grey", linewidth=0.8, linestyle=":")
        axes.set_xticks(range(len(places)), places, fontsize=8)
        axes.set_title(stage, fontsize=10)
        axes.grid(axis="y", alpha=0.25)
    axes = figure.axes[0]
    axes.set_ylabel("speed-up over dense (dash: all work saved)")
    handles = [axes.bar(0, 0, color=colours[i % len(colours)], label=n) for i, n in enumerate(names)]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(names), frameon=False)
    first = pruned[0]
    figure.suptitle(f"{first['model']}, {first['ratio']:.0%} pruned, {first['device']}", fontsize=10)
    written = [path.with_suffix(".png"), path.with_suffix(".svg")]
    for file in written:
        figure.savefig(file, dpi=150)
    return written


def _place(f: Figures, figures: Sequence[Figures]) -> str:
    """A point of the grid, with what differs over it."""
    lines = [f"{f['batch_size']} x {f['length']}"]
    if len({g["dtype"] for g in figures}) > 1:
        lines.append(f["dtype"])
    if len({g["threads"] for g in figures}) > 1:
        lines.append(f"{f['threads']} threads")
    return "\n".join(lines)
