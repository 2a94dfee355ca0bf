"""Methods keep apart in every figure: by colour, by mark and by dashes, on white and on black."""

import inspect
import itertools
import math
import re

import fake_results
import pytest

from probeprune import report
from probeprune.cli.compare import compare
from probeprune.report import svg
from probeprune.report.html import style_sheet
from probeprune.report.palette import COLOURS, DASHES, MARKS, style

DEFAULT_METHODS = inspect.signature(compare).parameters["methods"].default.split(",")


def oklab(colour: str) -> tuple[float, float, float]:
    """Oklab (Ottosson 2020), in which distances are about those that are seen."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    long = math.cbrt(0.4122214708 * r + 0.5363325363 * g + 0.0514459929 * b)
    middle = math.cbrt(0.2119034982 * r + 0.6806995451 * g + 0.1073969566 * b)
    short = math.cbrt(0.0883024619 * r + 0.2817188376 * g + 0.6299787005 * b)
    return (
        0.2104542553 * long + 0.7936177850 * middle - 0.0040720468 * short,
        1.9779984951 * long - 2.4285922050 * middle + 0.4505937099 * short,
        0.0259040371 * long + 0.7827717662 * middle - 0.8086757660 * short,
    )


def test_twelve_methods_differ_in_colour_and_mark():
    styles = [style(i) for i in range(12)]
    assert (
        len({s.light for s in styles}) == len({s.dark for s in styles}) == len({s.mark for s in styles}) == 12
    )
    for scheme in ("light", "dark"):
        for one, other in itertools.combinations([getattr(s, scheme) for s in styles], 2):
            assert math.dist(oklab(one), oklab(other)) > 0.1, (scheme, one, other)


def test_no_two_of_156_methods_are_drawn_alike():
    assert len({str(svg.mark(0, 0, i)) for i in range(156)}) == 156
    assert len({str(svg.mark(0, 0, i)).replace(f"s{i % 12}", "") for i in range(13)}) == len(MARKS) == 13
    assert all(style(i).dashes != style(i + 1).dashes for i in range(20))


def test_a_colour_always_has_the_same_dashes():
    # The style sheet has one class for both.
    assert len(COLOURS) % len(DASHES) == 0
    for i in range(len(COLOURS)):
        assert style(i).dashes == style(i + len(COLOURS)).dashes
        assert f".s{i} {{ --c: light-dark({style(i).light}, {style(i).dark});" in style_sheet()


@pytest.mark.parametrize("methods", [DEFAULT_METHODS, list(fake_results.HURTS)], ids=["compare", "fake"])
def test_methods_of_a_plot_all_have_their_own_colour(methods, tmp_path):
    lines = [
        fake_results.perplexity_row(name, 0.2 * (i > 0), 0, [1.0 + i, 2.0], flops_per_token=100.0 - i)
        for i, name in enumerate(["dense", *(m for m in methods if m != "dense")])
    ]
    report.plot(lines, "t", tmp_path / "plot")
    drawn = (tmp_path / "plot.svg").read_text(encoding="utf-8")
    pruned = len(lines) - 1
    assert len(DEFAULT_METHODS) == 9 and pruned == len([m for m in methods if m != "dense"])
    colours = {c.lower() for c in re.findall(r"stroke: (#\w{6})", drawn)}
    assert {style(i).light.lower() for i in range(pruned)} <= colours
