"""Writes to the terminal: results to standard output; progress, warnings and file names to standard error."""

import json
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar

from probeprune.errors import Notice
from probeprune.progress import Progress
from probeprune.result_lines import Line

err = Console(stderr=True)


def out() -> Console:
    """Standard output; tables keep their width where the output is not a terminal."""
    return Console(width=None if sys.stdout.isatty() else 130)


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar on standard error for the newest task; yields the function that moves it."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    bar = Bar(TextColumn("{task.description:<18}"), *columns, console=err, transient=True)
    tasks: dict[str, TaskID] = {}

    def show(what: str, done: int, total: int) -> None:
        bar.start()  # only now: a bar that shows nothing leaves an empty line
        if what not in tasks:
            for task in tasks.values():
                bar.update(task, visible=False)
            tasks[what] = bar.add_task(what, total=total)
        bar.update(tasks[what], completed=done, total=total)

    try:
        yield show
    finally:
        if tasks:
            bar.stop()


def print_line(text: str, style: str = "") -> None:
    """One line on standard error, never wrapped, brackets printed as they are."""
    err.print(text, style=style, highlight=False, soft_wrap=True, markup=False)


def print_error(sentence: str) -> None:
    """What made a command fail, in one sentence on standard error."""
    err.print(f"[red]probeprune:[/red] {escape(sentence)}", highlight=False, soft_wrap=True)


def warn(sentences: Iterable[str]) -> None:
    """Sentences on standard error that do not end the command."""
    for sentence in sentences:
        print_line(sentence, "yellow")


@contextmanager
def notices() -> Iterator[None]:
    """Print every `Notice` of the library as a line on standard error while the context lasts."""
    with warnings.catch_warnings():
        others = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, Notice):
                warn([str(message)])
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


def print_written(files: Iterable[Path]) -> None:
    """The files that were written, on standard error."""
    print_line(f"written: {', '.join(map(str, files))}")


def print_saved(
    record: dict[str, Any], folder: Path, summary: str, compared: Sequence[str], as_json: bool
) -> None:
    """The outcome of a command that saves a checkpoint: its record as JSON, or two lines.

    Args:
        record: as in `pruning.json` or `training.json`.
        folder: the checkpoint.
        summary: what was done and how long it took.
        compared: the names of the perplexities to print, in this order.
        as_json: print the record alone.
    """
    if as_json:
        print(json.dumps(record))
        return
    err.print(f"[green]saved[/green] {escape(f'{folder}: {summary}')}", highlight=False, soft_wrap=True)
    evaluation = record["evaluation"]
    if evaluation is not None:
        figures = ", ".join(f"{name} {evaluation['perplexity'][name]:.2f}" for name in compared)
        print(f"{evaluation['corpus']} perplexity: {figures}")
