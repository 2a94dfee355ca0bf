"""The charts of a summary: which figures go into which, and the tables of what a chart cannot say exactly."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from probeprune.report import charts
from probeprune.report.reading import Row
from probeprune.report.summary import Entry, Summary

STAGES = (
    ("run_ahead", "probe runs ahead"),
    ("choose", "choosing the probe"),
    ("score", "scoring units"),
    ("swap", "swapping weights"),
    ("history", "updating history"),
)
"""What a dynamic method does besides the pruned model's own arithmetic, as cost lines name it."""


@dataclass(frozen=True)
class Figure:
    """A chart, its head, where its figures are from, and a table of them where no other table has them."""

    head: str
    svg: Markup
    note: str = ""
    table: tuple[tuple[str, tuple[str, ...]], ...] = ()


def series(summary: Summary, entry: Entry) -> int | None:
    """Which colour and mark are its method's; None is dense."""
    return None if entry.dense else summary.labels.index(entry.label)


def by_flops(summary: Summary, text: str) -> Figure | None:
    """Perplexity on a text against FLOPs; None where there is nothing to compare."""

    def cost(entry: Entry) -> tuple[float, charts.Range | None] | None:
        return None if entry.flops_share is None else (100 * entry.flops_share, None)

    label = "decoder FLOPs, % of dense (cheaper to the right)"
    return _quality(summary, text, cost, label, "FLOPs")


def by_time(summary: Summary, text: str) -> Figure | None:
    """Perplexity on a text against measured prefill time; None where there is nothing to compare."""

    def cost(entry: Entry) -> tuple[float, charts.Range | None] | None:
        speed = entry.prefill
        return None if speed is None else (100 / speed.value, (100 / speed.high, 100 / speed.low))

    label = "measured prefill time, % of dense (faster to the right)"
    return _quality(summary, text, cost, label, "time")


def _quality(
    summary: Summary,
    text: str,
    cost: Callable[[Entry], tuple[float, charts.Range | None] | None],
    label: str,
    unit: str,
) -> Figure | None:
    points = []
    for entry in summary.entries:
        found = cost(entry)
        if text not in entry.perplexity or found is None:
            continue
        (at, around), value, room = found, entry.perplexity[text].value, spread(summary, entry, text)
        points.append(
            charts.Point(
                at,
                value,
                f"{entry.name_and_ratio}: perplexity {value:.2f}, {unit} {at:.1f}% of dense",
                series(summary, entry),
                around,
                None if room is None else (value - room, value + room),
            )
        )
    if len(points) < 2:
        return None
    said = "; ".join(p.says for p in points)
    title = f"Perplexity on {text} against {unit}"
    return Figure(text, charts.scatter(points, label, "perplexity (log scale)", title, said))


def spread(summary: Summary, entry: Entry, text: str) -> float | None:
    """Of perplexity as figures show it: that of the paired difference to dense, or over seeds."""
    factor = entry.over_dense.get(text)
    if summary.dense is None or factor is None or factor.spread is None:
        return None
    return factor.spread * summary.dense.perplexity[text].value


def task(summary: Summary, key: str) -> Figure:
    """Accuracy on a task, a group of bars a ratio, dense as a line."""
    groups = []
    for ratio, entries in summary.ratios.items():
        own = []
        for entry in sorted(entries, key=lambda e: series(summary, e) or 0):
            if not entry.dense and key in entry.accuracy:
                found = entry.accuracy[key]
                room = None if found.spread is None else 100 * found.spread
                says = f"{entry.name_and_ratio}: {100 * found.value:.1f}" + (
                    "" if room is None else f" ± {room:.1f}"
                )
                own.append(charts.Bar(100 * found.value, room, says, summary.labels.index(entry.label)))
        if own:
            groups.append((f"{ratio:.0%}" if ratio else "not pruned", own))
    reference = None
    if summary.dense is not None and key in summary.dense.accuracy:
        value = 100 * summary.dense.accuracy[key].value
        reference = value, f"dense {value:.1f}"
    said = "; ".join([b.says for _, own in groups for b in own] + ([reference[1]] if reference else []))
    return Figure(key, charts.bars(groups, reference, f"Accuracy on {key}, %", said))


