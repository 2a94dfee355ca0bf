"""The command line: help that helps, bad input in one sentence with exit code 2 and nothing written."""

import errno
import importlib.abc
import json
import re
import signal
import subprocess
import sys
import time

import forked
import pytest
import typer
from forked import Forked
from tiny import write_model_and_text

import probeprune_command
from probeprune import cli
from probeprune.cli import app, run, values
from probeprune.cli.facts import missed_in
from probeprune.cli.terminal import lines_of_progress
from probeprune.errors import UsageError
from probeprune.methods import METHODS


def call(*arguments: str) -> int:
    return run(lambda: app(list(arguments)))


COMMANDS = typer.main.get_command(app).commands


def test_all_commands_are_there():
    assert set(COMMANDS) == {
        *(
            "compare",
            "table",
            "report",
            "plan",
            "prune",
            "export",
            "recover",
            "loraprune",
            "generate",
            "bench",
        ),
        *("methods", "models", "engines", "quantised", "cache", "completion", "doctor", "eval", "push"),
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_every_option_and_an_example(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    assert call(command, "--help") == 0
    shown = capsys.readouterr().out
    assert f"Example: probeprune {command}" in shown
    for parameter in COMMANDS[command].params:
        assert all(name in shown for name in parameter.opts), parameter.name
        assert parameter.help.rstrip(")] ").rstrip(".") in " ".join(shown.split()), parameter.name


def test_help_has_whole_paragraphs_and_no_type_behind_a_switch(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    assert call("prune", "--help") == 0
    shown = capsys.readouterr().out
    assert "ends in .gguf makes a file for llama.cpp" in shown and "<bool>" not in shown
    assert re.search(r"--json +Print JSON lines", shown)
    assert re.search(r"--steps +<int>.*From 1 to 1000\.", shown)
    assert re.search(r"--batch-size +<int> +Windows per forward pass\. At least 1\.", shown)
    assert call("--help") == 0
    assert "<bool>" not in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_sentence_of_help(command):
    for parameter in COMMANDS[command].params:
        assert parameter.help.endswith("."), parameter.name
        assert parameter.help[0].isupper(), parameter.name


def test_no_arguments_show_all_commands(capsys):
    call()
    shown = capsys.readouterr().out
    assert all(command in shown for command in COMMANDS)


def test_methods_and_models_are_listed(capsys):
    assert call("methods", "--json") == 0
    listed = [json.loads(line)["name"] for line in capsys.readouterr().out.splitlines()]
    assert listed == list(METHODS)
    assert call("models") == 0
    assert "gemma3_text" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["compare", "--methods", "prob"], "did you mean 'probe'"),
        (["compare", "--methods", ","], "--methods ',' has an empty entry"),
        (["compare", "--methods", "dense,"], "--methods 'dense,' has an empty entry"),
        (["compare", "--methods", "dense,,flap"], "--methods 'dense,,flap' has an empty entry"),
        (["compare", "--methods", "dense,flap,dense"], "has an entry twice; give each one once."),
        (["compare", "--ratios", "0.2,0.20"], "--ratios '0.2,0.20' has an entry twice"),
        (["compare", "--ratios", "1.0"], "--ratios must be a number in [0, 1), not 1.0; 0.4 prunes 40 %"),
        (["compare", "--ratios", "-0.1"], "--ratios must be a number in [0, 1), not -0.1;"),
        (["compare", "--ratios", "many"], "--ratios must be a number in [0, 1), not 'many';"),
        (["compare", "--units", "grup"], "did you mean 'group'"),
        (
            ["compare", "--batch-size", "0"],
            "--batch-size must be a whole number of sequences from 1 to 1000000, not 0.",
        ),
        (
            ["compare", "--windows", "-1"],
            "--windows must be a whole number of windows from 0 to 1000000, not -1.",
        ),
        (
            ["compare", "--length", "1"],
            "--length must be a whole number of tokens from 2 to 16777216, not 1.",
        ),
        (
            ["compare", "--calibration-windows", "0"],
            "--calibration-windows must be a whole number of windows from 1 to 1000000, not 0.",
        ),
        (["compare", "--sampling", "publish"], "did you mean 'published'"),
        (
            ["compare", "--train-steps", "0"],
            "--train-steps must be a whole number of steps from 1 to 10000000, not 0.",
        ),
        (["compare", "no/such/model"], "no/such/model"),
        (["compare", "--dtype", "int3"], "int3"),
        (["bench", "--methods", "prob"], "did you mean 'probe'"),
        (["compare", "--seed", "abc"], "--seed must be a whole number from 0 to 4294967295, not 'abc'."),
        (["recover", "--alpha", "1.5"], "--alpha must be a whole number from 1 to 1000000, not '1.5'."),
        (["recover", "--learning-rate", "fast"], "--learning-rate must be a number in (0, 1], not 'fast'."),
        (["bench", "--rouns", "3"], "no such option: --rouns"),
        (["compare", "--seed=0x10"], "--seed must be a whole number from 0 to 4294967295, not '0x10'."),
        (["compare", "one", "two"], "got unexpected extra argument"),
        (["prune"], "missing option '--method'; `probeprune prune --help` shows what there is."),
        (["compar"], "no such command 'compar'. Did you mean 'compare'? `probeprune --help` shows"),
        (["[red]x[/red]"], "no such command '[red]x[/red]'"),
        (["--verbos"], "no such option: --verbos (Possible options: --verbose, --version); `probeprune"),
    ],
)
def test_bad_input_is_one_sentence(arguments, says, tmp_path, capsys):
    out = tmp_path / "out"
    assert call(*arguments, "--out", str(out)) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and "Traceback" not in error
    assert not out.exists()


