"""The report against the lines it is made from: aggregation written out, the page parsed, a real browser."""

import dataclasses
import json
import math
import random
import re
import shutil
import statistics
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import made_up
import pytest

from probeprune import report
from probeprune.cli import app, run
from probeprune.errors import UsageError
from probeprune.methods import METHODS
from probeprune.report.columns import best, columns
from probeprune.report.paired import paired_accuracy, paired_bootstrap
from probeprune.report.palette import COLOURS
from probeprune.report.summary import Speed, pareto_front, prr
from probeprune.report.text import failures

ROWS = made_up.rows(items=120, layers=6)


def lines(**wanted) -> list[dict]:
    return [r for r in ROWS if all(r.get(k) == v for k, v in wanted.items())]


def only(**wanted) -> dict:
    (row,) = lines(**wanted)
    return row


@pytest.fixture(scope="module")
def summary():
    (found,) = report.summarise(ROWS)
    return found


def entry(summary, name: str, ratio: float):
    (found,) = (e for e in summary.entries if e.name == name and e.ratio == ratio)
    return found


# -- reading ---------------------------------------------------------------------------------------


def test_a_corrupt_line_is_named_and_the_rest_kept(tmp_path):
    good = [json.dumps(r) for r in made_up.rows(seeds=(0,), items=5, layers=1)[:4]]
    bad = ['{"kind": "result", "name"', "[1]", '{"kind": "rumour"}', json.dumps({**ROWS[0], "value": "high"})]
    missing = json.dumps({k: v for k, v in ROWS[0].items() if k != "task"})
    shape = json.dumps({**ROWS[0], "losses": 3.0})
    infinite = json.dumps({**ROWS[0], "value": math.inf})
    content = [good[0], bad[0], good[1], *bad[1:], missing, shape, infinite, "", *good[2:], good[0][:70]]
    file = tmp_path / "results.jsonl"
    file.write_bytes("\n".join(content).encode() + b"\n\xff\xfe\n")
    rows, problems = report.read_rows(tmp_path)
    assert [json.dumps(r) for r in rows] == good
    assert [int(re.search(r"line (\d+)", p)[1]) for p in problems] == [2, 4, 5, 6, 7, 8, 9, 13, 14]
    assert [p.partition("left out: ")[2] for p in problems] == [
        "not JSON.",
        "neither a result nor a failure but None.",
        "neither a result nor a failure but 'rumour'.",
        "'value' is not a finite number.",
        "'task' is missing.",
        "'losses' is not what it should be.",
        "'value' is not a finite number.",
        "not JSON.",
        "not JSON.",
    ]


def test_the_last_line_of_a_cell_counts(tmp_path):
    row = made_up.perplexity_row("probe", 0.2, 0, [1.0, 2.0]) | {"key": "a"}
    failed = {**row, "kind": "failure", "error": "no memory"}
    again = {**row, "value": 5.0}
    file = made_up.write(tmp_path / "results.jsonl", [failed, row, row | {"key": "b"}, again])
    rows, problems = report.read_rows(file)
    assert [(r["kind"], r["key"], r["value"]) for r in rows] == [
        ("result", "b", row["value"]),
        ("result", "a", 5.0),
    ]
    assert problems == []


def test_nothing_to_read_is_one_sentence(tmp_path):
    with pytest.raises(UsageError, match=r"nowhere does not exist; give the folder of a run"):
        report.read_rows(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"results\.jsonl does not exist"):
        report.read_rows(tmp_path)
    made_up.write(tmp_path / "results.jsonl", [ROWS[-1]])
    with pytest.raises(UsageError, match=r"holds no results \(1 lines of other kinds\)"):
        report.read_rows(tmp_path)