def kept_units(entry: Entry) -> Figure | None:
    """How often its units were kept, from the first of its lines that says so."""
    row = next((r for r in entry.rows if r.get("units")), None)
    if row is None:
        return None
    by_layer: dict[int, dict[str, Row]] = {}
    for unit in row["units"]:
        by_layer.setdefault(unit["layer"], {})[unit["kind"]] = unit
    layers = [_layer(number, kinds) for number, kinds in sorted(by_layer.items())]
    table = tuple((str(number), _figures(kinds)) for number, kinds in sorted(by_layer.items()))
    batches = row["units"][0].get("batches", 1)
    when = f"{batches} batches" if batches > 1 else "chosen once"
    note = f"{row['task']}, seed {row.get('seed', 0)}, {when}"
    title = f"How often units were kept: {entry.name_and_ratio}"
    said = f"{len(layers)} layers; {note}; the table below has the figures"
    return Figure(entry.label, charts.heat_map(layers, title, said), note, table)


def _layer(number: int, kinds: dict[str, Row]) -> charts.Layer:
    heads, channels = kinds.get("attention", {}), kinds.get("mlp", {})
    said = [
        f"{unit['kept']:g} of {unit['of']} {noun} kept, {100 * unit.get('changed', 0.0):.1f}% changed a batch"
        for unit, noun in ((heads, "heads"), (channels, "channels"))
        if unit
    ]
    return charts.Layer(
        str(number),
        heads.get("frequency"),
        channels.get("frequency"),
        heads.get("changed", 0.0),
        channels.get("changed", 0.0),
        f"layer {number}: {'; '.join(said)}",
    )


def _figures(kinds: dict[str, Row]) -> tuple[str, ...]:
    cells: list[str] = []
    for kind in ("attention", "mlp"):
        unit = kinds.get(kind)
        if unit is None:
            cells += ["-", "-", "-"]
            continue
        often = " ".join(f"{100 * f:.0f}" for f in unit["frequency"])
        cells += [f"{unit['kept']:g} of {unit['of']}", f"{100 * unit.get('changed', 0.0):.1f}%", often]
    return tuple(cells)


def stages(summary: Summary) -> Figure | None:
    """Where the prefill time goes: time in percent of dense, split by the shares that were profiled."""
    rows, table = [], []
    for entry in summary.entries:
        if entry.prefill is None or not (entry.stages or entry.dense):
            continue
        total = 100 / entry.prefill.value
        own = [(stage, words, entry.stages.get(stage, 0.0)) for stage, words in STAGES]
        besides = sum(part for _, _, part in own)
        split = [("rest", "the model itself", 1 - besides), *own]
        rows.append(
            charts.Stack(
                entry.name_and_ratio,
                [
                    (stage, part * total, f"{words}: {100 * part:.1f}% of its time")
                    for stage, words, part in split
                ],
                f"{total:.0f}" + (f", {100 * besides:.1f}% besides" if besides else ""),
            )
        )
        table.append(
            (entry.name_and_ratio, (f"{total:.1f}", *(f"{100 * part:.1f}%" for _, _, part in split)))
        )
    if not any(e.stages for e in summary.entries):
        return None
    said = "; ".join(f"{label}: {shares[0]}% of the dense time" for label, shares in table)
    svg = charts.stacks(rows, "Where the prefill time goes", said)
    return Figure("", svg, table=tuple(table))


def legend(summary: Summary) -> list[tuple[str, Any]]:
    """Methods with something to show, and their marks."""
    shown = {e.label for e in summary.entries if e.rows}
    dense = [("dense", charts.glyph(None))] if summary.dense is not None else []
    return dense + [(label, charts.glyph(i)) for i, label in enumerate(summary.labels) if label in shown]
