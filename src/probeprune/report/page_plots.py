"""The charts of the page: a summary in, SVG out, with tables of figures that no other table has."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from probeprune.report import svg_charts
from probeprune.report.plot_data import (
    QUALITY_LABEL,
    CostAxis,
    Interval,
    dense_accuracy,
    quality_points,
    task_bars,
)
from probeprune.report.summary import Entry, Summary
from probeprune.result_lines import UnitRecord
from probeprune.stages import MODEL, STAGES


@dataclass(frozen=True)
class Figure:
    """A chart with its caption, a note on its source, and a table of its figures.

    Attributes:
        table: (row header, cells) each; empty where the main table has the figures.
    """

    caption: str
    svg: Markup
    note: str = ""
    table: tuple[tuple[str, tuple[str, ...]], ...] = ()


def quality_plot(summary: Summary, text: str, axis: CostAxis) -> Figure | None:
    """Perplexity on a text against a cost; None with fewer than two points."""
    points = [
        svg_charts.ScatterPoint(
            point.cost.value,
            point.perplexity.value,
            f"{point.entry.title}: perplexity {point.perplexity.value:.2f}, "
            f"{axis.unit} {point.cost.value:.1f}% of dense",
            summary.series(point.entry),
            _range(point.cost),
            _range(point.perplexity),
        )
        for point in quality_points(summary, text, axis)
    ]
    if len(points) < 2:
        return None
    title, description = f"Perplexity on {text} against {axis.unit}", "; ".join(p.tooltip for p in points)
    return Figure(text, svg_charts.scatter(points, axis.label, QUALITY_LABEL, title, description))


def _range(interval: Interval) -> svg_charts.Range | None:
    return (interval.low, interval.high) if interval.low < interval.high else None


def task_plot(summary: Summary, task: str) -> Figure | None:
    """Accuracy on a task: a group of bars for each ratio, dense as a line; None for dense alone."""
    groups = []
    for ratio, entries in summary.ratios.items():
        bars = []
        for bar in task_bars(summary, task, entries):
            error = "" if bar.spread is None else f" ± {bar.spread:.1f}"
            tooltip = f"{bar.entry.title}: {bar.value:.1f}{error}"
            bars.append(svg_charts.Bar(bar.value, bar.spread, tooltip, summary.labels.index(bar.entry.label)))
        if bars:
            groups.append((f"{ratio:.0%}" if ratio else "not pruned", bars))
    if not groups:
        return None
    dense = dense_accuracy(summary, task)
    reference = None if dense is None else (dense, f"dense {dense:.1f}")
    words = [bar.tooltip for _, bars in groups for bar in bars] + ([reference[1]] if reference else [])
    return Figure(task, svg_charts.bars(groups, reference, f"Accuracy on {task}, %", "; ".join(words)))


def units_map(entry: Entry) -> Figure | None:
    """How often the entry's units were kept, from the first of its lines that records it."""
    line = next((line for line in entry.lines if line.get("units")), None)
    if line is None:
        return None
    by_layer: dict[int, dict[str, UnitRecord]] = {}
    for unit in line["units"]:
        by_layer.setdefault(unit["layer"], {})[unit["kind"]] = unit
    layers = [_layer(index, kinds) for index, kinds in sorted(by_layer.items())]
    table = tuple((str(index), _layer_cells(kinds)) for index, kinds in sorted(by_layer.items()))
    batches = line["units"][0].get("batches", 1)
    when = f"{batches} batches" if batches > 1 else "chosen once"
    note = f"{line['task']}, seed {line.get('seed', 0)}, {when}"
    title = f"How often units were kept: {entry.title}"
    description = f"{len(layers)} layers; {note}; the table below has the figures"
    return Figure(entry.label, svg_charts.heat_map(layers, title, description), note, table)


def _layer(index: int, kinds: Mapping[str, UnitRecord]) -> svg_charts.Layer:
    heads, channels = kinds.get("attention"), kinds.get("mlp")
    words = [
        f"{unit['kept']:g} of {unit['of']} {noun} kept, {100 * unit.get('changed', 0.0):.1f}% new per batch"
        for unit, noun in ((heads, "heads"), (channels, "channels"))
        if unit
    ]
    return svg_charts.Layer(
        str(index),
        heads and heads["frequency"],
        channels and channels["frequency"],
        heads.get("changed", 0.0) if heads else 0.0,
        channels.get("changed", 0.0) if channels else 0.0,
        f"layer {index}: {'; '.join(words)}",
    )


def _layer_cells(kinds: Mapping[str, UnitRecord]) -> tuple[str, ...]:
    cells: list[str] = []
    for kind in ("attention", "mlp"):
        unit = kinds.get(kind)
        if unit is None:
            cells += ["-", "-", "-"]
            continue
        frequencies = " ".join(f"{100 * f:.0f}" for f in unit["frequency"])
        cells += [f"{unit['kept']:g} of {unit['of']}", f"{100 * unit.get('changed', 0.0):.1f}%", frequencies]
    return tuple(cells)


def stages_plot(summary: Summary) -> Figure | None:
    """Prefill time in percent of dense, split by the profiled shares of the stages; None without profiles."""
    if not any(e.cost.stages for e in summary.entries):
        return None
    rows, table = [], []
    for entry in summary.entries:
        if entry.cost.prefill is None or not (entry.cost.stages or entry.dense):
            continue
        total = 100 / entry.cost.prefill.value
        shares = [(stage, entry.cost.stages.get(stage.name, 0.0)) for stage in STAGES]
        added = sum(share for _, share in shares)
        split = [(MODEL, 1 - added), *shares]
        rows.append(
            svg_charts.Stack(
                entry.title,
                [(s.name, share * total, f"{s.label}: {100 * share:.1f}% of its time") for s, share in split],
                f"{total:.0f}" + (f" ({100 * added:.1f}% in stages)" if added else ""),
            )
        )
        table.append((entry.title, (f"{total:.1f}", *(f"{100 * share:.1f}%" for _, share in split))))
    description = "; ".join(f"{label}: {cells[0]}% of the dense time" for label, cells in table)
    svg = svg_charts.stacks(rows, "Where the prefill time goes", description)
    return Figure("", svg, table=tuple(table))


def series_legend(summary: Summary) -> Sequence[tuple[str, Markup]]:
    """The labels of methods with results, and their marks."""
    shown = {e.label for e in summary.entries if e.lines}
    dense = [("dense", svg_charts.glyph(None))] if summary.dense is not None else []
    return dense + [(label, svg_charts.glyph(i)) for i, label in enumerate(summary.labels) if label in shown]
