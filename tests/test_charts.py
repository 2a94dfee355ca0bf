"""Charts put things where their figures say: places and lengths are read back from the SVG."""

import math
import xml.etree.ElementTree as ET

import pytest

from probeprune.report import svg, svg_charts


def elements(drawing: str, name: str, class_: str = "") -> list[ET.Element]:
    """Elements of that name with that class, in order; the drawing must be well-formed XML."""
    wanted = set(class_.split())
    return [e for e in ET.fromstring(drawing).iter(name) if wanted <= set(e.get("class", "").split())]


def place(group: ET.Element) -> tuple[float, float]:
    (mark,) = [e for e in group if "mark" in e.get("class", "").split() and e.tag == "circle"]
    return float(mark.get("cx")), float(mark.get("cy"))


def point(x: float, y: float, **more) -> svg_charts.ScatterPoint:
    return svg_charts.ScatterPoint(x, y, f"{x} {y}", 0, **more)


def scatter(points) -> str:
    return svg_charts.scatter(points, "x", "y", "title", "description")


def test_scatter_is_logarithmic_upwards_and_cheaper_to_the_right():
    drawing = scatter([point(100, 10), point(80, 20), point(60, 40), point(70, 80)])
    (x1, y1), (x2, y2), (x3, y3), (x4, y4) = (place(g) for g in elements(drawing, "g"))
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.02) and x4 == pytest.approx((x2 + x3) / 2, abs=0.02)
    assert x1 < x2 < x3 and y1 > y2 > y3 > y4
    assert y1 - y2 == pytest.approx(y2 - y3, abs=0.02) == pytest.approx(y3 - y4, abs=0.02)


def test_ticks_lie_where_their_words_say():
    drawing = scatter([point(100, 10), point(50, 100)])
    (_, y10), (_, y100) = (place(g) for g in elements(drawing, "g"))
    grid = [float(e.get("y1")) for e in elements(drawing, "line", "grid")]
    words = [e.text for e in elements(drawing, "text") if e.get("text-anchor") == "end"]
    assert len(grid) == len(words) >= 4
    for y, said in zip(grid, words, strict=True):
        assert y == pytest.approx(y10 + (y100 - y10) * math.log10(float(said) / 10), abs=0.05)


def test_error_bars_end_where_the_range_does():
    drawing = scatter(
        [point(100, 10), point(50, 20, x_range=(40, 60), y_range=(15, 30)), point(40, 15), point(60, 30)]
    )
    _, _, low, high = (place(g) for g in elements(drawing, "g"))
    up, across = elements(drawing, "line", "error")
    assert sorted([float(up.get("y1")), float(up.get("y2"))]) == pytest.approx([high[1], low[1]], abs=0.02)
    ends = sorted([float(across.get("x1")), float(across.get("x2"))])
    assert ends == pytest.approx([high[0], low[0]], abs=0.02)


def test_rings_are_around_the_pareto_front():
    drawing = scatter([point(100, 10), point(80, 20), point(80, 30), point(60, 15)])
    ringed = [bool([e for e in g if e.get("class") == "ring"]) for g in elements(drawing, "g")]
    assert ringed == [True, False, False, True]


def test_bars_are_as_high_as_their_figures():
    own = [svg_charts.Bar(20, 5, "a", 0), svg_charts.Bar(40, None, "b", 1)]
    drawing = svg_charts.bars([("20%", own), ("40%", own[:1])], (30, "dense 30"), "title", "description")
    bars = elements(drawing, "rect", "bar")
    heights = [float(b.get("height")) for b in bars]
    assert heights == pytest.approx([heights[0], 2 * heights[0], heights[0]], abs=0.02)
    floor = {round(float(b.get("y")) + float(b.get("height")), 1) for b in bars}
    assert len(floor) == 1
    (reference,) = elements(drawing, "line", "reference")
    assert floor.pop() - float(reference.get("y1")) == pytest.approx(1.5 * heights[0], abs=0.1)
    whisker = elements(drawing, "line", "whisker")[0]
    long = abs(float(whisker.get("y1")) - float(whisker.get("y2")))
    assert long == pytest.approx(0.5 * heights[0], abs=0.02)  # from 15 to 25, where the bar is 20
    assert len(elements(drawing, "line", "whisker")) == 2


def test_stacks_lie_end_to_end_on_one_scale():
    rows = [
        svg_charts.Stack("dense", [("rest", 100, "")], "100"),
        svg_charts.Stack("probe", [("rest", 60, ""), ("swap", 15, "")], "75"),
    ]
    drawing = svg_charts.stacks(rows, "title", "description")
    dense, rest, swap = elements(drawing, "rect")
    scale = float(dense.get("width")) / 100
    assert float(rest.get("width")) == pytest.approx(60 * scale, abs=0.02)
    assert float(swap.get("width")) == pytest.approx(15 * scale, abs=0.02)
    assert float(swap.get("x")) == pytest.approx(float(rest.get("x")) + float(rest.get("width")), abs=0.02)
    (mark,) = elements(drawing, "line", "reference")
    assert float(mark.get("x1")) == pytest.approx(float(dense.get("x")) + 100 * scale, abs=0.02)


def test_heat_map_shades_each_unit_by_how_often_it_was_kept():
    heads, channels = [1.0, 0.52, 0.0, 0.48], [1.0, 0.96, 0.04, 0.0]
    drawing = svg_charts.heat_map(
        [svg_charts.Layer("0", heads, channels, 0.5, 0.0, "says")], "title", "description"
    )
    empty = elements(drawing, "rect", "never")

    def shade(panel: ET.Element, at: float) -> int:
        x = float(panel.get("x")) + at * float(panel.get("width"))
        cells = [e for e in elements(drawing, "rect") if e.get("class")[0] == "f"]
        on = [e for e in cells if float(e.get("x")) < x < float(e.get("x")) + float(e.get("width"))]
        return int(on[0].get("class")[1:]) if on else 0

    for panel, frequencies in zip(empty, (heads, channels), strict=True):
        shades = [shade(panel, (i + 0.5) / 4) for i in range(4)]
        assert shades == [round(10 * f) for f in frequencies]
    (changed,) = elements(drawing, "rect", "changed")
    assert float(changed.get("width")) == pytest.approx(15)  # half of the room for everything


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0, 67.2), (28.1, 212), (59, 131), (1.0, 1.3), (900, 25000), (3, 3.3)]
)
def test_ticks_are_round_and_inside(low, high):
    for ticks in (svg.linear_ticks(low, high), svg.log_ticks(low, high) if low else [low, high]):
        assert 2 <= len(ticks) <= 12 and all(low - 1e-9 <= t <= high + 1e-9 for t in ticks)
        assert ticks == sorted(set(ticks)) and all(len(svg.plain(t)) <= 6 for t in ticks)


def test_words_are_escaped():
    assert svg.text(0, 0, '<a href="x">') == '<text x="0" y="0">&lt;a href=&#34;x&#34;&gt;</text>'
    assert svg.tag("g", class_='"><script>') == '<g class="&#34;&gt;&lt;script&gt;"/>'