@pytest.mark.real
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--ratios", "0.95"], "would remove everything"),
        (["--skip-layers", "30"], "leaves none of the model's 30 layers"),
        (["--length", "9000", "--windows", "1"], "longer than the model's 8192 positions"),
        (["--calibration", "short.txt", "--length", "64"], "than 64 tokens"),
        (["--calibration", "empty.txt"], "empty"),
        (["--calibration", "c5"], "c5"),
        (["--sampling", "odd"], "odd"),
    ],
)
def test_bad_input_found_on_the_model_is_one_sentence(
    arguments, says, tmp_path, capsys, monkeypatch, smollm2
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "empty.txt").write_text("")
    small = ["--methods", "dense,wanda-sp", "--ratios", "0.3", "--windows", "1", "--calibration-windows", "1"]
    assert call("compare", *small, "--dtype", "float32", *arguments) == 2
    error = capsys.readouterr().err
    assert says in error and "Traceback" not in error
    assert not re.search("^done", error, re.MULTILINE), "it should fail before anything is measured"


def test_interrupt_and_full_disk_end_in_a_sentence(capsys):
    def interrupted() -> None:
        raise KeyboardInterrupt

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "results.jsonl")

    assert run(interrupted) == 130
    assert "the same command continues" in capsys.readouterr().err
    assert run(full) == 2
    assert "No space left on device: results.jsonl" in capsys.readouterr().err

    def bug() -> None:
        raise RuntimeError("ours")

    with pytest.raises(RuntimeError):  # our own mistakes keep their traceback
        run(bug)


def test_ctrl_c_says_how_to_go_on(tmp_path, number_tokenizer):
    text = str(write_model_and_text(tmp_path, number_tokenizer))
    ratios = ",".join(str(share / 100) for share in range(5, 60))  # more cells than are measured by then
    command = [sys.executable, "-m", "probeprune", "compare", str(tmp_path / "model"), "--out", str(tmp_path)]
    command += ["--methods", "dense,magnitude,random", "--ratios", ratios, "--skip-layers", "1"]
    command += ["--corpus", text, "--length", "16", "--dtype", "float32", "--speed-rounds", "0"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # In the background a shell has tests ignore SIGINT, and their children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "results.jsonl").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command continues" in error and "Traceback" not in error


def slow() -> None:
    """A command that takes its time, also to clean up."""
    app = typer.Typer()

    @app.command()
    def wait() -> None:
        try:
            print("ready")
            time.sleep(60)
        finally:
            time.sleep(0.5)
            print("cleaned up")

    cli.app = app
    forked.command()


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_command_on_the_way_that_cleans_up(sent, code):
    process = Forked(slow)
    process.until(lambda: process.output == "ready\n")
    process.send(sent)
    if sent == signal.SIGTERM:
        time.sleep(0.2)
        process.send(sent)  # impatient: cleaning up goes on
    ended, shown, error = process.ended(60)
    assert ended == code and shown == "ready\ncleaned up\n"
    assert error.startswith("probeprune: interrupted;") and error.count("\n") == 1


def test_ctrl_c_during_the_imports_is_a_sentence(capsys, monkeypatch):
    class Interrupted(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path, target=None):
            if name == "probeprune.cli":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "probeprune.cli")
    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    with pytest.raises(SystemExit) as end:
        probeprune_command.main()
    assert end.value.code == 130
    assert capsys.readouterr().err == "probeprune: interrupted before anything was done.\n"


