"""Aggregation of result lines against the same written out: seeds, columns, groups, labels."""

import math
import random
import statistics

import fake_results
import pytest
from fake_results import ROWS, entry, lines, only

from probeprune import report
from probeprune.methods import METHODS
from probeprune.report.columns import best, columns
from probeprune.report.estimates import Estimate, Speed, prr
from probeprune.report.svg_charts import pareto_front
from probeprune.report.text import failures


@pytest.fixture(scope="module")
def summary():
    return fake_results.summary()


@pytest.mark.parametrize("name", [*fake_results.STATIC, *fake_results.DYNAMIC])
@pytest.mark.parametrize("ratio", fake_results.RATIOS)
def test_an_entry_is_the_mean_over_its_seeds(summary, name, ratio):
    found = entry(summary, name, ratio)
    dense = {text: only(name="dense", task=text) for text in fake_results.TEXTS}
    assert found.seeds == fake_results.SEEDS
    for text in fake_results.TEXTS:
        own = [only(name=name, ratio=ratio, task=text, seed=s) for s in fake_results.SEEDS]
        values = [r["value"] for r in own]
        assert found.quality.perplexity[text].value == pytest.approx(sum(values) / 3)
        assert found.quality.perplexity[text].spread == pytest.approx(statistics.stdev(values))
        factors = [v / dense[text]["value"] for v in values]
        assert found.quality.over_dense[text].value == pytest.approx(sum(factors) / 3)
        assert found.quality.over_dense[text].spread == pytest.approx(statistics.stdev(factors))
    for task in fake_results.TASKS:
        values = [only(name=name, ratio=ratio, task=task, seed=s)["value"] for s in fake_results.SEEDS]
        assert found.quality.accuracy[task].value == pytest.approx(sum(values) / 3)
        assert found.quality.accuracy[task].seeds == 3
    means = [
        statistics.fmean(only(name=name, ratio=ratio, task=t, seed=s)["value"] for t in fake_results.TASKS)
        for s in fake_results.SEEDS
    ]
    assert found.quality.mean_accuracy["harness"].value == pytest.approx(statistics.fmean(means))
    assert found.quality.mean_accuracy["harness"].spread == pytest.approx(statistics.stdev(means))
    costs = [only(name=name, ratio=ratio, task="cost", seed=s) for s in fake_results.SEEDS]
    assert found.cost.prefill.value == pytest.approx(statistics.fmean(c["prefill"]["speedup"] for c in costs))
    assert found.cost.prefill.low == min(c["prefill"]["speedup_range"][0] for c in costs)
    assert found.cost.prefill.high == max(c["prefill"]["speedup_range"][1] for c in costs)
    assert found.cost.memory == max(c["peak_memory"] for c in costs)
    flops = [
        only(name=name, ratio=ratio, task=t, seed=s)["flops_per_token"] / dense[t]["flops_per_token"]
        for t in fake_results.TEXTS
        for s in fake_results.SEEDS
    ]
    assert found.cost.flops_share == pytest.approx(statistics.fmean(flops))


def test_one_seed_has_the_standard_error_instead_and_says_so(summary):
    dense = summary.dense
    row = only(name="dense", task="wikitext2")
    assert dense.quality.perplexity["wikitext2"] == Estimate(row["value"], row["standard_error"], 1)
    errors = [only(name="dense", task=t)["standard_error"] for t in fake_results.TASKS]
    assert dense.quality.mean_accuracy["harness"].spread == pytest.approx(
        math.sqrt(sum(e**2 for e in errors)) / len(errors)
    )
    shown = {c.key: c for c in columns([summary])}["perplexity wikitext2"]
    assert shown.cells[0].note.endswith(" se") and shown.cells[1].note.endswith(" sd")
    # The factor's error is that of the paired difference, far below that of either perplexity.
    one = fake_results.perplexity_row("probe", 0.4, 0, [x + 0.5 for x in row["losses"]])
    (single,) = report.summarise([row, one])
    assert single.entries[1].quality.over_dense["wikitext2"].value == pytest.approx(math.exp(0.5), rel=1e-5)
    assert single.entries[1].quality.over_dense["wikitext2"].spread == pytest.approx(0, abs=1e-9)


def test_a_mean_over_some_of_the_tasks_is_not_shown():
    rows = [r for r in ROWS if not (r["name"] == "flap" and r["task"] == "piqa" and r["seed"] != 1)]
    rows = [r for r in rows if not (r["name"] == "probe" and r["task"] == "piqa")]
    (found,) = report.summarise(rows)
    assert "harness" not in entry(found, "probe", 0.2).quality.mean_accuracy
    flap = entry(found, "flap", 0.2).quality.mean_accuracy["harness"]
    whole = [only(name="flap", ratio=0.2, seed=1, task=t)["value"] for t in fake_results.TASKS]
    assert (flap.seeds, flap.value) == (1, pytest.approx(statistics.fmean(whole)))


