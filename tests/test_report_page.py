"""The report's page against the lines it is made from: parsed, and in a real browser."""

import re
import shutil
import statistics
import subprocess
from pathlib import Path

import fake_results
import pytest
from fake_results import ROWS, entry, lines, only
from page_parser import Page

from probeprune import report
from probeprune.errors import UsageError
from probeprune.report.columns import columns
from probeprune.report.paired import paired_accuracy, paired_bootstrap
from probeprune.report.palette import COLOURS
from probeprune.stages import MODEL, STAGES


@pytest.fixture(scope="module")
def summary():
    return fake_results.summary()


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    published = {(fake_results.MODEL, "probe", 0.2): {"perplexity": 8.1, "accuracy": 62.8}}
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
        for text in fake_results.TEXTS:
            own = [r["value"] for r in lines(name=name, ratio=ratio, task=text)]
            value = sum(own) / len(own)
            said, attributes = row[f"perplexity {text}"]
            assert said.startswith(f"{value:.2f} ") and float(attributes["data-v"]) == pytest.approx(value)
            spread = statistics.stdev(own) if len(own) > 1 else only(name=name, task=text)["standard_error"]
            assert said.endswith(f"± {spread:.2f} {'sd' if len(own) > 1 else 'se'}")
            if name != "dense":
                over = value / only(name="dense", task=text)["value"]
                assert row[f"over dense {text}"][0].startswith(f"{over:.3f} ")
        for task in fake_results.TASKS:
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
    for ratio in fake_results.RATIOS:
        own = {n: lines(name=n, ratio=ratio, task="wikitext2") for n in fake_results.HURTS}
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
        if not e.lines:
            continue
        name = "dense" if e.dense else f"{e.name} {e.ratio:.0%}"
        for text in fake_results.TEXTS:
            value = e.quality.perplexity[text].value
            assert f"{name}: perplexity {value:.2f}, FLOPs {100 * e.cost.flops_share:.1f}% of dense" in said
            assert f"{name}: perplexity {value:.2f}, time {100 / e.cost.prefill.value:.1f}% of dense" in said
        if not e.dense:
            for task in fake_results.TASKS:
                found = e.quality.accuracy[task]
                assert f"{name}: {100 * found.value:.1f} ± {100 * found.spread:.1f}" in said
    assert sum(" FLOPs " in s for s in said) == 2 * 15 and sum(" time " in s for s in said) == 2 * 15


def test_comparisons_are_paired_on_the_same_windows_and_items(parsed):
    matrices = [t for t in parsed.tables if t[0][0] == ("", {})]
    assert len(matrices) == 2 * 3  # two ratios; two texts and the tasks

    def losses(name, text):
        return [only(name=name, ratio=0.2, task=text, seed=s)["losses"] for s in fake_results.SEEDS]

    def correct(name):
        own = {
            t: [only(name=name, ratio=0.2, task=t, seed=s) for s in fake_results.SEEDS]
            for t in fake_results.TASKS
        }
        return {t: [r["correct"] for r in rows] for t, rows in own.items()}

    for matrix, text in zip(matrices, (*fake_results.TEXTS, None), strict=False):
        names = [said for said, _ in matrix[0][1:]]
        assert sorted(names) == sorted(fake_results.HURTS)
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
        saved = 1 - 1 / e.cost.prefill.value
        assert row[2][0] == f"{100 * saved:.1f}%"
        for text, (said, _) in zip(fake_results.TEXTS, row[3:5], strict=True):
            lost = e.quality.perplexity[text].value - dense.quality.perplexity[text].value
            assert said == (f"{lost / saved:.1f}" if saved > 0 else "-")
    kept = [t for t in parsed.tables if t[0][0][0] == "layer"]
    assert len(kept) == 2 * 7
    order = [e for e in summary.entries if e.ratio and e.lines]
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
        "dense", *(f"{e.name} {e.ratio:.0%}" for e in order if e.name in fake_results.DYNAMIC)
    ]  # fmt: skip
    stages = only(name="probe", ratio=0.2, seed=0, task="cost")["stages"]
    (row,) = [r for r in table if r[0][0] == "probe 20%"]
    assert row[2][0] == f"{100 * (1 - sum(stages.values())):.1f}%"
    assert list(stages) == [stage.name for stage in STAGES]
    assert [c[0] for c in row[3:]] == [f"{100 * stages[k]:.1f}%" for k in stages]
    assert [c[0] for c in table[0][2:]] == [stage.label for stage in (MODEL, *STAGES)]


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
            assert contrast(colours[scheme], paper) >= 3, (colours, scheme)


EVIL = "<script>alert(1)</script>\"'&<b>{{ 7 * 7 }}"


def test_everything_from_the_lines_is_escaped(tmp_path):
    rows = []
    for row in fake_results.rows(seeds=(0,), items=5, layers=1, model=EVIL):
        changed = {**row, "name": row["name"] + EVIL, "dtype": EVIL, "versions": {EVIL: EVIL}}
        changed |= {k: row[k] + EVIL for k in ("task", "error", "main") if k in row}
        rows.append(changed)
    path = tmp_path / "deep" / "evil.html"
    report.write_html(rows, path, EVIL, problems=[EVIL])
    text = path.read_text(encoding="utf-8")
    parsed = Page(text)
    assert sum(n == "script" for n, _ in parsed.elements) == 1 and "<b>" not in text
    assert "49" not in re.findall(r"<h1>(.*)</h1>", text)[0]
    assert parsed.titles()[0] == EVIL
    assert any(EVIL in a.get("aria-label", "") for _, a in parsed.elements)


def test_what_is_not_there_is_not_shown(tmp_path):
    row = fake_results.perplexity_row("probe", 0.2, 0, [1.0, 2.0])
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
    other = fake_results.rows(seeds=(0,), items=5, layers=1, model="other/model")
    path = tmp_path / "two.html"
    report.write_html([*ROWS, *other], path, "two")
    parsed = Page(path.read_text(encoding="utf-8"))
    assert [d for n, d in parsed.words if n == "h2"] == [fake_results.MODEL, "other/model"]
    with pytest.raises(UsageError, match="a figure shows one model"):
        report.plot([*ROWS, *other], "t", tmp_path / "plot")
    names = {f.name for f in report.write_figures([*ROWS, *other], tmp_path)}
    assert {"1-wikitext2-flops.png", "2-wikitext2-flops.png", "2-tasks.svg"} <= names


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
    for ratio in fake_results.RATIOS:
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
    assert order(dom)["20% pruned"] == sorted(fake_results.HURTS)


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium to look at the page with; apt-get install chromium")
def test_the_browser_would_tell_of_an_error_or_a_request(page, tmp_path):
    _, told = browse(page, tmp_path, script="fail();")
    assert len(told) == 1 and "fail is not defined" in told[0]
    _, told = browse(page, tmp_path, script="new Image().src = 'pixel.png';")
    assert len(told) == 1 and "Content Security Policy" in told[0]
