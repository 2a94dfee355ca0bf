"""Figures for papers: PNG and SVG by matplotlib, from result lines alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probeprune.errors import UsageError
from probeprune.foreign.extras import extra
from probeprune.foreign.literal import visible
from probeprune.places import replacing
from probeprune.report.palette import Style, style
from probeprune.report.plot_data import (
    FLOPS,
    QUALITY_LABEL,
    TIME,
    CostAxis,
    QualityPoint,
    dense_accuracy,
    quality_points,
    ratio_label,
    task_bars,
)
from probeprune.report.summary import Summary, summarise
from probeprune.result_lines import Line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot(lines: Sequence[Line], title: str, path: Path, text: str | None = None) -> list[Path]:
    """Plot perplexity against FLOPs, one line for each method, as PNG and SVG beside `path`.

    Returns the files written; none where there is nothing to compare with the dense model.

    Args:
        lines: result lines of one model.
        title: above the figure.
        path: the file without its ending.
        text: the text that perplexity was measured on; None for the first one.

    Raises:
        UsageError: lines of more than one model, number type or device.
    """
    summaries = summarise(lines)
    if len(summaries) != 1:
        raise UsageError(f"a figure shows one model, in one number type on one device, not {len(summaries)}.")
    (summary,) = summaries
    return _quality(summary, title, path, text or next(iter(summary.texts), ""), FLOPS)


def write_figures(lines: Sequence[Line], folder: Path) -> list[Path]:
    """Write every figure that the lines allow, by model: quality against FLOPs and time, and the tasks."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    summaries = summarise(lines)
    for position, summary in enumerate(summaries, start=1):
        prefix = f"{position}-" if len(summaries) > 1 else ""
        for text, name in zip(summary.texts, _file_names(summary.texts), strict=True):
            for axis in (FLOPS, TIME):
                path = folder / f"{prefix}{name}-{axis.unit.lower()}"
                written += _quality(summary, f"{summary.model}, {text}", path, text, axis)
        written += _tasks(summary, f"{summary.model}, zero-shot", folder / f"{prefix}tasks")
    return written


def _quality(summary: Summary, title: str, path: Path, text: str, axis: CostAxis) -> list[Path]:
    with extra("report"):
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator

    points = quality_points(summary, text, axis)
    dense = next((p for p in points if p.entry.dense), None)
    if dense is None or len(points) < 2:
        return []
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for series, label in enumerate(summary.labels):
        course = sorted((p for p in points if p.entry.label == label), key=lambda p: p.entry.ratio)
        if course:
            _draw_course(axes, [dense, *course], style(series), label)
    axes.axhline(dense.perplexity.value, color="black", linewidth=0.8, linestyle=":", label="dense")
    axes.set_yscale("log")
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))  # more labels would overlap
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.yaxis.set_minor_formatter("{x:.0f}")
    axes.set_xlabel(axis.label)
    axes.set_ylabel(_plain(f"{text} {QUALITY_LABEL}"))
    axes.set_title(_plain(title), fontsize=10)
    axes.invert_xaxis()
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return _saved(figure, path)


def _draw_course(axes: "Axes", course: Sequence[QualityPoint], drawn: Style, label: str) -> None:
    """Draw the line of one method, from dense to its highest ratio."""
    costs, perplexities = [p.cost for p in course], [p.perplexity for p in course]
    across = [[c.value - c.low for c in costs], [c.high - c.value for c in costs]]
    axes.errorbar(
        [c.value for c in costs],
        [p.value for p in perplexities],
        yerr=[p.high - p.value for p in perplexities],
        xerr=across if any(map(any, across)) else None,
        marker=_marker(drawn),
        linestyle=(0, drawn.dashes) if drawn.dashes else "-",
        color=drawn.light,
        elinewidth=0.9,
        capsize=3,
        label=_plain(label),
    )


def _marker(drawn: Style) -> Any:
    """The mark as matplotlib takes it; its y axis points upwards."""
    if drawn.mark is None:
        return "o"
    return [(x, -y) for x, y in (*drawn.mark, drawn.mark[0])]


def _tasks(summary: Summary, title: str, path: Path) -> list[Path]:
    """Accuracy by task, a panel for each ratio; dense is a line across its bars."""
    with extra("report"):
        from matplotlib.figure import Figure

    measured = {
        r: [e for e in own if not e.dense and e.quality.accuracy] for r, own in summary.ratios.items()
    }
    panels = {ratio: entries for ratio, entries in measured.items() if entries}
    if not panels:
        return []
    figure = Figure(figsize=(1.5 + 1.35 * len(summary.tasks), 0.6 + 2.5 * len(panels)), layout="constrained")
    figure.suptitle(_plain(title), fontsize=10)
    all_axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axes, (ratio, entries) in zip(all_axes, panels.items(), strict=True):
        labels = [label for label in summary.labels if any(e.label == label for e in entries)]
        width = 0.8 / len(labels)
        bars = [(x, bar) for x, task in enumerate(summary.tasks) for bar in task_bars(summary, task, entries)]
        for i, label in enumerate(labels):
            own = [(x, bar) for x, bar in bars if bar.entry.label == label]
            axes.bar(
                [x - 0.4 + (i + 0.5) * width for x, _ in own],
                [bar.value for _, bar in own],
                0.9 * width,
                yerr=[bar.spread or 0.0 for _, bar in own],
                color=style(summary.labels.index(label)).light,
                error_kw={"linewidth": 0.8},
                label=_plain(label),
            )
        for x, task in enumerate(summary.tasks):
            if (dense := dense_accuracy(summary, task)) is not None:
                axes.hlines(dense, x - 0.45, x + 0.45, color="black", linewidth=0.9, linestyle=":")
        axes.set_xticks(range(len(summary.tasks)), list(map(_plain, summary.tasks)), fontsize=8)
        axes.set_ylabel(f"accuracy, %, {ratio_label(ratio)}")
        axes.grid(axis="y", alpha=0.25)
        axes.set_axisbelow(True)
        axes.legend(
            frameon=False, fontsize=7, ncols=len(labels), loc="lower center", bbox_to_anchor=(0.5, 1.0)
        )
    return _saved(figure, path)


def _saved(figure: "Figure", path: Path) -> list[Path]:
    # Not `with_suffix`: the name of a text may hold dots.
    written = [path.parent / f"{path.name}{ending}" for ending in (".png", ".svg")]
    for file in written:
        with replacing(file) as partial:
            figure.savefig(partial, dpi=150)
    return written


def _file_names(texts: Sequence[str]) -> list[str]:
    """A name for the files about each text, with a number where an earlier one has the same."""
    names = ["".join(c if c.isalnum() or c in "-_" else "-" for c in text)[:40] for text in texts]
    return [f"{name}-{i}" if name in names[:i] else name for i, name in enumerate(names)]


def _plain(words: str) -> str:
    """Words of which matplotlib reads none as mathematics, the beginning of those that no figure can hold."""
    words = visible(words, lines=True)
    return (words if len(words) <= 300 else f"{words[:299]}…").replace("$", r"\$")