def test_protocols_never_share_a_column():
    theirs = [r | {"protocol": "published", "value": r["value"] / 2} for r in lines(task="piqa")]
    (found,) = report.summarise([*ROWS, *theirs])
    probe = entry(found, "probe", 0.2)
    assert probe.quality.accuracy["piqa (published)"].value == pytest.approx(
        probe.quality.accuracy["piqa"].value / 2
    )
    assert found.protocols["published"] == ("piqa (published)",)
    assert probe.quality.mean_accuracy["published"].value == pytest.approx(
        probe.quality.accuracy["piqa"].value / 2
    )
    assert (
        probe.quality.mean_accuracy["harness"]
        == entry(report.summarise(ROWS)[0], "probe", 0.2).quality.mean_accuracy["harness"]
    )


def test_methods_of_one_name_with_other_parameters_are_told_apart():
    one = fake_results.perplexity_row("probe", 0.2, 0, [1.0, 2.0])
    other = fake_results.perplexity_row("probe", 0.2, 1, [1.5, 2.0])
    other["method"] = other["method"] | {"skip_layers": 0}
    trained = fake_results.perplexity_row("flap+lora", 0.2, 0, [1.5, 2.5])
    longer = trained | {"training": trained["training"] | {"steps": 999, "seconds": 3.0}}
    slower = trained | {"seed": 1, "training": trained["training"] | {"seconds": 3.0}}
    (found,) = report.summarise([one, other, trained, longer, slower])
    assert {e.label: e.seeds for e in found.entries} == {
        "probe (skip_layers=3)": (0,),
        "probe (skip_layers=0)": (1,),
        "flap+lora (training.steps=120)": (0, 1),
        "flap+lora (training.steps=999)": (0,),
    }


def test_what_was_measured_otherwise_is_another_column_or_study():
    row = fake_results.perplexity_row("probe", 0.2, 0, [1.0, 2.0])
    longer = fake_results.perplexity_row("probe", 0.2, 0, [1.0, 2.0, 3.0])
    half = fake_results.perplexity_row("probe", 0.2, 0, [1.5, 2.5], dtype="bfloat16")
    first, second = report.summarise([row, longer, half])
    assert (first.model, second.model) == (
        f"{fake_results.MODEL} (dtype=float32)",
        f"{fake_results.MODEL} (dtype=bfloat16)",
    )
    assert first.texts == ("wikitext2 (windows=2)", "wikitext2 (windows=3)") and second.texts == (
        "wikitext2",
    )
    assert first.entries[0].quality.perplexity[first.texts[1]].value == pytest.approx(math.exp(2))
    fewer = [r | {"items": 7} for r in lines(name="probe", task="boolq")]
    (found,) = report.summarise([*ROWS, *fewer])
    assert {"boolq (items=120)", "boolq (items=7)"} < set(found.tasks) and "piqa" in found.tasks


def test_lines_that_cannot_be_told_apart_are_not_averaged():
    row = fake_results.perplexity_row("probe", 0.2, 0, [1.0, 2.0])
    other = fake_results.perplexity_row("probe", 0.2, 0, [2.0, 3.0])
    (found,) = report.summarise([row, other])
    assert found.entries[0].quality.perplexity["wikitext2"].value == other["value"]
    (note,) = found.notes
    assert note.startswith("1 lines were left out: later lines repeat their measurements")
    short = [r | {"length": 64} for r in lines(task="cost", name="probe", ratio=0.2, seed=0)]
    (found,) = report.summarise([*short, *ROWS])
    assert (
        entry(found, "probe", 0.2).cost.prefill == entry(report.summarise(ROWS)[0], "probe", 0.2).cost.prefill
    )
    assert found.notes == (
        "Speed was measured on several shapes; the latest is shown: prefill of 16 x 512 and 64 new tokens.",
    )


def test_a_trained_dense_model_is_compared_with_the_dense_one():
    control = fake_results.perplexity_row("dense+lora", 0.0, 0, [1.5, 2.5])
    (found,) = report.summarise([control, fake_results.perplexity_row("dense", 0.0, 0, [1.0, 2.0])])
    assert [(e.label, e.dense) for e in found.entries] == [("dense", True), ("dense+lora", False)]
    assert found.entries[1].quality.over_dense["wikitext2"].value == pytest.approx(math.exp(0.5))


def test_a_failure_joins_its_method_or_stands_alone(summary):
    alone = entry(summary, "ppsp", 0.4)
    assert alone.lines == () and [f.task for f in alone.failures] == ["boolq"]
    failed = {
        **ROWS[-1],
        "name": "probe",
        "method": METHODS["probe"].record(),
        "seed": 7,
    }
    (found,) = report.summarise([*ROWS, failed])
    probe = entry(found, "probe", 0.4)
    assert (
        len(probe.failures) == 1
        and probe.quality.perplexity == entry(summary, "probe", 0.4).quality.perplexity
    )


