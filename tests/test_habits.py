"""What is the same for all commands: version, completion, config files, how much is said, cache, doctor."""

import json
import subprocess
import sys

import pytest
import typer
from test_cli import COMMANDS, call

import probeprune
from probeprune.cli import app
from probeprune.cli.terminal import set_talk
from probeprune.foreign.extras import EXTRAS


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    yield
    set_talk(quiet=False, verbose=False)


def test_version(capsys):
    assert call("--version") == 0
    assert capsys.readouterr().out == f"probeprune {probeprune.__version__}\n"


def test_the_version_is_that_of_the_project():
    from test_extras import ROOT

    assert f'version = "{probeprune.__version__}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("typed", "expected", "absent"),
    [
        ("probeprune comp", {"compare", "completion"}, {"prune"}),
        ("probeprune --ver", {"--verbose", "--version"}, set()),
        ("probeprune --quiet prune --rat", {"--ratio"}, {"--ratios"}),
        ("probeprune compare --methods best-", {"best-static", "best-dynamic"}, {"probe"}),
        ("probeprune prune pruned/", set(), {"compare"}),
    ],
)
def test_completion_in_bash(typed, expected, absent, capsys):
    assert call("completion", "bash") == 0
    script = capsys.readouterr().out
    words = typed.split()
    asked = f"COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}; _probeprune; echo ${{COMPREPLY[*]}}"
    done = subprocess.run(
        ["bash", "-c", f"{script}\n{asked}"], capture_output=True, text=True, check=True, timeout=60
    )
    assert not done.stderr
    found = set(done.stdout.split())
    assert expected <= found
    assert not absent & found


def test_completion_in_other_shells(capsys):
    assert call("completion", "zsh") == 0
    assert capsys.readouterr().out.startswith("#compdef probeprune\n")
    assert call("completion", "fish") == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("__fish_seen_subcommand_from prune' -l ratio " in line for line in lines)
    assert any("-l method -x -a" in line and "best-static" in line for line in lines)
    assert all(line.count("'") % 2 == 0 for line in (text.replace("\\'", "") for text in lines))
    assert call("completion", "fihs") == 2
    assert "unknown shell 'fihs'; did you mean 'fish'?" in capsys.readouterr().err


def test_a_config_gives_options_that_are_not_typed(tmp_path, capsys):
    (tmp_path / "probeprune.toml").write_text('ratio = 0.3\n\n[plan]\nmethod = "prob"\n')
    assert call("plan") == 2
    assert "unknown method 'prob'; did you mean 'probe'?" in capsys.readouterr().err
    (tmp_path / "own.toml").write_text("[compare]\nratios = [0.2, 7]\n")
    assert call("--config", "own.toml", "compare") == 2
    assert "--ratios must be a number in [0, 1), not 7.0;" in capsys.readouterr().err
    assert call("--config", "own.toml", "compare", "--ratios", "8") == 2
    assert "not 8.0;" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (
            "[compare]\n\nration = 0.2\n",
            "line 3: unknown option of compare 'ration'; did you mean 'ratio",
        ),
        ("dtyp = 'float32'\n", "own.toml, line 1: unknown option 'dtyp'; did you mean 'dtype'?"),
        ("[compar]\nratios = 0.2\n", "own.toml, line 1: unknown command 'compar'; did you mean 'compare'?"),
        ("[plan]\nratio = \n", "own.toml is no TOML file"),
        ("\n[plan]\nratio = 2\n", "own.toml, line 3: --ratio must be a number in [0, 1), not 2"),
        ("\n[plan]\nratio = 'much'\n", "own.toml, line 3: "),
        ("[eval]\njson = true\n", "own.toml, line 2: json takes a value, not true or false"),
        ("ratio = true\n", "own.toml, line 1: ratio takes a value, not true or false"),
        ("ratio = 1979-05-27\n", "own.toml, line 1: ratio must be text, a number, true or false, or a list"),
    ],
)
def test_a_mistake_in_a_config_is_one_sentence_with_its_line(content, says, tmp_path, capsys):
    (tmp_path / "own.toml").write_text(content)
    assert call("--config", "own.toml", "plan", "--method", "wanda-sp") == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert call("--config", "none.toml", "methods") == 2


def test_a_switch_of_most_commands_is_no_value_of_another(tmp_path, capsys):
    (tmp_path / "probeprune.toml").write_text("json = true\n")
    assert call("--verbose", "eval", "--method", "probe") == 2
    assert "json" not in capsys.readouterr().err


def test_verbose_says_where_values_come_from_and_quiet_says_nothing(tmp_path, capsys):
    from probeprune.cli.terminal import prepare_terminal

    prepare_terminal()
    (tmp_path / "probeprune.toml").write_text("json = true\n")
    assert call("--verbose", "engines") == 0
    said = capsys.readouterr()
    assert "probeprune.toml, line 1: --json True" in said.err
    assert json.loads(said.out.splitlines()[0])
    assert call("--quiet", "--verbose", "engines") == 2
    assert "opposites" in capsys.readouterr().err


def test_a_hit_in_the_cache_is_logged(tmp_path, caplog):
    from probeprune.calibration import stored

    stored.store(tmp_path / "one.safetensors", stored.TENSORS, {})
    with caplog.at_level("INFO", "probeprune"):
        assert stored.read(tmp_path / "one.safetensors", stored.TENSORS) == {}
    assert "computed before" in caplog.text and "one.safetensors" in caplog.text


def test_the_cache_is_listed_and_emptied(tmp_path, monkeypatch, capsys):
    place = tmp_path / "cache"
    monkeypatch.setenv("PROBEPRUNE_CACHE", str(place))
    (place / "models" / "m").mkdir(parents=True)
    (place / "models" / "m" / "w").write_bytes(bytes(1500))
    (place / "statistics").mkdir()
    (place / "statistics" / "s.safetensors").write_bytes(bytes(10))
    (place / "mine.txt").write_text("not ours")
    assert call("cache", "list", "--json") == 0
    listed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(entry["name"], entry["bytes"]) for entry in listed] == [("m", 1500), ("s.safetensors", 10)]
    assert call("cache") == 0
    assert "1.5 kB" in capsys.readouterr().out
    assert call("cache", "clear") == 2
    assert "would delete 2 entries, 1.5 kB" in capsys.readouterr().err
    assert call("cache", "clear", "--kind", "statistics", "--yes") == 0
    assert (place / "models" / "m").exists() and not (place / "statistics" / "s.safetensors").exists()
    assert call("cache", "clear", "--yes") == 0
    assert (place / "mine.txt").exists() and not (place / "models" / "m").exists()
    assert call("cache", "clera") == 2
    assert "did you mean 'clear'" in capsys.readouterr().err


def test_the_doctor_says_what_is_there_and_what_is_missing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert call("doctor", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["missing"]["train"] == ["peft"] and set(found["missing"]) == set(EXTRAS)
    assert all(speed > 0 for speed in found["gflops"].values())
    assert call("doctor") == 0
    assert 'no peft: pip install "probeprune[train]"' in capsys.readouterr().out


def test_an_unknown_command_names_the_nearest(capsys):
    assert call("compar") == 2
    assert "did you mean 'compare'" in capsys.readouterr().err.lower()
    assert typer.main.get_command(app).commands.keys() == COMMANDS.keys()
