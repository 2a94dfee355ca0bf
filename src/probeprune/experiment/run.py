"""Running cells: those not measured yet, one subject after the other, each line on disk as it comes."""

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby

from probeprune.errors import UsageError
from probeprune.experiment.cells import Cell
from probeprune.experiment.measuring import failure, measure
from probeprune.experiment.results import Results
from probeprune.experiment.workbench import Unprepared, Workbench
from probeprune.methods import without_measured_widths
from probeprune.model.blocks import find_blocks
from probeprune.plan import widths
from probeprune.result_lines import Line

Done = Callable[[Cell, Line], None]


def run(
    bench: Workbench,
    results: Results,
    cells: Sequence[Cell],
    *,
    done: Done = lambda cell, row: None,
    keep_going: bool = False,
    keep_trained: bool = True,
) -> list[Line]:
    """Measure every cell that `results` does not hold yet; returns the rows of all cells, in their order.

    Args:
        bench: opens the models.
        results: takes the lines.
        cells: what to measure; those of one subject are measured together.
        done: called with every cell and its line.
        keep_going: a cell that fails becomes a line that says why, instead of an error.
        keep_trained: keep the checkpoints of trained models when their cells are done.

    Raises:
        UsageError, FloatingPointError: what a cell raises, unless `keep_going`; lines already measured stay.
    """
    if not keep_going:
        _check(bench, [c for c in cells if results.find(c) is None])
    for subject, own in groupby(cells, key=lambda c: c.subject):
        group = list(own)
        for cell, row in measured(bench, unmeasured(group, results, done), keep_going):
            results.add(row)
            done(cell, row)
        if not keep_trained and all(results.find(c) for c in group):
            shutil.rmtree(bench.trained_folder(subject), ignore_errors=True)
    return [results.rows[c.key] for c in cells]


def unmeasured(cells: Iterable[Cell], results: Results, done: Done) -> list[Cell]:
    """The cells that `results` does not hold; `done` hears of the others."""
    left = []
    for cell in cells:
        if (known := results.find(cell)) is None:
            left.append(cell)
        else:
            done(cell, known)
    return left


def measured(bench: Workbench, cells: Sequence[Cell], keep_going: bool) -> Iterator[tuple[Cell, Line]]:
    """The lines of the cells of one subject, one after the other.

    Each cell finds the subject as new: what a dynamic method learns on one text must not reach the next.
    """
    for done, cell in enumerate(cells):
        try:
            yield cell, measure(bench, cell)
        except Unprepared as error:
            # What cannot be prepared cannot be measured on anything.
            if not keep_going:
                raise error.cause from error.cause.__cause__
            for failed in cells[done:]:
                yield failed, failure(failed, error.cause)
            return
        except Exception as error:
            if not keep_going:
                raise
            yield cell, failure(cell, error)


def _check(bench: Workbench, cells: Sequence[Cell]) -> None:
    """Raise now what would stop the run later: a ratio that cannot be reached."""
    for subject in dict.fromkeys(c.subject for c in cells):
        method = without_measured_widths(subject.method)
        if method.when != "never" and method.allocation != "global":
            blocks = find_blocks(bench.dense(subject).model, method.units)
            try:
                widths(method, subject.ratio, blocks, [])
            except UsageError as error:
                raise UsageError(f"{subject.label}: {error}") from error
