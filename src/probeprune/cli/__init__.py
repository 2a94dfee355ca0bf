"""The command line: thin commands over the library, one file each.

Bad input ends with one sentence and exit code 2, never a traceback; Ctrl-C too, and what was measured stays.
"""

import errno
import sys
from collections.abc import Callable
from typing import Any

import typer

from probeprune.cli.bench import bench
from probeprune.cli.common import err
from probeprune.cli.compare import compare
from probeprune.cli.generate import generate
from probeprune.cli.lists import list_methods, list_models
from probeprune.cli.prune import prune
from probeprune.cli.report import report
from probeprune.cli.table import table
from probeprune.cli.train import loraprune, recover
from probeprune.errors import UsageError

app = typer.Typer(
    name="probeprune",
    help="Structured pruning of causal language models, dynamic and static, measured alike.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
INTERRUPTED = "interrupted; what was measured is saved, the same command continues from there."

for _command in (compare, table, report, prune, recover, loraprune, generate, bench):
    app.command()(_command)
app.command("methods")(list_methods)
app.command("models")(list_models)


def main() -> None:
    """Run the command line; turns what the user can mend into one sentence and exit code 2."""
    sys.exit(run(app))


def run(command: Callable[[], Any]) -> int:
    """The exit code of a command, its error printed."""
    try:
        command()
    except (UsageError, FloatingPointError) as error:
        complain(str(error))
    except KeyboardInterrupt:
        complain(INTERRUPTED)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        complain(f"{error.strerror}: {error.filename or 'output'}; free space or choose another --out.")
    except SystemExit as end:
        if end.code != 130:
            return int(end.code or 0)
        complain(INTERRUPTED)  # typer ends a command that was interrupted in silence
    else:
        return 0
    return 2


def complain(sentence: str) -> None:
    """One sentence on stderr."""
    err.print("[red]probeprune:[/red]", sentence, highlight=False, soft_wrap=True, markup=True)