# -- aggregation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*made_up.STATIC, *made_up.DYNAMIC])
@pytest.mark.parametrize("ratio", made_up.RATIOS)
def test_an_entry_is_the_mean_over_its_seeds(summary, name, ratio):
    found = entry(summary, name, ratio)
    dense = {text: only(name="dense", task=text) for text in made_up.TEXTS}
    assert found.seeds == made_up.SEEDS
    for text in made_up.TEXTS:
        own = [only(name=name, ratio=ratio, task=text, seed=s) for s in made_up.SEEDS]
        values = [r["value"] for r in own]
        assert found.perplexity[text].value == pytest.approx(sum(values) / 3)
        assert found.perplexity[text].spread == pytest.approx(statistics.stdev(values))
        factors = [v / dense[text]["value"] for v in values]
        assert found.over_dense[text].value == pytest.approx(sum(factors) / 3)
        assert found.over_dense[text].spread == pytest.approx(statistics.stdev(factors))
    for task in made_up.TASKS:
        values = [only(name=name, ratio=ratio, task=task, seed=s)["value"] for s in made_up.SEEDS]
        assert found.accuracy[task].value == pytest.approx(sum(values) / 3)
        assert found.accuracy[task].seeds == 3
    means = [
        statistics.fmean(only(name=name, ratio=ratio, task=t, seed=s)["value"] for t in made_up.TASKS)
        for s in made_up.SEEDS
    ]
    assert found.mean_accuracy["harness"].value == pytest.approx(statistics.fmean(means))
    assert found.mean_accuracy["harness"].spread == pytest.approx(statistics.stdev(means))
    costs = [only(name=name, ratio=ratio, task="cost", seed=s) for s in made_up.SEEDS]
    assert found.prefill.value == pytest.approx(statistics.fmean(c["prefill"]["speedup"] for c in costs))
    assert found.prefill.low == min(c["prefill"]["speedup_range"][0] for c in costs)
    assert found.prefill.high == max(c["prefill"]["speedup_range"][1] for c in costs)
    assert found.memory == max(c["peak_memory"] for c in costs)
    flops = [
        only(name=name, ratio=ratio, task=t, seed=s)["flops_per_token"] / dense[t]["flops_per_token"]
        for t in made_up.TEXTS
        for s in made_up.SEEDS
    ]
    assert found.flops_share == pytest.approx(statistics.fmean(flops))


def test_one_seed_has_the_standard_error_instead_and_says_so(summary):
    dense = summary.dense
    row = only(name="dense", task="wikitext2")
    assert dense.perplexity["wikitext2"] == report.summary.Estimate(row["value"], row["standard_error"], 1)
    errors = [only(name="dense", task=t)["standard_error"] for t in made_up.TASKS]
    assert dense.mean_accuracy["harness"].spread == pytest.approx(
        math.sqrt(sum(e**2 for e in errors)) / len(errors)
    )
    shown = {c.key: c for c in columns([summary])}["perplexity wikitext2"]
    assert shown.cells[0].note.endswith(" se") and shown.cells[1].note.endswith(" sd")
    # The factor's error is that of the paired difference, far below that of either perplexity.
    one = made_up.perplexity_row("probe", 0.4, 0, [x + 0.5 for x in row["losses"]])
    (single,) = report.summarise([row, one])
    assert single.entries[1].over_dense["wikitext2"].value == pytest.approx(math.exp(0.5), rel=1e-5)
    assert single.entries[1].over_dense["wikitext2"].spread == pytest.approx(0, abs=1e-9)


def test_a_mean_over_some_of_the_tasks_is_not_shown():
    rows = [r for r in ROWS if not (r["name"] == "flap" and r["task"] == "piqa" and r["seed"] != 1)]
    rows = [r for r in rows if not (r["name"] == "probe" and r["task"] == "piqa")]
    (found,) = report.summarise(rows)
    assert "harness" not in entry(found, "probe", 0.2).mean_accuracy
    flap = entry(found, "flap", 0.2).mean_accuracy["harness"]
    whole = [only(name="flap", ratio=0.2, seed=1, task=t)["value"] for t in made_up.TASKS]
    assert (flap.seeds, flap.value) == (1, pytest.approx(statistics.fmean(whole)))


def test_protocols_never_share_a_column():
    theirs = [r | {"protocol": "published", "value": r["value"] / 2} for r in lines(task="piqa")]
    (found,) = report.summarise([*ROWS, *theirs])
    probe = entry(found, "probe", 0.2)
    assert probe.accuracy["piqa (published)"].value == pytest.approx(probe.accuracy["piqa"].value / 2)
    assert found.protocols["published"] == ("piqa (published)",)
    assert probe.mean_accuracy["published"].value == pytest.approx(probe.accuracy["piqa"].value / 2)
    assert (
        probe.mean_accuracy["harness"]
        == entry(report.summarise(ROWS)[0], "probe", 0.2).mean_accuracy["harness"]
    )


