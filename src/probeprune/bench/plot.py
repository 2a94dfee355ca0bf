"""The plot of bench lines: speed-up by method, as PNG and SVG. Made from the lines alone."""

from collections.abc import Sequence
from pathlib import Path

from probeprune.bench.lines import BenchLine
from probeprune.foreign.extras import extra
from probeprune.places import replacing
from probeprune.report.palette import style


def plot(lines: Sequence[BenchLine], path: Path) -> list[Path]:
    """Speed-up by method at every point of the grid, as PNG and SVG beside `path`.

    A dash marks the speed-up at which all work saved would be time saved. Returns the files written; none
    where only dense was measured.
    """
    with extra("report"):
        from matplotlib.figure import Figure

    pruned = [line for line in lines if line["method"] != "dense"]
    if not pruned:
        return []
    phases = list(dict.fromkeys(line["phase"] for line in pruned))
    names = list(dict.fromkeys(line["method"] for line in pruned))
    points = list(dict.fromkeys(_point(line, lines) for line in pruned))
    colours = {name: style(series).light for series, name in enumerate(names)}
    figure = Figure(figsize=(3.5 + 1.2 * len(points) * len(phases), 4), layout="constrained")
    width = 0.8 / len(names)
    panels = figure.subplots(1, len(phases), squeeze=False, sharey=True)[0]
    for axes, phase in zip(panels, phases, strict=True):
        for line in (line for line in pruned if line["phase"] == phase):
            offset = names.index(line["method"]) - (len(names) - 1) / 2
            x = points.index(_point(line, lines)) + offset * width
            low, high = line["speedup_range"]
            axes.bar(x, line["speedup"], 0.9 * width, color=colours[line["method"]])
            axes.vlines(x, low, high, color="black", linewidth=1)
            axes.plot(x, 1 / line["work_share"], "_", color="black", markersize=14)
        axes.axhline(1, color="grey", linewidth=0.8, linestyle=":")
        axes.set_xticks(range(len(points)), points, fontsize=8)
        axes.set_title(phase, fontsize=10)
        axes.grid(axis="y", alpha=0.25)
    panels[0].set_ylabel("speed-up over dense (dash: all work saved is time saved)")
    handles = [panels[0].bar(0, 0, color=colour, label=name) for name, colour in colours.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(names), frameon=False)
    first = pruned[0]
    figure.suptitle(f"{first['model']}, {first['ratio']:.0%} pruned, {first['device']}", fontsize=10)
    written = [path.with_suffix(".png"), path.with_suffix(".svg")]
    for file in written:
        with replacing(file) as partial:
            figure.savefig(partial, dpi=150)
    return written


def _point(line: BenchLine, lines: Sequence[BenchLine]) -> str:
    """The words for a point of the grid, with the settings that vary over it."""
    words = [f"{line['batch_size']} x {line['length']}"]
    if len({other["dtype"] for other in lines}) > 1:
        words.append(line["dtype"])
    if len({other["threads"] for other in lines}) > 1:
        words.append(f"{line['threads']} threads")
    return "\n".join(words)
