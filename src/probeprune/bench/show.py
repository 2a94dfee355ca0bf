"""The figures for people: a table a stage, a profile, and a plot. Made from the lines alone."""

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from probeprune.bench.measure import Figures
from probeprune.bench.profiling import PARTS

LEGEND = {
    "prefill": "speed-up: median over rounds of that round's dense time over the method's; work: decoder FLOPs "
    "over dense, the probe included; efficiency: speed-up x work, 1 where every FLOP saved is time saved; "
    "overhead: choosing, scoring, swapping and history, of the pass's time",
    "decode": "speed-up: likewise, a token at a time behind the prompt; work: bytes of weights and KV cache that a "
    "step reads, over dense; efficiency: speed-up x work; KV cache: bytes over dense; memory: peak of prefill "
    "and decode over dense",
}
_COLUMNS = {
    "prefill": ("work", "efficiency", "overhead"),
    "decode": ("work", "efficiency", "KV cache", "memory"),
}


def tables(figures: Sequence[Figures]) -> list[Table]:
    """One table for prefill and one for decode."""
    stages = dict.fromkeys(f["stage"] for f in figures)
    return [_table([f for f in figures if f["stage"] == stage], stage) for stage in stages]


def _table(figures: Sequence[Figures], stage: str) -> Table:
    first = figures[0]
    title = f"{stage}: {first['model']}, {first['device']}, {first['rounds']} interleaved rounds"
    if stage == "decode":
        title += f" of {first['new_tokens']} tokens"
    result = Table(title=title, title_justify="left", caption=LEGEND[stage], caption_justify="left")
    grid = ("dtype", "threads", "batch", "length")
    for name in (*grid, "method", "pruned", "tokens/s", "speed-up", "range", *_COLUMNS[stage]):
        result.add_column(name, justify="left" if name in ("dtype", "method") else "right", no_wrap=True)
    last = None
    for f in figures:
        where = (f["dtype"], str(f["threads"]), str(f["batch_size"]), str(f["length"]))
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
    """Milliseconds of one pass, by part; a column a line of the figures."""
    result = Table(
        title="milliseconds of one pass, by part",
        title_justify="left",
        caption=_PARTS,
        caption_justify="left",
    )
    result.add_column("part", no_wrap=True)
    for f in figures:
        where = f"{f['batch_size']} x {f['length']}" if f["stage"] == "prefill" else f"x {f['batch_size']}"
        result.add_column(f"{f['method']}\n{f['stage']}\n{where}\n{f['dtype']}", justify="right")
    for part in PARTS:
        result.add_row(part, *(_ms(f["profile_ms"][part]) for f in figures))
    result.add_section()
    result.add_row("sum", *(_ms(sum(f["profile_ms"].values())) for f in figures))
    return result


_PARTS = (
    "attention, mlp: pruned blocks' own arithmetic; run_ahead: the probe; choose, score, swap, history: the rest "
    "of a dynamic method; rest: norms, residuals, embedding, Python. One pass under the profiler, which costs "
    "time itself: compare parts, not with the tables above."
)


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:.2f}" if round(milliseconds, 2) else "-"


def plot(figures: Sequence[Figures], path: Path) -> list[Path]:
    """Speed-up by method at every point of the grid, as PNG and SVG beside `path`; a mark where all work saved
    would be time saved. Returns the files written; none where there is nothing beside dense."""
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
