"""Charts as SVG: scatter plots, bars, stacks and heat maps from numbers and words.

Knows nothing of result lines.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from probeprune.report.svg import (
    drawing,
    line,
    linear_ticks,
    log_ticks,
    mark,
    path,
    plain,
    series_class,
    tag,
    text,
)

Range = tuple[float, float]


@dataclass(frozen=True)
class ScatterPoint:
    """A point of a scatter plot.

    Attributes:
        x: cost, less is better.
        y: quality, less is better.
        tooltip: words shown when it is pointed at.
        series: index of its method; None is dense.
        x_range, y_range: ends of the error bars.
    """

    x: float
    y: float
    tooltip: str
    series: int | None
    x_range: Range | None = None
    y_range: Range | None = None


def scatter(
    points: Sequence[ScatterPoint], x_label: str, y_label: str, title: str, description: str
) -> Markup:
    """Quality on a logarithmic axis against cost, with less cost to the right.

    A line for each method starts at the dense point; rings and a dashed line show the Pareto front.
    """
    width, height, left, right, top, bottom = 520, 372, 52, 18, 14, 46
    xs = [x for p in points for x in (p.x, *(p.x_range or ()))]
    ys = [y for p in points for y in (p.y, *(p.y_range or ())) if y > 0]
    x_low, x_high = _widened(min(xs), max(xs), 0.06)
    y_low, y_high = (math.exp(v) for v in _widened(math.log(min(ys)), math.log(max(ys)), 0.07))

    def x_of(x: float) -> float:
        return left + (x_high - x) / (x_high - x_low) * (width - left - right)

    def y_of(y: float) -> float:
        part = math.log(max(y, y_low) / y_low) / math.log(y_high / y_low)
        return height - bottom - part * (height - top - bottom)

    parts = []
    for tick in log_ticks(y_low, y_high):
        parts += [
            line(left, y_of(tick), width - right, y_of(tick), "grid"),
            text(left - 8, y_of(tick) + 4, plain(tick), "end"),
        ]
    for tick in linear_ticks(x_low, x_high, 8):
        parts += [
            line(x_of(tick), height - bottom, x_of(tick), height - bottom + 4, "axis"),
            text(x_of(tick), height - bottom + 19, plain(tick), "middle"),
        ]
    parts.append(line(left, height - bottom, width - right, height - bottom, "axis"))
    parts.append(text((left + width - right) / 2, height - 6, x_label, "middle", "label"))
    parts.append(
        tag("text", y_label, transform=f"translate(12 {(top + height - bottom) / 2}) rotate(-90)",
            text_anchor="middle", class_="label")
    )  # fmt: skip
    front = pareto_front([(p.x, p.y) for p in points])
    ends = sorted(((points[i].x, points[i].y) for i in front), reverse=True)
    parts.append(path([(x_of(x), y_of(y)) for x, y in ends], "front"))
    dense = [p for p in points if p.series is None]
    for series in dict.fromkeys(p.series for p in points if p.series is not None):
        course = sorted((p for p in points if p.series == series), key=lambda p: p.y)
        along = [(x_of(p.x), y_of(p.y)) for p in [*dense[:1], *course]]
        parts.append(path(along, f"course {series_class(series)}"))
    for i, point in enumerate(points):
        x, y, colour = x_of(point.x), y_of(point.y), series_class(point.series)
        inside = []
        if point.y_range:
            inside.append(line(x, y_of(point.y_range[0]), x, y_of(point.y_range[1]), f"error {colour}"))
        if point.x_range:
            inside.append(line(x_of(point.x_range[0]), y, x_of(point.x_range[1]), y, f"error {colour}"))
        if i in front:
            inside.append(tag("circle", cx=x, cy=y, r=9.5, class_="ring"))
        parts.append(tag("g", tag("title", point.tooltip), *inside, mark(x, y, point.series)))
    return drawing(width, height, title, description, *parts)


@dataclass(frozen=True)
class Bar:
    """A bar: its height, half the length of its error bar, its tooltip, and the index of its method."""

    value: float
    spread: float | None
    tooltip: str
    series: int


def bars(
    groups: Sequence[tuple[str, Sequence[Bar]]],
    reference: tuple[float, str] | None,
    title: str,
    description: str,
) -> Markup:
    """Groups of bars from zero, with error bars; the reference is a labelled dashed line."""
    width, height, left, right, top, bottom = 340, 222, 30, 6, 16, 36
    highest = max(
        [b.value + (b.spread or 0) for _, group in groups for b in group] + [reference[0] if reference else 0]
    )
    y_high = max(highest * 1.12, 1e-9)

    def y_of(y: float) -> float:
        return height - bottom - y / y_high * (height - top - bottom)

    parts = []
    for tick in linear_ticks(0, y_high, 4):
        parts += [
            line(left, y_of(tick), width - right, y_of(tick), "grid"),
            text(left - 6, y_of(tick) + 4, plain(tick), "end"),
        ]
    slots = sum(len(group) + 1 for _, group in groups)
    slot = (width - left - right) / slots
    x = left + slot / 2
    for name, group in groups:
        parts.append(text(x + slot * len(group) / 2, height - 6, name, "middle"))
        for bar in group:
            body = [
                tag("title", bar.tooltip),
                tag("rect", x=x + 0.1 * slot, y=y_of(bar.value), width=0.8 * slot,
                    height=height - bottom - y_of(bar.value), class_=f"bar {series_class(bar.series)}"),
            ]  # fmt: skip
            if bar.spread:
                middle = x + slot / 2
                ends = y_of(max(bar.value - bar.spread, 0)), y_of(bar.value + bar.spread)
                body.append(line(middle, ends[0], middle, ends[1], "whisker"))
            body.append(mark(x + slot / 2, height - bottom + 9, bar.series, min(3.6, 0.36 * slot)))
            parts.append(tag("g", *body))
            x += slot
        x += slot
    parts.append(line(left, height - bottom, width - right, height - bottom, "axis"))
    if reference:
        parts.append(line(left, y_of(reference[0]), width - right, y_of(reference[0]), "reference"))
        parts.append(text(width - right, y_of(reference[0]) - 4, reference[1], "end", "label"))
    return drawing(width, height, title, description, *parts)


@dataclass(frozen=True)
class Stack:
    """A bar of parts laid end to end, (CSS class, length, tooltip) each, and the words after it."""

    label: str
    parts: Sequence[tuple[str, float, str]]
    after: str


def stacks(rows: Sequence[Stack], title: str, description: str) -> Markup:
    """Horizontal bars of parts on one scale from zero; a line marks 100."""
    step, left, right, top = 26, 128, 150, 22
    width, height = 730, top + step * len(rows) + 6
    longest = max([sum(length for _, length, _ in row.parts) for row in rows] + [100.0])
    scale = (width - left - right) / longest
    parts = []
    for i, row in enumerate(rows):
        y, x = top + step * i, float(left)
        parts.append(text(left - 10, y + 15, row.label, "end"))
        for class_, length, tooltip in row.parts:
            body = tag("rect", x=x, y=y + 3, width=max(length * scale, 0), height=step - 8, class_=class_)
            parts.append(tag("g", tag("title", tooltip), body))
            x += length * scale
        parts.append(text(x + 8, y + 15, row.after, class_="label"))
    at = left + 100 * scale
    parts.append(line(at, top - 4, at, height - 4, "reference"))
    parts.append(text(at, top - 9, "dense = 100", "middle", "label"))
    return drawing(width, height, title, description, *parts)


@dataclass(frozen=True)
class Layer:
    """One row of a heat map.

    Attributes:
        label: at its left.
        heads, channels: frequencies in [0, 1]; None for a kind of block that was not pruned.
        heads_changed, channels_changed: share of the kept units that changed from batch to batch.
        tooltip: words shown when it is pointed at.
    """

    label: str
    heads: Sequence[float] | None
    channels: Sequence[float] | None
    heads_changed: float
    channels_changed: float
    tooltip: str


LEVELS = 10
"""Shades of a heat map above zero; classes `f1` to `f10`."""


def heat_map(layers: Sequence[Layer], title: str, description: str) -> Markup:
    """How often each unit was kept, a row a layer: heads, then channels, each with the share that changed."""
    step, left, top = 7.0, 26.0, 30.0
    columns = (
        (left, 96.0, 30.0),
        (left + 148.0, 206.0, 30.0),
    )  # left edge, width, room for the share that changed
    width, height = 440.0, top + step * len(layers) + 4
    parts = [
        text(columns[0][0], 12, "heads"),
        text(columns[1][0], 12, "channels, most kept first"),
        *(text(x + wide + 6, 24, "changed", class_="small") for x, wide, _ in columns),
    ]
    for i, layer in enumerate(layers):
        y = top + step * i
        if i % 5 == 0:
            parts.append(text(left - 6, y + 6.5, layer.label, "end", "small"))
        body = [tag("title", layer.tooltip)]
        both = ((layer.heads, layer.heads_changed), (layer.channels, layer.channels_changed))
        for (x, wide, room), (frequencies, changed) in zip(columns, both, strict=True):
            body.append(tag("rect", x=x, y=y, width=wide, height=step - 1, class_="never"))
            if frequencies:
                body += _runs(frequencies, x, y, wide, step - 1)
            if changed > 0:
                body.append(
                    tag(
                        "rect",
                        x=x + wide + 6,
                        y=y,
                        width=max(min(changed, 1) * room, 0.5),
                        height=step - 1,
                        class_="changed",
                    )
                )
        parts.append(tag("g", *body))
    return drawing(width, height, title, description, *parts)


def _runs(frequencies: Sequence[float], x: float, y: float, width: float, height: float) -> list[Markup]:
    """One rectangle for each run of equal shades, so that a page of heat maps stays small."""
    cell = width / len(frequencies)
    shades = [round(LEVELS * min(max(f, 0.0), 1.0)) for f in frequencies]
    runs, start = [], 0
    for i in range(1, len(shades) + 1):
        if i == len(shades) or shades[i] != shades[start]:
            if shades[start]:
                runs.append((f"f{shades[start]}", x + start * cell, (i - start) * cell))
            start = i
    return [tag("rect", x=at, y=y, width=wide, height=height, class_=c) for c, at, wide in runs]


def glyph(series: int | None) -> Markup:
    """The mark of a method on its own, for a legend."""
    return tag("svg", mark(8, 8, series), viewBox="0 0 16 16", aria_hidden="true", class_="glyph")


def _widened(low: float, high: float, by: float) -> Range:
    room = by * (high - low) or by * max(abs(high), 1.0)
    return low - room, high + room


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other beats: none is as low in both coordinates and lower in one."""
    front: list[int] = []
    best = math.inf
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        if points[i][1] < best or (front and points[front[-1]] == points[i]):
            front.append(i)
            best = points[i][1]
    return sorted(front)
