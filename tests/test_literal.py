"""Text of others is shown as it is: on the terminal, in model cards and in Markdown tables."""

import io
import json
import logging
import sys

import fake_results
import pytest
import tiny
import yaml
from markdown_it import MarkdownIt
from rich.console import Console

from probeprune import prune, report
from probeprune.cli import app, run, saved, terminal
from probeprune.cli.generate import _print_texts
from probeprune.errors import UsageError
from probeprune.foreign.literal import markdown, python_string, visible
from probeprune.jobs.cards import pruning_card, training_card
from probeprune.jobs.generate import Generated

NASTY = {
    "closing tag": "a[/red]b",
    "opening tag": "a[bold]b",
    "chat template": "[INST] hello [/INST]",
    "extra": "pip install 'probeprune[ray]'",
    "link": "[link=http://evil]x[/link]",
    "emoji name": "a:smile:b",
    "colour": "a\x1b[31mb",
    "title": "\x1b]0;owned\x07b",
    "C1": "a\x9b31mb\x85c\x90",
    "delete": "a\x7fb\x08c",
    "return": "safe\rowned",
    "null": "a\x00b",
    "direction": "a\u202egpj.exe\u2066b\u200fc",
    "separators": "a\u2028b\u2029c",
    "half a character": "a\ud83db",
    "backslash": "a\\[bold]b",
    "letters": "é 日本 \U0001f600 ±",
}
each = pytest.mark.parametrize("nasty", NASTY.values(), ids=NASTY.keys())


def obeyed(printed: str) -> list[str]:
    """Characters of it that a terminal would obey, but for line feeds, or that no UTF-8 can hold."""
    return [
        c
        for c in printed
        if (ord(c) < 32 and c != "\n") or 127 <= ord(c) < 160 or c in "\u202e\u2066\u200f\u2028\u2029"
        or 0xD800 <= ord(c) < 0xE000
    ]  # fmt: skip


@each
@pytest.mark.parametrize(
    "show",
    [
        terminal.print_line,
        lambda text: terminal.print_line(text, "green", mark="done"),
        terminal.print_error,
        terminal.print_text,
        lambda text: terminal.warn([text]),
        lambda text: terminal.print_written([text]),
        lambda text: saved.print_saved({"evaluation": None}, text, "ok", (), False),
        lambda text: saved.print_saved(
            {"evaluation": {"corpus": text, "perplexity": {"dense": 3.0}}}, "out", "ok", ("dense",), False
        ),
        lambda text: terminal.out().print(text, soft_wrap=True),
        lambda text: _print_texts(["1", text], Generated([text, "2"], 1, 1, 1.0, 1.0)),
        lambda text: run(lambda: refuse(text)),
    ],
    ids=lambda show: getattr(show, "__name__", ""),
)
def test_everything_is_printed_literally(show, nasty, capsys):
    show(nasty)
    both = capsys.readouterr()
    printed = both.out + both.err
    assert visible(nasty) in printed and obeyed(printed) == []


def refuse(text: str) -> None:
    """What a command does with a name it does not know."""
    raise UsageError(f"there is no '{text}'; give another.")


def test_a_line_is_one_line_and_a_text_keeps_its_lines(capsys):
    terminal.print_line("one\nsaved: two")
    terminal.print_text("one\n\ttwo\n")
    both = capsys.readouterr()
    assert both.err == "one\\nsaved: two\n" and both.out == "one\n\ttwo\n\n"


@each
def test_tables_hold_names_literally(nasty, capsys):
    rows = [
        {**row, "model": nasty, "name": row["name"] + nasty, "task": row["task"] + nasty}
        for row in fake_results.rows(seeds=(0,), items=5, layers=1)
        if row["task"] == "wikitext2"
    ]
    terminal.print_rows(rows, nasty, as_json=False)
    printed = capsys.readouterr().out
    assert obeyed(printed) == [] and printed.startswith(visible(nasty).split()[0])
    assert f"probe{visible(nasty)}".split()[0] in printed
    other = Console(width=500, force_terminal=False, color_system=None)  # a reader's own, with markup
    with other.capture() as captured:
        other.print(report.table(rows, nasty))
    assert f"probe{visible(nasty)}" in captured.get() and obeyed(captured.get()) == []


