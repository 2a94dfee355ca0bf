"""The stages of a dynamic method are the same wherever they are named: no time goes to the wrong one."""

import re
from pathlib import Path

import fake_results

import probeprune
from probeprune import report
from probeprune.bench.profiling import PARTS
from probeprune.bench.tables import PROFILE_CAPTION
from probeprune.report.html import style_sheet
from probeprune.report.page_plots import stages_plot
from probeprune.stages import MODEL, OVERHEAD, PROBE, STAGES

SOURCE = Path(probeprune.__file__).parent
NAMES = [stage.name for stage in STAGES]


def test_the_runtime_labels_every_stage_and_no_other():
    labels = set()
    for file in SOURCE.rglob("*.py"):
        if "bench" not in file.parts:
            labels |= set(
                re.findall(r'record_function\("probeprune::(\w+)"\)', file.read_text(encoding="utf-8"))
            )
    assert labels == set(NAMES)


def test_stages_are_named_once():
    assert (PROBE, *OVERHEAD) == STAGES and MODEL not in STAGES
    assert len(set(NAMES)) == len({s.label for s in STAGES}) == len({s.light for s in STAGES}) == len(NAMES)


def test_bench_measures_and_explains_every_stage():
    assert set(NAMES) < set(PARTS)
    assert all(f"{stage.name}: {stage.label}" in PROFILE_CAPTION for stage in STAGES)


def test_the_style_sheet_colours_every_stage():
    for stage in (MODEL, *STAGES):
        colour = f"light-dark({stage.light}, {stage.dark})"
        assert f".{stage.name} {{ fill: {colour}; background: {colour}; }}" in style_sheet()


def test_the_page_shows_every_stage_apart_from_the_model_itself():
    costs = [r for r in fake_results.ROWS if r["task"] == "cost" and r["name"] in ("dense", "probe")]
    assert all(list(r["stages"]) == NAMES for r in costs if r["name"] == "probe")
    (summary,) = report.summarise(costs)
    drawn = str(stages_plot(summary).svg)
    assert all(f'class="{name}"' in drawn for name in [MODEL.name, *NAMES])
    lone = [r | {"stages": {"refit": 0.25}} if r["name"] == "probe" else r for r in costs]
    figure = stages_plot(report.summarise(lone)[0])
    row = dict(figure.table)["probe 20%"]
    assert row[1] == "75.0%" and row[2 + NAMES.index("refit")] == "25.0%"
