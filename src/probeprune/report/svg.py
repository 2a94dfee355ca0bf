"""SVG elements, marks and ticks. All words are escaped; colours are CSS classes of the page."""

import math
from collections.abc import Sequence

from markupsafe import Markup, escape

from probeprune.report.palette import COLOURS, style

Number = float | int


def tag(name: str, *children: str, **attributes: Number | str | None) -> Markup:
    """An element. `class_` is `class`, other underscores are hyphens; None leaves an attribute out."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(coordinate(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    inner = Markup("").join(children)  # escapes plain strings
    return Markup(f"<{name}{written}>{inner}</{name}>") if inner else Markup(f"<{name}{written}/>")


def coordinate(value: Number | str) -> str:
    """A coordinate with at most two decimals; strings are returned unchanged."""
    return value if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")


def drawing(width: Number, height: Number, title: str, description: str, *children: str) -> Markup:
    """A whole drawing that scales with its box, with a title and a description for screen readers."""
    return tag(
        "svg",
        tag("desc", description),
        *children,
        viewBox=f"0 0 {coordinate(width)} {coordinate(height)}",
        role="img",
        aria_label=f"{title}. {description}",
    )


def text(x: Number, y: Number, words: str, anchor: str = "start", class_: str | None = None) -> Markup:
    """Words anchored at a point."""
    return tag("text", words, x=x, y=y, text_anchor=None if anchor == "start" else anchor, class_=class_)


def line(x1: Number, y1: Number, x2: Number, y2: Number, class_: str) -> Markup:
    """A straight line."""
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def path(points: Sequence[tuple[float, float]], class_: str) -> Markup:
    """A line through points."""
    return tag(
        "polyline", points=" ".join(f"{coordinate(x)},{coordinate(y)}" for x, y in points), class_=class_
    )


def series_class(series: int | None) -> str:
    """The CSS class with the colour and dashes of a method; None is dense."""
    return "dense" if series is None else f"s{series % len(COLOURS)}"


def mark(x: Number, y: Number, series: int | None, radius: float = 5.0) -> Markup:
    """The mark of a method: each has its own shape, so that none is known by colour alone."""
    class_ = f"mark {series_class(series)}"
    if series is None:
        return tag("circle", cx=x, cy=y, r=radius, class_="mark dense hollow")
    corners = style(series).mark
    if corners is None:
        return tag("circle", cx=x, cy=y, r=radius, class_=class_)
    # Polygons look smaller than a circle of the same radius.
    points = " ".join(
        f"{coordinate(x + 1.2 * radius * u)},{coordinate(y + 1.2 * radius * v)}" for u, v in corners
    )
    return tag("polygon", points=points, class_=class_)


def linear_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers within [`low`, `high`], `about` of them."""
    step = 10.0 ** math.floor(math.log10((high - low) / about))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= about)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high` for a logarithmic axis, at least four."""
    tens = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for multiples in ((1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        ticks = [m * 10.0**t for t in tens for m in multiples if low <= m * 10.0**t <= high]
        if len(ticks) >= 4:
            return ticks
    return linear_ticks(low, high)


def plain(value: float) -> str:
    """The words for a tick, with no more digits than it needs."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"
