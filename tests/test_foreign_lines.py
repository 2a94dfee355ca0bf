"""Result lines of others: every field of every kind of line, changed to anything, is named or shown."""

import json
import math
import random
import time
from collections.abc import Iterator
from typing import Any

import fake_results
import pytest

from probeprune import report
from probeprune.cli import app, run
from probeprune.errors import UsageError
from probeprune.experiment.results import Results
from probeprune.files import RESULTS
from probeprune.report import comparing
from probeprune.report.comparing import MOST
from probeprune.result_lines import check_line

MISSING = object()
VALUES = {
    "missing": MISSING, "null": None, "word": "abc", "negative": -1, "nan": math.nan, "infinite": math.inf,
    "list": [], "record": {}, "true": True, "very long": "x" * 100_000, "half a character": "a\ud83d",
    "zero": 0, "large": 1e30, "small": 1e-30, "huge": 10**400, "numbers": [1], "words": ["a"],
}  # fmt: skip
ROWS = fake_results.rows(seeds=(0,), items=5, layers=1)
DENSE = [r for r in ROWS if r["name"] == "dense" and r["task"] in ("wikitext2", "boolq", "cost")]
CHOSEN = [
    ("dense", "wikitext2"), ("dense", "boolq"), ("dense", "cost"), ("probe", "wikitext2"), ("probe", "boolq"),
    ("probe", "cost"), ("llm-pruner+lora", "wikitext2"), ("ppsp", "boolq"),
]  # fmt: skip
"""Name and task of one line of each kind; the last is a failure."""
KINDS = [next(r for r in reversed(ROWS) if (r["name"], r["task"]) == chosen) for chosen in CHOSEN]


def fields(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The places of all fields: keys of records at any depth, and the first item of lists."""
    items = (
        value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    )
    for key, inner in items:
        yield (*path, key)
        yield from fields(inner, (*path, key))


def changed(row: dict, path: tuple, value: object) -> dict:
    """A copy of the row with that field changed, or without it."""
    copy = json.loads(json.dumps(row))
    at = copy
    for key in path[:-1]:
        at = at[key]
    if value is MISSING:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return copy


def shown(rows: list[dict], tmp_path) -> None:
    """Everything that is made of lines, but for matplotlib's figures."""
    report.write_html(rows, tmp_path / "page.html", "t")
    report.markdown(rows, "t").encode()
    report.table(rows, "t")
    json.dumps([record for summary in report.summarise(rows) for record in summary.records()])


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES.keys())
def test_every_changed_field_is_named_or_shown(value, tmp_path, monkeypatch):
    monkeypatch.setattr(comparing, "MOST", 4)  # bootstraps would take most of the time
    good = [{**row, "model": "good", "key": f"good {i}"} for i, row in enumerate([*DENSE, *KINDS[3:]])]
    lines = list(good)
    for number, row in enumerate(KINDS):
        lines += [{**line, "model": f"{number}", "key": f"dense {number} {line['task']}"} for line in DENSE]
        for path in fields(row):
            # In a study and under a name of its own, so that no other line takes its place.
            own = {"model": f"{number}", "name": f"{row['name']} {path}", "key": f"{number} {path}"}
            lines.append(changed({**row, **own}, path, value))
    (tmp_path / RESULTS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    kept, problems = report.read_results(tmp_path)
    assert kept[: len(good)] == good and len(lines) > 400
    assert len(lines) - 10 <= len(problems) + len(kept) <= len(lines)  # those without a name of their own
    assert all(p.startswith(f"{tmp_path / RESULTS}, line ") for p in problems)
    shown(kept, tmp_path)
    results = Results.open(tmp_path)
    assert len(results.problems) >= len(problems) and all("line " in p for p in results.problems)
    assert {row["key"] for row in good} <= results.rows.keys()


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("ratio",), MISSING, "'ratio' is missing"),
        (("name",), MISSING, "'name' is missing"),
        (("value",), MISSING, "'value' is missing"),
        (("value",), "3", "'value' is not a finite number"),
        (("value",), 0, "'value' is not above 0"),
        (("ratio",), 20, "'ratio' must be less than or equal to 1"),
        (("name",), "x" * 2000, "'name' must have at most 1000 characters"),
        (("method",), {"when": {}}, "'method' has no 'when'"),
        (("units", 0, "kept"), MISSING, "'units.0.kept' is missing"),
        (("units", 0, "of"), 2.5, "'units.0.of' is not a whole number"),
        (("losses", 0), None, "'losses.0' is not a finite number"),
        (("standard_error",), -1, "'standard_error' is not a number from 0"),
        (("model",), "a\ud83d", "'model' is not whole characters"),
        (("versions",), [], "'versions' is not a record"),
    ],
)
def test_the_sentence_names_the_field(path, value, says):
    with pytest.raises(ValueError, match=f"^{says}$"):
        check_line(changed(KINDS[3], path, value))


def test_settings_nested_too_deeply_are_named():
    deep: dict = {}
    for _ in range(50):
        deep = {"a": [deep]}
    with pytest.raises(ValueError, match="'method' is nested too deeply"):
        check_line(changed(KINDS[3], ("method", "deep"), deep))


def test_own_lines_with_the_spread_of_one_window_are_lines():
    check_line(changed(KINDS[3], ("standard_error",), math.nan))
    check_line(changed(KINDS[3], ("standard_error",), None))


# -- the file --------------------------------------------------------------------------------------


