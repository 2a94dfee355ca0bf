"""What the commands share: options, the progress bar, how names and numbers are read, what was saved."""

import json
import sys
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from probeprune.errors import UsageError, unknown
from probeprune.result_lines import Line

err = Console(stderr=True)

MODEL = Annotated[
    str, typer.Argument(help="`smollm2-135m` (embedded), a local directory, a GGUF file or a hub id.")
]
DTYPE = Annotated[
    str, typer.Option(help="auto (the faster of bfloat16 and float32, measured), bfloat16, float16, float32.")
]
DEVICE = Annotated[str, typer.Option(help="auto, cpu, cuda, mps.")]
TRUST = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
JSON = Annotated[bool, typer.Option("--json", help="Print JSON lines instead of a table.")]


def out() -> Console:
    """Standard output; tables keep their width where the output is not a terminal."""
    return Console(width=None if sys.stdout.isatty() else 130)


@contextmanager
def progress_bar():  # type: ignore[no-untyped-def]
    """A bar on stderr; yields a function of (what, done, total)."""
    columns = (
        TextColumn("{task.description:<18}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=err, transient=True)
    tasks: dict[str, Any] = {}

    def show(what: str, done: int, total: int) -> None:
        bar.start()  # not before: a bar that shows nothing leaves an empty line
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


def names(text: str, option: str) -> list[str]:
    """The parts of a comma-separated option. Raises `UsageError` for none."""
    parts = [p.strip() for p in text.split(",") if p.strip()]
    if not parts:
        raise UsageError(f"--{option} is empty; give at least one, separated by commas.")
    return parts


def one_of(what: str, given: str, known: tuple[str, ...]) -> None:
    """Raise `UsageError` unless `given` is one of the known names."""
    if given not in known:
        raise UsageError(unknown(what, given, known))


def number(text: str) -> float:
    """A number. Raises `UsageError` for anything else."""
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"{text!r} is not a number; ratios look like 0.2,0.4.") from None


def warn(sentences: Iterable[str]) -> None:
    """Sentences on stderr that do not end the command."""
    for sentence in sentences:
        err.print(f"[yellow]{escape(sentence)}[/yellow]", highlight=False, soft_wrap=True)


def say_rows(rows: Sequence[Line], title: str, as_json: bool) -> None:
    """Result lines as JSON, or as a table."""
    from probeprune import report

    if as_json:
        for row in rows:
            print(json.dumps(row))
    else:
        out().print(report.table(rows, title))


def say_written(files: Iterable[Path]) -> None:
    """Where results are, on stderr."""
    err.print(f"written: {', '.join(map(str, files))}", highlight=False, soft_wrap=True)


def weights_dtype(loaded: Any, dtype: str) -> Any:
    """Of weights on disk: as they were where `--dtype auto` chose what to compute in, else as asked for."""
    return loaded.stored_dtype if dtype == "auto" else loaded.dtype


def say_saved(
    record: dict[str, Any], out_dir: Path, did: str, measured: tuple[str, str], as_json: bool
) -> None:
    """What was written and what it gave: the record as JSON, or two lines."""
    if as_json:
        print(json.dumps(record))
        return
    err.print(f"[green]saved[/green] {out_dir}: {did}", highlight=False, soft_wrap=True)
    if record["evaluation"] is not None:
        found = record["evaluation"]["perplexity"]
        figures = ", ".join(f"{what} {found[what]:.2f}" for what in measured)
        print(f"{record['evaluation']['corpus']} perplexity: {figures}")
