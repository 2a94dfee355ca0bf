"""SVG by hand: elements, marks, ticks. What is put in is escaped; colours are the page's classes."""

import math
from collections.abc import Sequence

from markupsafe import Markup, escape

from probeprune.report.palette import COLOURS

Number = float | int


def tag(name: str, *children: str, **attributes: Number | str | None) -> Markup:
    """An element. `class_` is `class`, other underscores are hyphens; None leaves an attribute out."""
    said = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(number(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    inner = Markup("").join(children)  # escapes what is not markup yet
    return Markup(f"<{name}{said}>{inner}</{name}>") if inner else Markup(f"<{name}{said}/>")


def number(value: Number | str) -> str:
    """A coordinate with two digits at most; strings as they are."""
    return value if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")


def drawing(width: Number, height: Number, title: str, description: str, *children: str) -> Markup:
    """A whole drawing that grows and shrinks with its box, named and described for who cannot see it."""
    return tag(
        "svg",
        tag("desc", description),
        *children,
        viewBox=f"0 0 {number(width)} {number(height)}",
        role="img",
        aria_label=f"{title}. {description}",
    )


def text(x: Number, y: Number, said: str, anchor: str = "start", class_: str | None = None) -> Markup:
    """Words at a point."""
    return tag("text", said, x=x, y=y, text_anchor=None if anchor == "start" else anchor, class_=class_)


def line(x1: Number, y1: Number, x2: Number, y2: Number, class_: str) -> Markup:
    """A straight line."""
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def path(points: Sequence[tuple[float, float]], class_: str) -> Markup:
    """A line through points."""
    return tag("polyline", points=" ".join(f"{number(x)},{number(y)}" for x, y in points), class_=class_)


def series_class(series: int | None) -> str:
    """The class that colours a method; None is dense."""
    return "dense" if series is None else f"s{series % len(COLOURS)}"


def mark(x: Number, y: Number, series: int | None, radius: float = 5.0) -> Markup:
    """The mark of a method: one of eight shapes, so that none is known by colour alone."""
    r, class_ = radius, f"mark {series_class(series)}"
    if series is None:
        return tag("circle", cx=x, cy=y, r=r, class_="mark dense hollow")
    shape = series % 8
    if shape == 0:
        return tag("circle", cx=x, cy=y, r=r, class_=class_)
    if shape == 1:
        return tag("rect", x=x - 0.88 * r, y=y - 0.88 * r, width=1.76 * r, height=1.76 * r, class_=class_)
    around = {
        2: _regular(4, 0.0),
        3: _regular(3, 0.0),
        4: _regular(3, 180.0),
        5: _cross(0.0),
        6: _star(),
        7: _cross(45.0),
    }
    points = " ".join(f"{number(x + 1.2 * r * u)},{number(y + 1.2 * r * v)}" for u, v in around[shape])
    return tag("polygon", points=points, class_=class_)


def _at(degrees: float, radius: float = 1.0) -> tuple[float, float]:
    """A point on a circle, 0 degrees at the top."""
    angle = math.radians(degrees)
    return radius * math.sin(angle), -radius * math.cos(angle)


def _regular(corners: int, turned: float) -> list[tuple[float, float]]:
    return [_at(turned + 360 * i / corners) for i in range(corners)]


def _star() -> list[tuple[float, float]]:
    return [_at(36 * i, 1.0 if i % 2 == 0 else 0.45) for i in range(10)]


def _cross(turned: float) -> list[tuple[float, float]]:
    # Each arm has two outer corners and shares the inner ones with its neighbours.
    return [_at(turned + 90 * i + d, r) for i in range(4) for d, r in ((-20, 1.0), (20, 1.0), (45, 0.48))]


def linear_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, both ends inside."""
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
    """A tick's words: no more digits than it needs."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"