def a_row(seed: int) -> dict:
    """A line with the key of a cell."""
    return {**fake_results.perplexity_row("probe", 0.2, seed, [1.0, 2.0]), "key": str(seed)}


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_the_last_line_counts_with_or_without_its_end(end, tmp_path):
    file = tmp_path / RESULTS
    file.write_text("\n".join(json.dumps(a_row(seed)) for seed in range(2)) + end)
    assert len(report.read_results(file)[0]) == 2
    results = Results.open(tmp_path)
    assert results.rows.keys() == {"0", "1"} and not results.problems
    results.add(a_row(2))
    again = Results.open(tmp_path)
    assert again.rows.keys() == {"0", "1", "2"} and not again.problems


@pytest.mark.parametrize("content", ["hello", "[1, 2]", '{"a": 1}', '{"a": 1}\n', "[" * 100_000, '"\ud83d"'])
def test_a_file_of_others_is_refused_and_stays_as_it_is(content, tmp_path):
    file = tmp_path / RESULTS
    file.write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(UsageError, match="is not a results file of this version; choose another --out"):
        Results.open(tmp_path)
    assert file.read_bytes() == content.encode("utf-8", "surrogatepass")


def test_a_first_line_cut_short_by_a_kill_is_dropped(tmp_path):
    Results.open(tmp_path).add(a_row(0))
    file = tmp_path / RESULTS
    file.write_bytes(file.read_bytes()[:100])
    results = Results.open(tmp_path)
    assert not results.rows and not results.problems
    results.add(a_row(1))
    assert Results.open(tmp_path).rows.keys() == {"1"}


def test_a_name_with_half_a_character_can_be_stored(tmp_path):
    Results.open(tmp_path).add({**a_row(0), "model": "a\ud83d"})
    assert json.loads((tmp_path / RESULTS).read_bytes())["model"] == "a\ud83d"


def call(*arguments: object) -> int:
    return run(lambda: app([str(a) for a in arguments]))


@pytest.mark.parametrize("where", ["/dev/full", "/dev/zero", "a pipe", "a folder"])
def test_results_that_are_no_regular_file_are_one_sentence(where, tmp_path, capsys):
    import os

    file = tmp_path / RESULTS
    {"a pipe": os.mkfifo, "a folder": os.mkdir}.get(where, lambda f: os.symlink(where, f))(file)
    with pytest.raises(UsageError, match="no regular file"):
        Results.open(tmp_path)
    assert call("report", tmp_path) == 2
    error = capsys.readouterr().err
    assert "no regular file" in error and error.count("\n") == 1


def test_a_page_never_takes_the_place_of_results_or_devices(tmp_path, capsys):
    file = fake_results.write(tmp_path / RESULTS, DENSE)
    (tmp_path / "link.html").symlink_to(file)
    (tmp_path / "hard.html").hardlink_to(file)
    before = file.read_bytes()
    for page in (file, tmp_path / "link.html", tmp_path / "hard.html", tmp_path / "." / RESULTS):
        assert call("report", tmp_path, "--out", page) == 2
        assert "holds the results themselves; choose another --out" in capsys.readouterr().err
    assert call("report", tmp_path, "--out", "/dev/null") == 2
    assert "no regular file" in capsys.readouterr().err
    (tmp_path / "page-figures").write_text("mine")
    assert call("report", tmp_path, "--out", tmp_path / "page.html") == 2
    assert "is a file; choose another directory" in capsys.readouterr().err
    assert file.read_bytes() == before and (tmp_path / "page-figures").read_text() == "mine"


def test_a_page_is_whole_or_the_old_one_even_with_half_characters(tmp_path):
    page = tmp_path / "page.html"
    report.write_html(DENSE, page, "old")
    before = page.read_text()
    with pytest.raises(UsageError):
        report.write_html([], page, "new")
    assert page.read_text() == before
    report.write_html(DENSE, page, "a\ud83d\x1b", problems=["b\udc00"])
    assert "<h1>a\\ud83d\\x1b</h1>" in page.read_text() and "b\\udc00" in page.read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


def test_dense_alone_is_a_page_with_its_tasks(tmp_path):
    file = fake_results.write(tmp_path / RESULTS, fake_results.lines(name="dense"))
    assert call("report", file) == 0
    assert "boolq" in (tmp_path / "report.html").read_text()


# -- many lines ------------------------------------------------------------------------------------


def many(count: int) -> list[dict]:
    """Lines of ever more methods."""
    draw, made = random.Random(0), [fake_results.perplexity_row("dense", 0.0, 0, [3.0, 3.2, 3.1])]
    for number in range(count):
        losses = [draw.gauss(3.5, 0.1) for _ in range(3)]
        made.append(fake_results.perplexity_row("probe", 0.4, 0, losses) | {"name": f"probe {number}"})
    return made


def test_the_time_of_a_page_grows_with_its_lines(tmp_path):
    def seconds(count: int) -> float:
        rows, started = many(count), time.process_time()
        report.write_html(rows, tmp_path / "page.html", "t")
        return time.process_time() - started

    seconds(10)
    few, more = seconds(100), seconds(400)
    assert more < 4 * few * 2.5, f"{few:.2f} s for 100 lines, {more:.2f} s for 400"
    assert f"Only the {MOST} best entries of each ratio are compared." in (tmp_path / "page.html").read_text()
    report.write_html(many(MOST), tmp_path / "few.html", "t")
    assert "best entries of each ratio" not in (tmp_path / "few.html").read_text()