def test_methods_of_one_name_with_other_parameters_are_told_apart():
    one = made_up.perplexity_row("probe", 0.2, 0, [1.0, 2.0])
    other = made_up.perplexity_row("probe", 0.2, 1, [1.5, 2.0])
    other["method"] = other["method"] | {"skip_layers": 0}
    trained = made_up.perplexity_row("flap+lora", 0.2, 0, [1.5, 2.5])
    longer = trained | {"training": trained["training"] | {"steps": 999, "seconds": 3.0}}
    slower = trained | {"seed": 1, "training": trained["training"] | {"seconds": 3.0}}
    (found,) = report.summarise([one, other, trained, longer, slower])
    assert {e.label: e.seeds for e in found.entries} == {
        "probe (skip_layers=3)": (0,),
        "probe (skip_layers=0)": (1,),
        "flap+lora (steps=120)": (0, 1),
        "flap+lora (steps=999)": (0,),
    }


def test_what_was_measured_otherwise_is_another_column_or_study():
    row = made_up.perplexity_row("probe", 0.2, 0, [1.0, 2.0])
    longer = made_up.perplexity_row("probe", 0.2, 0, [1.0, 2.0, 3.0])
    half = made_up.perplexity_row("probe", 0.2, 0, [1.5, 2.5], dtype="bfloat16")
    first, second = report.summarise([row, longer, half])
    assert (first.model, second.model) == (
        f"{made_up.MODEL} (dtype=float32)",
        f"{made_up.MODEL} (dtype=bfloat16)",
    )
    assert first.texts == ("wikitext2 (windows=2)", "wikitext2 (windows=3)") and second.texts == (
        "wikitext2",
    )
    assert first.entries[0].perplexity[first.texts[1]].value == pytest.approx(math.exp(2))
    fewer = [r | {"items": 7} for r in lines(name="probe", task="boolq")]
    (found,) = report.summarise([*ROWS, *fewer])
    assert {"boolq (items=120)", "boolq (items=7)"} < set(found.tasks) and "piqa" in found.tasks


def test_lines_that_cannot_be_told_apart_are_not_averaged():
    row = made_up.perplexity_row("probe", 0.2, 0, [1.0, 2.0])
    other = made_up.perplexity_row("probe", 0.2, 0, [2.0, 3.0])
    (found,) = report.summarise([row, other])
    assert found.entries[0].perplexity["wikitext2"].value == other["value"]
    (note,) = found.notes
    assert note.startswith("1 lines measure what a later line measures too")
    short = [r | {"length": 64} for r in lines(task="cost", name="probe", ratio=0.2, seed=0)]
    (found,) = report.summarise([*short, *ROWS])
    assert entry(found, "probe", 0.2).prefill == entry(report.summarise(ROWS)[0], "probe", 0.2).prefill
    assert found.notes == (
        "Speed was measured on several shapes; the latest is shown, prefill of 16 x 512 and 64 new tokens.",
    )


def test_a_trained_dense_model_is_compared_with_the_dense_one():
    control = made_up.perplexity_row("dense+lora", 0.0, 0, [1.5, 2.5])
    (found,) = report.summarise([control, made_up.perplexity_row("dense", 0.0, 0, [1.0, 2.0])])
    assert [(e.label, e.dense) for e in found.entries] == [("dense", True), ("dense+lora", False)]
    assert found.entries[1].over_dense["wikitext2"].value == pytest.approx(math.exp(0.5))


def test_a_failure_joins_its_method_or_stands_alone(summary):
    alone = entry(summary, "ppsp", 0.4)
    assert alone.rows == () and [f.task for f in alone.failures] == ["boolq"]
    failed = {
        **ROWS[-1],
        "name": "probe",
        "method": METHODS["probe"].record() | {"training": "none"},
        "seed": 7,
    }
    (found,) = report.summarise([*ROWS, failed])
    probe = entry(found, "probe", 0.4)
    assert len(probe.failures) == 1 and probe.perplexity == entry(summary, "probe", 0.4).perplexity


def test_dense_comes_first_then_ratios_each_best_last(summary):
    order = [(e.ratio, -e.perplexity["wikitext2"].value) for e in summary.entries if e.rows]
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
    assert prr(16.8 - 6.0, Speed(1 / (1 - 0.289), 1, 2)) == pytest.approx(37.37, rel=1e-3)
    assert prr(38.9 - 6.0, Speed(1 / (1 - 0.344), 1, 2)) == pytest.approx(95.65, rel=1e-3)
    assert prr(1.0, Speed(1.0, 1, 1)) is None and prr(1.0, None) is None