@each
def test_a_bar_shows_its_work_literally(nasty, monkeypatch, capsys):
    monkeypatch.setattr(terminal, "err", type(terminal.err)(stderr=True, force_terminal=True, width=90))
    with terminal.progress_bar() as show:
        show(nasty, 1, 2)
    assert visible(nasty) in capsys.readouterr().err


@each
def test_warnings_of_the_package_are_printed_literally(nasty, capsys, monkeypatch):
    logger, handler = logging.getLogger("probeprune"), terminal.Warnings(logging.WARNING)
    monkeypatch.setattr(logger, "propagate", False)  # pytest's workers cannot send half a character
    logger.addHandler(handler)
    try:
        logging.getLogger("probeprune.data").warning("only the first rows of '%s' were read.", nasty)
    finally:
        logger.removeHandler(handler)
    assert f"'{visible(nasty)}'" in capsys.readouterr().err


def test_a_path_is_printed_whole_even_where_letters_are_missing(tmp_path, monkeypatch):
    logger = logging.getLogger("probeprune")
    monkeypatch.setattr(logger, "handlers", [])
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    terminal.prepare_terminal()
    folder = tmp_path / "a[bold]b[/red]\x1b[31m日本"
    fake_results.write(folder / "results.jsonl", fake_results.lines(name="dense", task="wikitext2"))
    assert run(lambda: app(["report", str(folder)])) == 0
    sys.stderr.seek(0)
    shown = visible(str(folder)).encode("ascii", "backslashreplace").decode()
    assert f"written: {shown}/report.html" in sys.stderr.read()


def test_the_json_of_a_report_holds_the_very_names(tmp_path, capsys):
    names = [name for name in NASTY.values() if name != NASTY["half a character"]]
    (row,) = fake_results.lines(name="dense", task="wikitext2")
    rows = [{**row, "model": name, "key": name} for name in names]
    file = fake_results.write(tmp_path / "results.jsonl", rows)
    assert run(lambda: app(["report", str(file), "--json"])) == 0
    assert [json.loads(line)["model"] for line in capsys.readouterr().out.splitlines()] == names


# -- Markdown --------------------------------------------------------------------------------------

EVIL = {
    **NASTY,
    "HTML": "<script>alert(1)</script><img src=x onerror=y>",
    "a cell": "a | b || c",
    "lines": "a\n\n# b\n\n| c |\n---\nlicense: mit",
    "emphasis": "*a* _b_ **c** __d__ ~~e~~ `f`",
    "address": "[x](http://evil) ![y](z) <http://evil> http://evil www.evil.com",
    "rule": "---",
    "list": "- a",
    "number": "1. a",
    "a higher number": "12) a",
    "heading": "a #",
    "entity": "&lt;b&gt; $x$",
    "quotes": 'x") ; import os  # ',
    "YAML": "a: {b: [c",
    "null of YAML": "null",
    "blanks": "    a",
}
evil_names = pytest.mark.parametrize("evil", EVIL.values(), ids=EVIL.keys())
PARSER = MarkdownIt("gfm-like", {"linkify": False})


def read(text: str) -> tuple[list[str], set[str]]:
    """The plain words of each block of Markdown, and the kinds of everything in it."""
    tokens = PARSER.parse(text)
    inner = [child for token in tokens for child in token.children or []]
    words = [
        "".join(c.content for c in token.children or [] if c.type in ("text", "text_special", "code_inline"))
        for token in tokens
        if token.type == "inline"
    ]
    return words, {token.type for token in [*tokens, *inner]}


@evil_names
def test_markdown_reads_as_the_text_does(evil):
    words, kinds = read(markdown(evil))
    assert words == [visible(evil.strip())]
    assert kinds <= {"paragraph_open", "inline", "paragraph_close", "text", "text_special"}
    assert read(f"| a |\n| --- |\n| {markdown(evil)} |")[0] == ["a", visible(evil.strip())]
    assert read(f"# {markdown(evil)}")[0] == [visible(evil.strip())]


def test_markdown_leaves_plain_names_alone():
    for name in ("smollm2-135m", "arc_easy", "2.13.0", "probe (when.probe.tokens=0.5)", "30.0% of a, b: c"):
        assert markdown(name) == name


