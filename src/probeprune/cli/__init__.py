"""The command line: thin commands over the library, one file each.

Bad input ends with one sentence and exit code 2, never with a traceback. So does Ctrl-C, and all measurements
made until then are kept. The options of a command are groups of options (`options.py`, `groups.py`).
"""

import errno
import sys
from collections.abc import Callable
from typing import Any

import typer

from probeprune.cli.bench import bench
from probeprune.cli.compare import compare
from probeprune.cli.generate import generate
from probeprune.cli.lists import list_methods, list_models
from probeprune.cli.prune import prune
from probeprune.cli.report import report
from probeprune.cli.table import table
from probeprune.cli.terminal import prepare_terminal, print_error
from probeprune.cli.train import loraprune, recover
from probeprune.errors import UsageError

app = typer.Typer(
    name="probeprune",
    help="Prune causal language models, statically or dynamically, and measure every method in the same way.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
INTERRUPTED = "interrupted; all measurements are saved, and the same command continues from there."

for _command in (compare, table, report, prune, recover, loraprune, generate, bench):
    app.command()(_command)
app.command("methods")(list_methods)
app.command("models")(list_models)


def main() -> None:
    """Run the command line and exit with its code."""
    prepare_terminal()
    sys.exit(run(app))


def run(command: Callable[[], Any]) -> int:
    """Run a command and return its exit code: 2, and one sentence on standard error, for bad input.

    Errors that are the package's own, not the user's, pass through.
    """
    try:
        command()
    except (UsageError, FloatingPointError) as error:
        print_error(str(error))
    except KeyboardInterrupt:
        print_error(INTERRUPTED)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        print_error(f"{error.strerror}: {error.filename or 'output'}; free space or choose another --out.")
    except SystemExit as end:
        if end.code != 130:
            return int(end.code or 0)
        print_error(INTERRUPTED)  # Typer ends an interrupted command without a word
    else:
        return 0
    return 2