def test_best_is_the_smallest_or_largest_and_none_where_all_are_alike(summary):
    shown = {c.key: c for c in columns([summary])}
    among = [i for i, e in enumerate(summary.entries) if e.ratio == 0.2]
    (lowest,) = best(shown["perplexity wikitext2"], among)
    assert summary.entries[lowest].name == "full-batch"
    means = {i: summary.entries[i].mean_accuracy["harness"].value for i in among if summary.entries[i].rows}
    assert best(shown["accuracy mean"], among) == {max(means, key=means.get)}
    assert best(shown["kv"], among) == set() == best(shown["ratio"], among)


def test_terminal_and_markdown_have_a_line_for_every_entry(summary):
    text = [line for line in report.markdown(ROWS, "t").splitlines() if line.startswith("|")]
    heads = text[0].strip("| ").split(" | ")
    assert len(text) == 2 + len(summary.entries) and heads[:2] == ["method", "ratio"]
    assert heads.count("x dense") == 2 and set(made_up.TASKS) < set(heads)
    two = report.markdown([*ROWS, *made_up.rows(seeds=(0,), items=5, layers=1, model="other")], "t")
    assert "| other | probe | 20% |" in two
    whole, split = report.table(ROWS, "t", width=1000), report.table(ROWS, "t")
    tables = [t for t in split.renderables if hasattr(t, "columns")]
    assert [len(t.rows) for t in tables] == [len(summary.entries)] * 3
    headers = [c.header for t in tables for c in t.columns]
    (one,) = [t for t in whole.renderables if hasattr(t, "columns")]
    assert sorted(headers) == sorted([c.header for c in one.columns] + ["method", "ratio"] * 2)
    failed = "ppsp 40% failed on boolq: the model's loss is NaN or infinite; try another dtype."
    assert failures(summary.entries) == [failed] and failed in report.markdown(ROWS, "t")
    row = only(name="probe", ratio=0.2, seed=0, task="wikitext2")
    said = report.cells(row, report.dense_row(ROWS))
    assert said[0] == "probe" and said[1] == "20%" and said[3].startswith(f"{row['value']:.2f} ± ")