@evil_names
def test_a_python_string_is_that_string_and_one_line(evil):
    assert eval(python_string(evil)) == evil and len(python_string(evil).splitlines()) == 1
    assert obeyed(python_string(evil)) == []


def training_record(name: str) -> dict:
    """As in training.json."""
    return {
        "base_model": name, "corpus": name, "packing": False, "steps": 3, "best_step": 2, "tokens": 100,
        "training": {
            "lora": None, "weights": "all", "length": 8, "batch_size": 2, "learning_rate": 1e-3, "seed": 0,
            "distillation": {"direction": "forward", "temperature": 1.0, "top_k": None},
        },
        "teacher": name,
        "pruning": {"removed_share": 0.2, "method": {"name": name}}, "held_out_loss": [2.0, 1.0],
        "processes": 1, "dtype": name, "device": "cpu", "seconds": 1.0, "peak_memory": 1,
        "versions": {name: name},
        "evaluation": {
            "corpus": name, "windows": 1, "length": 8, "perplexity": {"before": 2.0, "after": 1.0},
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def pruned():
    """A pruned model, to write cards about."""
    return prune(tiny.FAMILIES["llama"](), "magnitude", 0.3)


def cards(pruned, name: str) -> list[str]:
    """Cards about models of that name, from data of that name."""
    record = {
        "base_model": name, "layout": "uniform", "seed": 0, "seconds": 1.0, "peak_memory": 1, "device": "cpu",
        "calibration": {"corpus": name}, "evaluation": None, "dtype": name, "versions": {"torch": name},
    }  # fmt: skip
    measured = {"corpus": name, "windows": 1, "length": 8, "perplexity": {"dense": 2.0, "pruned": 3.0}}
    return [
        pruning_card(pruned, record, name),
        pruning_card(pruned, {**record, "evaluation": measured, "layout": "per-layer"}, name),
        training_card(training_record(name), name, "adapter"),
        training_card({**training_record(name), "removed_share": 0.2, "method": name}, name, "checkpoint"),
    ]


@evil_names
def test_a_card_has_the_same_parts_whatever_the_names(pruned, evil):
    for card, plain in zip(cards(pruned, evil), cards(pruned, "name"), strict=True):
        card.encode("utf-8")
        assert obeyed(card) == []
        fronts, bodies = [], []
        for text in (card, plain):
            _, front, body = text.split("---\n", 2)
            fronts.append(yaml.safe_load(front))
            bodies.append(body)
        assert fronts[0] == fronts[1]
        parts = [[token.type for token in PARSER.parse(body)] for body in bodies]
        assert parts[0] == parts[1] and "table_open" in parts[0]
        words, kinds = read(bodies[0])
        assert not kinds & {"html_inline", "html_block", "link_open", "image", "hr"}
        assert any(visible(evil.strip()) in cell for cell in words)


@pytest.mark.parametrize(
    ("name", "base"),
    [("owner/model", "owner/model"), ("owner/1.0", "owner/1.0"), ("model", None), ("a/b: {", None),
     ("~nobody/x", None), ("a/b\n---\nx", None), ("../x", None), ("x" * 5000 + "/y", None)],
)  # fmt: skip
def test_only_a_name_of_the_hub_is_the_base_model(pruned, name, base):
    front = cards(pruned, name)[0].split("---\n", 2)[1]
    assert yaml.safe_load(front).get("base_model") == base


@evil_names
def test_the_markdown_table_has_a_row_an_entry(evil):
    rows = [
        {**row, "name": row["name"] + evil, **({"error": evil} if "error" in row else {})}
        for row in fake_results.rows(seeds=(0,), items=5, layers=1)
        if row["task"] in ("wikitext2", "boolq")
    ]
    made = report.markdown(rows, evil)
    made.encode("utf-8")
    kinds = [token.type for token in PARSER.parse(made)]
    (summary,) = report.summarise(rows)
    assert kinds.count("table_open") == 1 and kinds.count("tr_open") == 1 + len(summary.entries)
    assert "heading_open" not in kinds and "html_block" not in kinds
    assert f"probe{visible(evil)}".strip() in [w.strip() for w in read(made)[0]]