def test_an_option_of_all_commands_behind_one_is_told_its_place(capsys):
    assert call("compare", "--config", "x.toml") == 2
    said = capsys.readouterr().err
    assert "--config stands in front of the command, as in `probeprune --config ...`." in said


def test_a_name_that_begins_known_ones_is_answered_with_them(capsys):
    assert call("prune", "--method", "best", "--ratio", "0.2", "--out", "never") == 2
    said = capsys.readouterr().err
    assert "unknown method 'best'; did you mean 'best-dynamic' or 'best-static'? Known: " in said


def test_the_version_is_printed_without_an_import(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["probeprune", "--version"])
    monkeypatch.setitem(sys.modules, "probeprune.cli", None)  # an import of it would fail
    probeprune_command.main()
    assert capsys.readouterr().out.startswith("probeprune ")


def test_without_a_terminal_long_work_prints_a_line_a_minute(capsys):
    now = iter([0.0, 59.0, 61.0, 100.0, 121.0])
    show = lines_of_progress(lambda: next(now))
    for done in range(4):
        show("refit", done, 4)
    assert capsys.readouterr().err == "refit: 1 of 4\nrefit: 3 of 4\n"


def test_codes_of_commands_pass_through():
    def failed() -> None:
        sys.exit(1)

    assert run(failed) == 1 and run(lambda: None) == 0


@pytest.mark.parametrize(
    ("ratio", "removed", "said"),
    [(0.3, 1 / 3, True), (0.3, 1 / 6, True), (0.3, 0.309, False), (0.3, 0.291, False), (0.0, 0.0, False)],
)
def test_a_share_far_from_the_ratio_is_said_once(ratio, removed, said):
    row = {"kind": "result", "name": "flap", "ratio": ratio, "method": {}, "removed_share": removed}
    sentences = missed_in([row, row, {"kind": "failure"}])
    assert len(sentences) == said
    assert not said or sentences == [
        f"flap {ratio:.0%}: asked for {ratio:.1%} of the blocks' parameters, removed {removed:.1%}: widths "
        "come in whole heads and multiples of round_to; another ratio or a smaller round_to may come closer."
    ]
    assert not missed_in([row | {"method": {"budget": "flops"}}]), "another quantity"


def test_it_starts_fast_enough_to_ask_for_help():
    # The command line must not import what a listing does not need, nor the code of the models whose
    # checkpoints it registers: that costs a start no more than reading the families' configs.
    code = "import sys; import probeprune.cli; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = done.stdout.split()
    assert "transformers.models.opt.configuration_opt" in modules
    assert not {"matplotlib", "datasets", "transformers.models.opt.modeling_opt"} & {*modules}


def test_lists_are_separated_by_commas():
    assert values.names(" a, b ", "x") == ["a", "b"]
    assert values.numbers("0.2, .4", "x", "ratio") == [0.2, 0.4]
    assert values.numbers("1,16", "x", "batch_size") == [1, 16]


@pytest.mark.parametrize(
    ("read", "says"),
    [
        (lambda: values.names(" , ", "methods"), "--methods ' , ' has an empty entry"),
        (lambda: values.names("a,b,a", "methods"), "--methods 'a,b,a' has an entry twice"),
        (
            lambda: values.numbers("0.2,many", "ratios", "ratio"),
            "--ratios must be a number in [0, 1), not 'many'",
        ),
        (
            lambda: values.numbers("1,x", "seeds", "seed"),
            "--seeds must be a whole number from 0 to 4294967295",
        ),
        (
            lambda: values.numbers("1.5", "seeds", "seed"),
            "--seeds must be a whole number from 0 to 4294967295",
        ),
        (lambda: values.numbers("7,07", "seeds", "seed"), "--seeds '7,07' has an entry twice"),
        (
            lambda: values.numbers("0", "lengths", "GridPoint.length"),
            "--lengths must be a whole number of tokens",
        ),
        (
            lambda: values.one_of("layout", "evn", ("even", "odd")),
            "did you mean 'even'? Known: even, odd.",
        ),
    ],
)
def test_values_that_cannot_be_read_are_refused(read, says):
    with pytest.raises(UsageError) as refusal:
        read()
    assert says in str(refusal.value)


def test_brackets_in_an_error_are_printed_as_they_are(capsys):
    def refused() -> None:
        raise UsageError("no model '[bold]x[/bold]'; give another.")

    assert run(refused) == 2
    assert "no model '[bold]x[/bold]'; give another." in capsys.readouterr().err
