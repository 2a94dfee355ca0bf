"""Every command tries where its results go before it works, and leaves the place to whoever holds it."""

import errno
import json
import os
import signal

import fake_results
import pytest

from probeprune.cli import app, run
from probeprune.errors import UsageError
from probeprune.experiment.results import Results
from probeprune.files import write_json
from probeprune.jobs.train import check_output, recover_to
from probeprune.places import claimed

COMMANDS = {
    "prune": ["prune", "no-model", "--method", "magnitude", "--ratio", "0.2"],
    "recover": ["recover", "no-model"],
    "loraprune": ["loraprune", "no-model", "--ratio", "0.2"],
    "compare": ["compare", "no-model"],
    "table": ["table", "--preset", "laptop"],
    "bench": ["bench", "no-model"],
}
"""No model is there: a command that is refused for its place has not looked for one."""


def refusal(capsys, *arguments) -> str:
    """What a command says that ends with code 2, which is one sentence."""
    assert run(lambda: app([str(a) for a in arguments])) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Traceback" not in said
    return said


@pytest.mark.parametrize("command", COMMANDS)
def test_a_place_below_a_file_is_refused_at_the_start(command, tmp_path, capsys):
    (tmp_path / "file").touch()
    said = refusal(capsys, *COMMANDS[command], "--out", tmp_path / "file/out")
    assert "cannot be written: not a directory" in said
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", ["x" * 256, "half\udcff"])
def test_a_name_that_no_file_can_have_is_refused_at_the_start(command, name, tmp_path, capsys):
    said = refusal(capsys, *COMMANDS[command], "--out", os.path.join(tmp_path, name))
    assert "file name too long" in said or "is no path that can be written" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", COMMANDS)
def test_a_place_that_another_process_holds_is_refused_at_the_start(command, tmp_path, capsys):
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            with claimed(tmp_path / "out"):
                os.write(tell, b"in")
                signal.pause()
        finally:
            os._exit(1)
    try:
        assert os.read(ready, 2) == b"in"
        said = refusal(capsys, *COMMANDS[command], "--out", tmp_path / "out")
        assert f"is in use by process {pid} on" in said
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_an_unwritable_place_of_a_report_is_refused(tmp_path, capsys):
    results = fake_results.write(tmp_path / "run/results.jsonl", fake_results.lines()[:2])
    (tmp_path / "page-figures").touch()
    said = refusal(capsys, "report", results, "--out", tmp_path / "page.html")
    assert "page-figures" in said and "file" in said and not (tmp_path / "page.html").exists()


# -- training --------------------------------------------------------------------------------------


@pytest.mark.parametrize("same", [True, False])
def test_checkpoints_of_a_result_that_is_written_are_deleted(same, tmp_path):
    out, work = tmp_path / "out", tmp_path / "out.training"
    write_json(out / "training.json", {"seconds": 1.5})
    write_json(work / "training.json", {"seconds": 1.5 if same else 2.5})
    write_json(work / "run.json", {})
    with pytest.raises(UsageError, match="exists and is not empty"):
        check_output(out)
    assert work.exists() != same, "those of another run stay"


@pytest.mark.parametrize(
    "pruning", [{"x": 1}, {}, [], "text", 3, {"removed_share": "a", "method": {}}, {"removed_share": 0.2}]
)
def test_what_is_no_record_of_a_pruning_is_refused_before_the_training(pruning, tmp_path):
    with pytest.raises(UsageError, match=r"pruning\.json does not say by which method"):
        recover_to(None, tmp_path / "out", None, pruning=pruning)
    assert list(tmp_path.iterdir()) == []


# -- result lines ----------------------------------------------------------------------------------

ROWS = [row | {"key": str(n)} for n, row in enumerate(fake_results.lines()[:3])]


def lines(rows) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def test_a_last_line_without_a_newline_is_kept(tmp_path):
    (tmp_path / "results.jsonl").write_bytes(lines(ROWS)[:-1])
    results = Results.open(tmp_path)
    assert len(results.rows) == 3 and not results.problems
    results.add(ROWS[0] | {"key": "3"})
    assert len(Results.open(tmp_path).rows) == 4


@pytest.mark.parametrize("content", [b"hello", b'{"a": 1}', b"hello\nworld", b"[1, 2]\n", b"{}"])
def test_a_foreign_file_is_refused_and_left_as_it_is(content, tmp_path):
    (tmp_path / "results.jsonl").write_bytes(content)
    with pytest.raises(UsageError, match="is not a results file"):
        Results.open(tmp_path)
    assert (tmp_path / "results.jsonl").read_bytes() == content


@pytest.mark.parametrize("whole", [0, 2])
def test_a_line_cut_anywhere_is_dropped(whole, tmp_path):
    file, last = tmp_path / "results.jsonl", lines(ROWS[2:])
    for length in range(len(last) - 1):
        file.write_bytes(lines(ROWS[:whole]) + last[:length])
        results = Results.open(tmp_path)
        assert len(results.rows) == whole and not results.problems
        assert file.read_bytes() == lines(ROWS[:whole])


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    results = Results.open(tmp_path)
    results.add(ROWS[0])

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        results.add(ROWS[1])
    monkeypatch.undo()
    assert results.path.read_bytes() == lines(ROWS[:1]) and "1" not in results.rows
    results.add(ROWS[2])
    assert len(Results.open(tmp_path).rows) == 2
