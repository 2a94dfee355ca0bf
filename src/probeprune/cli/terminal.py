"""Writes to the terminal: results to standard output; progress, warnings and file names to standard error.

Every command prints through this file, literally (`literal.py`): no name, text or error of others can style,
move or hide anything. JSON escapes by itself.
"""

import io
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar

from probeprune import processes
from probeprune.errors import Notice, UsageError
from probeprune.foreign.extras import MissingExtra
from probeprune.foreign.literal import LiteralConsole, styled, visible
from probeprune.progress import Progress
from probeprune.result_lines import Line

err = LiteralConsole(stderr=True)
LINE_EVERY = 60.0
"""Seconds between two lines of progress where there is no terminal for a bar."""


def out() -> LiteralConsole:
    """Standard output; tables keep their width where the output is not a terminal."""
    return LiteralConsole(width=None if sys.stdout.isatty() else 130)


class Warnings(logging.Handler):
    """Prints what the package logs, such as a data set that was cut short."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print the message of a record."""
        print_line(record.getMessage(), "yellow" if record.levelno > logging.INFO else "dim")


def set_talk(*, quiet: bool, verbose: bool) -> None:
    """How much the commands say on standard error: errors alone, as usual, or what is read from where too.

    Raises `UsageError` for both at once.
    """
    if quiet and verbose:
        raise UsageError("--quiet and --verbose ask for opposites; give one of them.")
    err.quiet = err.quiet or quiet
    level = logging.ERROR if quiet else logging.INFO if verbose else logging.WARNING
    logger = logging.getLogger("probeprune")
    logger.setLevel(level)
    for handler in logger.handlers:
        if isinstance(handler, Warnings):
            handler.setLevel(level)


def prepare_terminal() -> None:
    """Print the package's warnings, and no name can fail to be printed for want of a letter.

    Of several processes, only the first prints; the others say errors of their own alone.
    """
    if not processes.is_first():
        err.quiet = True
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    logging.getLogger("probeprune").addHandler(Warnings(logging.WARNING))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar on standard error for the newest task; yields the function that moves it.

    Where standard error is no terminal, such as a file of a run in the background, a line from time to time.
    """
    if not err.is_terminal:
        yield lines_of_progress()
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    bar = Bar(TextColumn("{task.description:<18}", markup=False), *columns, console=err, transient=True)
    tasks: dict[str, TaskID] = {}

    def show(what: str, done: int, total: int) -> None:
        bar.start()  # only now: a bar that shows nothing leaves an empty line
        if what not in tasks:
            for task in tasks.values():
                bar.update(task, visible=False)
            tasks[what] = bar.add_task(visible(what), total=total)
        bar.update(tasks[what], completed=done, total=total)

    try:
        yield show
    finally:
        if tasks:
            bar.stop()


def lines_of_progress(clock: Callable[[], float] = time.monotonic) -> Progress:
    """A function that prints how far the work is, once in `LINE_EVERY` seconds; nothing for short work."""
    last = clock()

    def show(what: str, done: int, total: int) -> None:
        nonlocal last
        now = clock()
        if now - last >= LINE_EVERY:
            last = now
            print_line(f"{what}: {done} of {total}", "dim")

    return show


def print_line(text: str, style: str = "", *, mark: str = "") -> None:
    """One line on standard error, never wrapped, as it is.

    Args:
        text: the line; line feeds in it are made visible.
        style: of the mark, or of the whole line where there is none.
        mark: a word of ours in front of it, such as `done`.
    """
    parts = [styled(f"{mark} ", style), styled(text)] if mark else [styled(text, style)]
    err.print(*parts, sep="", soft_wrap=True)


def print_text(text: str, end: str = "\n") -> None:
    """Text of several lines on standard output, as it is but for control characters."""
    print(visible(text, lines=True), end=end, flush=True)


def print_error(sentence: str) -> None:
    """What made a command fail, in one sentence on standard error, of whichever process."""
    err.quiet = False
    print_line(sentence, "red", mark="probeprune:")


def warn(sentences: Iterable[str]) -> None:
    """Sentences on standard error that do not end the command."""
    for sentence in sentences:
        print_line(sentence, "yellow")


@contextmanager
def notices() -> Iterator[None]:
    """Print every `Notice` of the library once, as a line on standard error, while the context lasts."""
    said = set()
    with warnings.catch_warnings():
        others = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, Notice):
                warn([str(message)] if str(message) not in said else [])
                said.add(str(message))
            else:
                others(message, category, *where, **more)

        warnings.showwarning = show
        warnings.simplefilter("always", Notice)
        yield


def print_rows(rows: Sequence[Line], title: str, as_json: bool) -> None:
    """Result rows on standard output, as JSON lines or as a table."""
    from probeprune import report

    if as_json:
        for row in rows:
            print(json.dumps(row))
    else:
        out().print(report.table(rows, title))


def drawn(draw: Callable[[], list[Path]]) -> list[Path]:
    """The figures that `draw` writes; none, and a sentence says why, where matplotlib is not installed.

    Figures show what tables hold as well, so a command goes on without them.
    """
    try:
        return draw()
    except MissingExtra as lack:
        warn([f"no figures: {lack}"])
        return []


def print_written(files: Iterable[Path]) -> None:
    """The files that were written, on standard error."""
    print_line(f"written: {', '.join(map(str, files))}")