# -- the page --------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Tables as lists of rows of (text, attributes), and every element with its attributes."""

    VOID = ("meta", "br", "link", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.tables: list[list[list[tuple[str, dict]]]] = []
        self.words: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == [], "an element was not closed"

    def handle_starttag(self, name, attributes):
        self.elements.append((name, dict(attributes)))
        if name not in self.VOID:
            self.open.append(name)
        if name == "table":
            self.tables.append([])
        elif name == "tr":
            self.tables[-1].append([])
        elif name in ("td", "th"):
            self.tables[-1][-1].append(("", dict(attributes)))

    def handle_startendtag(self, name, attributes):
        self.elements.append((name, dict(attributes)))

    def handle_endtag(self, name):
        assert self.open.pop() == name, f"{name} closes something else"

    def handle_data(self, data):
        if self.open:
            self.words.append((self.open[-1], data))
        if "table" in self.open and ("td" in self.open or "th" in self.open):
            text, attributes = self.tables[-1][-1][-1]
            self.tables[-1][-1][-1] = text + data, attributes

    def titles(self) -> list[str]:
        return [data for name, data in self.words if name == "title"]


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    published = {(made_up.MODEL, "probe", 0.2): {"perplexity": 8.1, "accuracy": 62.8}}
    report.write_html(ROWS, path, "Pruning a model", published=published)
    return path


@pytest.fixture(scope="module")
def parsed(page) -> Page:
    return Page(page.read_text(encoding="utf-8"))


def test_every_figure_of_the_table_is_the_lines(parsed):
    heads, *body = parsed.tables[0]
    keys = [a["data-key"] for _, a in heads]
    shown = {}
    ratio = 0.0
    for cells in body:
        if cells[0][1].get("scope") == "rowgroup":
            ratio = 0.0 if cells[0][0] == "not pruned" else float(cells[0][0].split("%")[0]) / 100
        elif len(cells) == len(keys):
            shown[cells[0][0], ratio] = dict(zip(keys, cells, strict=True))
    assert len(shown) == 1 + 2 * 7
    for (name, ratio), row in shown.items():
        for text in made_up.TEXTS:
            own = [r["value"] for r in lines(name=name, ratio=ratio, task=text)]
            value = sum(own) / len(own)
            said, attributes = row[f"perplexity {text}"]
            assert said.startswith(f"{value:.2f} ") and float(attributes["data-v"]) == pytest.approx(value)
            spread = statistics.stdev(own) if len(own) > 1 else only(name=name, task=text)["standard_error"]
            assert said.endswith(f"± {spread:.2f} {'sd' if len(own) > 1 else 'se'}")
            if name != "dense":
                over = value / only(name="dense", task=text)["value"]
                assert row[f"over dense {text}"][0].startswith(f"{over:.3f} ")
        for task in made_up.TASKS:
            own = [r["value"] for r in lines(name=name, ratio=ratio, task=task)]
            assert row[f"accuracy {task}"][0].startswith(f"{100 * sum(own) / len(own):.1f} ")
        costs = lines(name=name, ratio=ratio, task="cost")
        for phase in ("prefill", "decode"):
            speed = statistics.fmean(c[phase]["speedup"] for c in costs)
            assert row[phase][0].startswith("-" if name == "dense" else f"{speed:.2f}x (")
        assert row["memory"][0].startswith(f"{max(c['peak_memory'] for c in costs) / 2**30:.2f} GiB")
        assert row["kv"][0] == f"{100 * costs[0]['kv_cache_share']:.0f}%"
        assert row["training"][0].startswith("246k in" if name.endswith("+lora") else "-")
    probe = shown["probe", 0.2]
    assert probe["published perplexity"][0] == "8.1" and probe["published accuracy"][0] == "62.8"
    for ratio in made_up.RATIOS:
        own = {n: lines(name=n, ratio=ratio, task="wikitext2") for n in made_up.HURTS}
        means = {n: statistics.fmean(r["value"] for r in rows) for n, rows in own.items()}
        cells = {n: row["perplexity wikitext2"] for (n, r), row in shown.items() if r == ratio}
        bold = [n for n, (_, attributes) in cells.items() if attributes.get("class") == "best"]
        assert bold == [min(means, key=means.get)]
    assert "best" not in [a.get("class") for _, a in shown["dense", 0.0].values()]


def test_a_failure_is_a_row_with_its_sentence(parsed):
    (row,) = [r for r in parsed.tables[0] if len(r) == 2]
    assert row[0][0] == "ppsp"
    assert row[1][0] == "failed on boolq: the model's loss is NaN or infinite; try another dtype."


def test_every_point_and_bar_says_the_lines_figures(parsed, summary):
    said = parsed.titles()
    for e in summary.entries:
        if not e.rows:
            continue
        name = "dense" if e.dense else f"{e.name} {e.ratio:.0%}"
        for text in made_up.TEXTS:
            value = e.perplexity[text].value
            assert f"{name}: perplexity {value:.2f}, FLOPs {100 * e.flops_share:.1f}% of dense" in said
            assert f"{name}: perplexity {value:.2f}, time {100 / e.prefill.value:.1f}% of dense" in said
        if not e.dense:
            for task in made_up.TASKS:
                found = e.accuracy[task]
                assert f"{name}: {100 * found.value:.1f} ± {100 * found.spread:.1f}" in said
    assert sum(" FLOPs " in s for s in said) == 2 * 15 and sum(" time " in s for s in said) == 2 * 15


def test_comparisons_are_paired_on_the_same_windows_and_items(parsed):
    matrices = [t for t in parsed.tables if t[0][0] == ("", {})]
    assert len(matrices) == 2 * 3  # two ratios; two texts and the tasks

    def losses(name, text):
        return [only(name=name, ratio=0.2, task=text, seed=s)["losses"] for s in made_up.SEEDS]

    def correct(name):
        own = {t: [only(name=name, ratio=0.2, task=t, seed=s) for s in made_up.SEEDS] for t in made_up.TASKS}
        return {t: [r["correct"] for r in rows] for t, rows in own.items()}

    for matrix, text in zip(matrices, (*made_up.TEXTS, None), strict=False):
        names = [said for said, _ in matrix[0][1:]]
        assert sorted(names) == sorted(made_up.HURTS)
        for i, row in enumerate(matrix[1:]):
            for j, (said, attributes) in enumerate(row[1:]):
                if i == j:
                    assert attributes["class"] == "none"
                    continue
                # Each pair is compared once, and shown both ways.
                later, earlier = names[max(i, j)], names[min(i, j)]
                if text is None:
                    found = paired_accuracy(correct(later), correct(earlier))
                    found = found if i > j else found.inverse
                    wanted = f"{found.points:+.1f}{found.low:+.1f} to {found.high:+.1f}"
                else:
                    found = paired_bootstrap(losses(later, text), losses(earlier, text))
                    found = found if i > j else found.inverse
                    wanted = f"{found.factor:.3f}{found.low:.3f}-{found.high:.3f}"
                assert said.lstrip("▲▼ ") == wanted
                assert attributes["class"] == {1: "better", -1: "worse", 0: "open"}[found.verdict]


def test_prr_kept_units_and_stages_are_the_lines_figures(parsed, summary):
    (table,) = [t for t in parsed.tables if t[0][-1][0].startswith("mean accuracy, points")]
    dense = summary.dense
    for row in table[1:]:
        e = entry(summary, row[0][0], float(row[1][0].rstrip("%")) / 100)
        saved = 1 - 1 / e.prefill.value
        assert row[2][0] == f"{100 * saved:.1f}%"
        for text, (said, _) in zip(made_up.TEXTS, row[3:5], strict=True):
            lost = e.perplexity[text].value - dense.perplexity[text].value
            assert said == (f"{lost / saved:.1f}" if saved > 0 else "-")
    kept = [t for t in parsed.tables if t[0][0][0] == "layer"]
    assert len(kept) == 2 * 7
    order = [e for e in summary.entries if e.ratio and e.rows]
    for table, e in zip(kept, order, strict=True):
        units = only(name=e.name, ratio=e.ratio, seed=0, task="wikitext2")["units"]
        for layer, row in enumerate(table[1:]):
            heads, channels = units[2 * layer : 2 * layer + 2]
            assert row[1][0] == f"{heads['kept']} of 9" and row[4][0] == f"{channels['kept']} of 1536"
            assert [int(x) for x in row[3][0].split()] == [round(100 * f) for f in heads["frequency"]]
            assert [int(x) for x in row[6][0].split()] == [round(100 * f) for f in channels["frequency"]]
            assert row[2][0] == f"{100 * heads['changed']:.1f}%"
    (table,) = [t for t in parsed.tables if t[0][1][0] == "time, % of dense"]
    assert [row[0][0] for row in table[1:]] == [
        "dense", *(f"{e.name} {e.ratio:.0%}" for e in order if e.name in made_up.DYNAMIC)
    ]  # fmt: skip
    stages = only(name="probe", ratio=0.2, seed=0, task="cost")["stages"]
    (row,) = [r for r in table if r[0][0] == "probe 20%"]
    assert row[2][0] == f"{100 * (1 - sum(stages.values())):.1f}%"
    assert [c[0] for c in row[3:]] == [f"{100 * stages[k]:.1f}%" for k in stages]


def test_it_stands_alone(page, parsed):
    text = page.read_text(encoding="utf-8")
    assert "http://" not in text and "https://" not in text and "@import" not in text and "url(" not in text
    for name, attributes in parsed.elements:
        assert name not in ("link", "img", "iframe", "object", "embed", "base")
        assert not attributes.keys() & {"src", "srcset", "xlink:href", "action", "onclick", "onload"}
        assert attributes.get("href", "#").startswith("#")
    policy = next(a["content"] for n, a in parsed.elements if a.get("http-equiv"))
    assert policy.startswith("default-src 'none'")
    assert len(text.encode()) < 2e6


def test_it_can_be_read_by_who_cannot_see_it(parsed):
    charts = [
        a for n, a in parsed.elements if n == "svg" and "aria-hidden" not in a and a.get("role") == "img"
    ]
    assert len(charts) == 2 + 2 + 7 + 14 + 1
    assert all(len(a["aria-label"]) > 30 for a in charts)
    assert sum(n == "desc" for n, _ in parsed.elements) == len(charts)
    assert all("scope" in a for n, a in parsed.elements if n == "th")
    assert all("tabindex" in a for _, a in parsed.elements if "scroll" in a.get("class", "").split())
    assert {"lang": "en"} in [a for n, a in parsed.elements if n == "html"]


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    """WCAG 2.2's contrast ratio."""
    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_words_and_marks_have_contrast_in_both_schemes(page):
    text = page.read_text(encoding="utf-8")
    known = dict(re.findall(r"--(\w+): light-dark\((#\w{6}, #\w{6})\)", text.split(".s0 {")[0]))
    for scheme in (0, 1):
        paper = known["paper"].split(", ")[scheme]
        for name in ("ink", "quiet", "accent", "good", "bad"):
            assert contrast(known[name].split(", ")[scheme], paper) >= 4.5, (name, scheme)
        for colours in COLOURS:
            assert contrast(colours[1 + scheme], paper) >= 3, (colours, scheme)


EVIL = "<script>alert(1)</script>\"'&<b>{{ 7 * 7 }}"


def test_everything_from_the_lines_is_escaped(tmp_path):
    rows = []
    for row in made_up.rows(seeds=(0,), items=5, layers=1, model=EVIL):
        changed = {**row, "name": row["name"] + EVIL, "dtype": EVIL, "versions": {EVIL: EVIL}}
        changed |= {k: row[k] + EVIL for k in ("task", "error", "main") if k in row}
        rows.append(changed)
    settings = {"kind": "settings", EVIL: EVIL}
    path = tmp_path / "deep" / "evil.html"
    report.write_html([settings, *rows], path, EVIL, problems=[EVIL])
    text = path.read_text(encoding="utf-8")
    parsed = Page(text)
    assert sum(n == "script" for n, _ in parsed.elements) == 1 and "<b>" not in text
    assert "49" not in re.findall(r"<h1>(.*)</h1>", text)[0]
    assert parsed.titles()[0] == EVIL
    assert any(EVIL in a.get("aria-label", "") for _, a in parsed.elements)


def test_what_is_not_there_is_not_shown(tmp_path):
    row = made_up.perplexity_row("probe", 0.2, 0, [1.0, 2.0])
    path = tmp_path / "one.html"
    report.write_html([row], path, "one")
    parsed = Page(path.read_text(encoding="utf-8"))
    assert [said for said, _ in parsed.tables[0][0]] == ["method", "ratio", "pruned", "perplexity"]
    assert len(parsed.tables) == 1 and not any(a.get("role") == "img" for _, a in parsed.elements)
    tasks = [r for r in ROWS if r.get("metric") == "accuracy"]
    report.write_html(tasks, path, "tasks only")
    assert len(Page(path.read_text(encoding="utf-8")).tables) == 1 + 2
    with pytest.raises(UsageError, match="no result"):
        report.write_html([ROWS[-1]], path, "none")


def test_two_models_have_a_study_each(tmp_path):
    other = made_up.rows(seeds=(0,), items=5, layers=1, model="other/model")
    path = tmp_path / "two.html"
    report.write_html([*ROWS, *other], path, "two")
    parsed = Page(path.read_text(encoding="utf-8"))
    assert [d for n, d in parsed.words if n == "h2"] == [made_up.MODEL, "other/model"]
    with pytest.raises(UsageError, match="a figure shows one model"):
        report.plot([*ROWS, *other], "t", tmp_path / "plot")
    names = {f.name for f in report.write_figures([*ROWS, *other], tmp_path)}
    assert {"1-wikitext2-flops.png", "2-wikitext2-flops.png", "2-tasks.svg"} <= names


# -- figures and command line ----------------------------------------------------------------------


def test_figures_for_papers(tmp_path):
    written = report.write_figures(ROWS, tmp_path / "figures")
    wanted = [f"{t}-{w}" for t in made_up.TEXTS for w in ("flops", "time")] + ["tasks"]
    assert [f.name for f in written] == [f"{w}{e}" for w in wanted for e in (".png", ".svg")]
    for file in written:
        content = file.read_bytes()
        if file.suffix == ".png":
            assert content.startswith(b"\x89PNG")
        else:
            assert all(name.encode() in content for name in made_up.HURTS)


def call(*arguments: str) -> int:
    return run(lambda: app(list(arguments)))


def test_command_writes_the_page_and_the_figures(tmp_path, capsys):
    file = made_up.write(tmp_path / "run" / "results.jsonl", ROWS)
    file.write_bytes(file.read_bytes() + b'{"kind": "res')
    assert call("report", str(file.parent)) == 0
    printed = capsys.readouterr()
    assert f"line {len(ROWS) + 1} was left out: not JSON" in printed.err.replace("\n", "")
    assert "full-batch" in printed.out
    assert (tmp_path / "run" / "report.html").exists() and (
        tmp_path / "run" / "figures" / "tasks.png"
    ).exists()
    out = tmp_path / "elsewhere" / "page.html"
    assert call("report", str(file), "--out", str(out), "--json") == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert out.exists() and (out.parent / "figures" / "wikitext2-flops.svg").exists()
    (summary,) = report.summarise(ROWS)
    assert [r["label"] for r in records] == [e.label for e in summary.entries]
    probe = next(r for r in records if r["label"] == "probe" and r["ratio"] == 0.4)
    found = entry(summary, "probe", 0.4)
    assert probe["perplexity"]["wikitext2"] == dataclasses.asdict(found.perplexity["wikitext2"])
    lost = found.perplexity["wikitext2"].value - summary.dense.perplexity["wikitext2"].value
    assert probe["prr"]["wikitext2"] == pytest.approx(lost / (1 - 1 / found.prefill.value))


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "does not exist"), ("", "holds no results"), ("hello\n", "holds no results")],
)
def test_bad_input_is_one_sentence(content, says, tmp_path, capsys):
    if content is not None:
        (tmp_path / "results.jsonl").write_text(content)
    assert call("report", str(tmp_path), "--out", str(tmp_path / "page.html")) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and "Traceback" not in error
    assert not (tmp_path / "page.html").exists()