def test_dense_comes_first_then_ratios_each_best_last(summary):
    order = [(e.ratio, -e.quality.perplexity["wikitext2"].value) for e in summary.entries if e.lines]
    assert summary.entries[0].dense and order == sorted(order)


def test_pareto_front_against_brute_force():
    draw = random.Random(0)
    for _ in range(200):
        points = [(draw.randrange(6), draw.randrange(6)) for _ in range(draw.randrange(1, 9))]
        wanted = [
            i
            for i, (x, y) in enumerate(points)
            if not any(a <= x and b <= y and (a, b) != (x, y) for a, b in points)
        ]
        assert pareto_front(points) == wanted, points


def test_prr_is_the_papers():
    # LLaMA-2-7B at 40 %: perplexity 6.0 -> 16.8 (PP) and 38.9 (FLAP); the paper's ratios are 37.37 and 95.65.
    assert prr(16.8 - 6.0, Speed(1 / (1 - 0.289), 1.3, 1.5)) == pytest.approx(37.37, rel=1e-3)
    assert prr(38.9 - 6.0, Speed(1 / (1 - 0.344), 1.5, 1.6)) == pytest.approx(95.65, rel=1e-3)
    assert prr(1.0, Speed(1.0, 1, 1)) is None and prr(1.0, None) is None
    assert prr(1.0, Speed(1.5, 0.6, 3.2)) is None, "no figure where the rounds disagree"


@pytest.mark.parametrize(
    ("lowest", "shown"), [(1.1, "1.20x (1.10-1.30)"), (0.62, "unclear (0.62-1.30)"), (1.3, "1.20x")]
)
def test_a_speed_is_a_figure_where_the_rounds_agree(lowest, shown):
    rows = [dict(r) for r in ROWS if r["name"] in ("dense", "flap") and r["task"] == "cost"]
    for row in rows:
        if row["name"] == "flap":
            row["prefill"] = {**row["prefill"], "speedup": 1.2, "speedup_range": [lowest, 1.3]}
    (made,) = report.summarise(rows)
    column = {c.key: c for c in columns([made])}["prefill"]
    cells = [c for e, c in zip(made.entries, column.cells, strict=True) if not e.dense]
    assert {c.plain for c in cells} == {shown}
    assert all((c.value is None) == shown.startswith("unclear") for c in cells)


def test_no_speed_of_methods_that_were_timed_one_after_the_other():
    rows = [r for r in ROWS if r["task"] != "cost"]
    (made,) = report.summarise(rows)
    assert {"prefill", "decode", "speed"}.isdisjoint(c.key for c in columns([made]))


def test_best_is_the_smallest_or_largest_and_none_where_all_are_alike(summary):
    shown = {c.key: c for c in columns([summary])}
    among = [i for i, e in enumerate(summary.entries) if e.ratio == 0.2]
    (lowest,) = best(shown["perplexity wikitext2"], among)
    assert summary.entries[lowest].name == "full-batch"
    means = {
        i: summary.entries[i].quality.mean_accuracy["harness"].value
        for i in among
        if summary.entries[i].lines
    }
    assert best(shown["accuracy mean"], among) == {max(means, key=means.get)}
    assert best(shown["kv"], among) == set() == best(shown["ratio"], among)


def test_terminal_and_markdown_have_a_line_for_every_entry(summary):
    text = [line for line in report.markdown(ROWS, "t").splitlines() if line.startswith("|")]
    heads = text[0].strip("| ").split(" | ")
    assert len(text) == 2 + len(summary.entries) and heads[:2] == ["method", "ratio"]
    assert heads.count("x dense") == 2 and set(fake_results.TASKS) < set(heads)
    two = report.markdown([*ROWS, *fake_results.rows(seeds=(0,), items=5, layers=1, model="other")], "t")
    assert "| other | probe | 20% |" in two
    whole, split = report.table(ROWS, "t", width=1000), report.table(ROWS, "t")
    tables = [t for t in split.renderables if hasattr(t, "columns")]
    assert [len(t.rows) for t in tables] == [len(summary.entries)] * 3
    headers = [str(c.header) for t in tables for c in t.columns]
    (one,) = [t for t in whole.renderables if hasattr(t, "columns")]
    assert sorted(headers) == sorted([str(c.header) for c in one.columns] + ["method", "ratio"] * 2)
    failed = "ppsp 40% failed on boolq: the model's loss is NaN or infinite; try another dtype."
    assert failures(summary.entries) == [failed] and failed in report.markdown(ROWS, "t")
    row = only(name="probe", ratio=0.2, seed=0, task="wikitext2")
    (line,) = report.markdown([only(name="dense", task="wikitext2"), row], "t").splitlines()[5:6]
    cells = line.strip("| ").split(" | ")
    assert cells[0] == "probe" and cells[1] == "20%" and cells[3].startswith(f"{row['value']:.2f} ± ")
