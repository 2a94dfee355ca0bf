"""Colours, marks and dashes of methods, the same on the page and on paper.

The colours start from those of Okabe and Ito, darkened for contrast on white and lightened for contrast on
black. No twelve colours are distinct to every colour-blind reader, so each method also has a mark of its own,
and neighbouring methods have different dashes.
"""

import math
from dataclasses import dataclass

Corners = tuple[tuple[float, float], ...]
"""Corners (x, y) of a mark within the unit circle, y downwards."""


@dataclass(frozen=True)
class Style:
    """How a method is drawn.

    Attributes:
        light, dark: its colour on a white and on a black background, as `#rrggbb`.
        mark: corners of its mark; None is a circle.
        dashes: lengths of dashes and gaps of its line; empty for a solid line.
    """

    light: str
    dark: str
    mark: Corners | None
    dashes: tuple[int, ...]


COLOURS: tuple[tuple[str, str], ...] = (
    # on white, on black
    ("#0072B2", "#4BA6E0"),
    ("#D55E00", "#E8792B"),
    ("#00875F", "#1FB889"),
    ("#C0539A", "#E87FC0"),
    ("#998000", "#E6B800"),
    ("#3593CC", "#A5DCFA"),
    ("#6B6B6B", "#9A9A9A"),
    ("#44085F", "#9A3FD8"),
    ("#1F4D14", "#C8F06A"),
    ("#0026B4", "#5560F0"),
    ("#85204A", "#C22A5E"),
    ("#7A57F2", "#C9B8FF"),
)

DASHES: tuple[tuple[int, ...], ...] = ((), (6, 3), (2, 2), (7, 2, 2, 2))
"""Their number divides that of the colours, so that a colour always has the same dashes."""


def style(series: int) -> Style:
    """The style of the method with that index. The first 12 differ in colour and mark, 156 in one of them."""
    light, dark = COLOURS[series % len(COLOURS)]
    return Style(light, dark, MARKS[series % len(MARKS)], DASHES[series % len(DASHES)])


def _at(degrees: float, radius: float = 1.0) -> tuple[float, float]:
    """A point on a circle; 0 degrees is at the top."""
    angle = math.radians(degrees)
    return radius * math.sin(angle), -radius * math.cos(angle)


def _polygon(corners: int, turned: float = 0.0) -> Corners:
    return tuple(_at(turned + 360 * i / corners) for i in range(corners))


def _star(points: int, inner: float) -> Corners:
    return tuple(_at(180 * i / points, inner if i % 2 else 1.0) for i in range(2 * points))


def _cross(turned: float) -> Corners:
    # Each arm has two outer corners and shares the inner ones with its neighbours.
    ends = ((-20, 1.0), (20, 1.0), (45, 0.48))
    return tuple(_at(turned + 90 * arm + degrees, radius) for arm in range(4) for degrees, radius in ends)


MARKS: tuple[Corners | None, ...] = (
    None,
    _polygon(4, 45),
    _polygon(4),
    _polygon(3),
    _polygon(3, 180),
    _cross(0),
    _star(5, 0.45),
    _cross(45),
    _polygon(3, 270),
    _polygon(3, 90),
    _polygon(5),
    _star(4, 0.38),
    ((-0.8, -1.0), (0.8, -1.0), (-0.8, 1.0), (0.8, 1.0)),
)
"""Thirteen: a number without a common factor with that of the colours, so that pairs repeat late."""
