"""The files of a report: figures for papers, and what `probeprune report` writes and refuses."""

import dataclasses
import json

import fake_results
import pytest
from fake_results import ROWS, entry

from probeprune import report
from probeprune.cli import app, run


def test_figures_for_papers(tmp_path):
    written = report.write_figures(ROWS, tmp_path / "figures")
    wanted = [f"{t}-{w}" for t in fake_results.TEXTS for w in ("flops", "time")] + ["tasks"]
    assert [f.name for f in written] == [f"{w}{e}" for w in wanted for e in (".png", ".svg")]
    for file in written:
        content = file.read_bytes()
        if file.suffix == ".png":
            assert content.startswith(b"\x89PNG")
        else:
            assert all(name.encode() in content for name in fake_results.HURTS)


def call(*arguments: str) -> int:
    return run(lambda: app(list(arguments)))


def test_command_writes_the_page_and_the_figures(tmp_path, capsys):
    file = fake_results.write(tmp_path / "run" / "results.jsonl", ROWS)
    file.write_bytes(file.read_bytes() + b'{"kind": "res')
    assert call("report", str(file.parent)) == 0
    printed = capsys.readouterr()
    assert f"line {len(ROWS) + 1} was left out: not JSON" in printed.err.replace("\n", "")
    assert "full-batch" in printed.out
    assert (tmp_path / "run" / "report.html").exists() and (
        tmp_path / "run" / "report-figures" / "tasks.png"
    ).exists()
    out = tmp_path / "elsewhere" / "page.html"
    assert call("report", str(file), "--out", str(out), "--json") == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert out.exists() and (out.parent / "page-figures" / "wikitext2-flops.svg").exists()
    (summary,) = report.summarise(ROWS)
    assert [r["label"] for r in records] == [e.label for e in summary.entries]
    probe = next(r for r in records if r["label"] == "probe" and r["ratio"] == 0.4)
    found = entry(summary, "probe", 0.4)
    assert probe["perplexity"]["wikitext2"] == dataclasses.asdict(found.quality.perplexity["wikitext2"])
    lost = found.quality.perplexity["wikitext2"].value - summary.dense.quality.perplexity["wikitext2"].value
    assert probe["prr"]["wikitext2"] == pytest.approx(lost / (1 - 1 / found.cost.prefill.value))


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
    file = fake_results.write(tmp_path / "results.jsonl", ROWS[:2])
    for bad, why in (
        (tmp_path, "is no regular file"),
        ("/dev/null", "is no regular file"),
        (file / "page.html", "cannot be written: not a directory"),
        (tmp_path / ("x" * 300), "cannot be written: file name too long"),
    ):
        assert call("report", str(file), "--out", str(bad)) == 2
        error = capsys.readouterr().err
        assert f"{why}; choose another" in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == [file]


def test_help_has_an_example(capsys):
    assert call("report", "--help") == 0
    assert "Example: probeprune report" in capsys.readouterr().out
