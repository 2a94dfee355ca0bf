"""The command line: thin commands over the library, one file each.

Bad input ends with one sentence and exit code 2, never with a traceback. Ctrl-C (exit code 130) and SIGTERM
(143) end a command with a sentence too: what is half written is cleaned up, and all measurements made until
then are kept. The options of a command are groups of options (`options.py`, `groups.py`).
"""

import errno
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

import probeprune
from probeprune import processes
from probeprune.cli.bench import bench
from probeprune.cli.cache import cache
from probeprune.cli.compare import compare
from probeprune.cli.completion import completion
from probeprune.cli.doctor import doctor
from probeprune.cli.evaluate import evaluate
from probeprune.cli.export import export
from probeprune.cli.generate import generate
from probeprune.cli.lists import list_engines, list_methods, list_models
from probeprune.cli.plan import plan
from probeprune.cli.prune import prune
from probeprune.cli.push import push
from probeprune.cli.quantised import quantised
from probeprune.cli.report import report
from probeprune.cli.table import table
from probeprune.cli.terminal import prepare_terminal, print_error, print_text, set_talk
from probeprune.cli.train import loraprune, recover
from probeprune.cli.typed import Commands
from probeprune.cli.usage import Command
from probeprune.errors import UsageError

app = typer.Typer(
    name="probeprune",
    cls=Commands,
    help="Prune causal language models, statically or dynamically, and measure every method in the same way.",
    no_args_is_help=True,
    add_completion=False,  # each of its completions would import torch
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
INTERRUPTED = "interrupted; all measurements are saved, and the same command continues from there."

for _command in (compare, table, report, plan, prune, export, quantised, recover, loraprune, generate, bench):
    app.command(cls=Command)(_command)
for _command in (doctor, cache, completion):
    app.command(cls=Command)(_command)
app.command("eval", cls=Command)(evaluate)
app.command(cls=Command)(push)
app.command("methods", cls=Command)(list_methods)
app.command("models", cls=Command)(list_models)
app.command("engines", cls=Command)(list_engines)


def _print_version(wanted: bool) -> None:
    if wanted:
        print_text(f"probeprune {probeprune.__version__}")
        raise typer.Exit


@app.callback()
def common(
    context: typer.Context,
    config: Annotated[
        Path | None,
        typer.Option(
            help="TOML file of options that are repeated.", show_default="probeprune.toml, where there is one"
        ),
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Say what is read from the cache and from the config file.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="Say nothing but results and errors: no progress, no warnings.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """What stands between `probeprune` and the command."""
    set_talk(quiet=quiet, verbose=verbose)
    assert isinstance(context.command, Commands)
    context.default_map = context.command.defaults(config, context.invoked_subcommand or "")


CTRL_C, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
"""Exit codes of a command that was ended from outside, as shells have them."""


def main() -> None:
    """Run the command line and exit with its code."""
    prepare_terminal()
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(run(app))


def _terminate(number: int, frame: FrameType | None) -> None:
    """End the command from where it is, so that all on the way out cleans up; a second signal is ignored.

    Worker processes forked from here inherit the handler and end in the same way.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(TERMINATED)


def run(command: Callable[[], Any]) -> int:
    """Run a command and return its exit code.

    0: done. 1: done, but some cells failed. 2: bad input, or no space or permission to write. 130: Ctrl-C.
    143: SIGTERM. With each but 0 comes one sentence on standard error; of several processes that end for the
    same reason, the first says it. Errors that are the package's own, not the user's, pass through.
    """
    try:
        command()
    except (UsageError, FloatingPointError) as error:
        if processes.says(error):
            print_error(str(error))
    except KeyboardInterrupt:
        _say_interrupted()
        return CTRL_C
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        print_error(f"{error.strerror}: {error.filename or 'output'}; free space or choose another --out.")
    except SystemExit as end:
        code = int(end.code or 0)
        if code in (CTRL_C, TERMINATED):  # Typer ends an interrupted command without a word
            _say_interrupted()
        return code
    else:
        return 0
    return 2


def _say_interrupted() -> None:
    if processes.is_first():
        print_error(INTERRUPTED)