def test_a_page_that_cannot_be_written_is_one_sentence(tmp_path, capsys):
    file = made_up.write(tmp_path / "results.jsonl", ROWS[:2])
    for bad in (tmp_path, file / "page.html"):
        assert call("report", str(file), "--out", str(bad)) == 2
        error = capsys.readouterr().err
        assert "choose another --out" in error and error.count("\n") == 1


def test_help_has_an_example(capsys):
    assert call("report", "--help") == 0
    assert "Example: probeprune report" in capsys.readouterr().out


# -- in a real browser -----------------------------------------------------------------------------

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--v=0",
    "--virtual-time-budget=3000",
    "--dump-dom",
)


def browse(page: Path, tmp_path: Path, fragment: str = "", script: str = "") -> tuple[Page, list[str]]:
    """The page's elements once its script and `script` have run, and what the console was told."""
    changed = tmp_path / "page.html"
    text = page.read_text(encoding="utf-8")
    changed.write_text(text.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    done = subprocess.run(
        [
            CHROMIUM,
            *FLAGS,
            f"--user-data-dir={tmp_path / 'profile'}",
            "--dump-dom",
            changed.as_uri() + fragment,
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return Page(done.stdout), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def order(parsed: Page) -> dict[str, list[str]]:
    """Methods of each group, from top to bottom."""
    found: dict[str, list[str]] = {}
    group = ""
    for row in parsed.tables[0][1:]:
        if row[0][1].get("scope") == "rowgroup":
            group = row[0][0]
            found[group] = []
        else:
            found[group].append(row[0][0])
    return found


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium to look at the page with; apt-get install chromium")
def test_sorting_and_the_scheme_work_in_a_browser(page, parsed, summary, tmp_path):
    def ranked(ratio, key, reverse):
        shown = {c.key: c for c in columns([summary])}[key]
        known = [
            (c.value, e.label) for c, e in zip(shown.cells, summary.entries, strict=True) if e.ratio == ratio
        ]
        return [label for v, label in sorted((k for k in known if k[0] is not None), reverse=reverse)]

    dom, told = browse(page, tmp_path)
    assert told == [] and order(dom) == order(parsed), "nothing is sorted unless asked for"
    dom, told = browse(page, tmp_path, "#sort=perplexity%20wikitext2:1")
    assert told == []
    for ratio in made_up.RATIOS:
        failed = ["ppsp"] if ratio == 0.4 else []  # what has no figure stays at the end
        assert order(dom)[f"{ratio:.0%} pruned"] == ranked(ratio, "perplexity wikitext2", False) + failed
    click = "document.querySelector('[data-key=\"accuracy piqa\"] button').click();"
    dom, told = browse(page, tmp_path, script=click + "document.getElementById('scheme').click();")
    assert told == []
    assert order(dom)["40% pruned"] == [*ranked(0.4, "accuracy piqa", True), "ppsp"]
    (head,) = [a for n, a in dom.elements if "aria-sort" in a]
    assert (head["data-key"], head["aria-sort"]) == ("accuracy piqa", "descending")
    assert [a.get("data-scheme") for n, a in dom.elements if n == "html"] == ["dark"]
    dom, _ = browse(page, tmp_path, "#sort=probe:1")
    assert order(dom)["20% pruned"][:2] == ["probe", "full-batch"], "what has no figure goes to the end"
    dom, _ = browse(page, tmp_path, "#sort=method:1")
    assert order(dom)["20% pruned"] == sorted(made_up.HURTS)


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium to look at the page with; apt-get install chromium")
def test_the_browser_would_tell_of_an_error_or_a_request(page, tmp_path):
    _, told = browse(page, tmp_path, script="fail();")
    assert len(told) == 1 and "fail is not defined" in told[0]
    _, told = browse(page, tmp_path, script="new Image().src = 'pixel.png';")
    assert len(told) == 1 and "Content Security Policy" in told[0]
