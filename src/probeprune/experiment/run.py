"""Run cells on this machine: subject by subject, each result on disk as soon as it is measured."""

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby

import torch

from probeprune.errors import UsageError
from probeprune.experiment.ahead import check_ratio
from probeprune.experiment.cells import Cell, prunes, trains
from probeprune.experiment.measuring import failure, measure
from probeprune.experiment.results import Results
from probeprune.experiment.workbench import Unprepared, Workbench
from probeprune.model.machine import check_cache
from probeprune.model.passes import token_windows
from probeprune.processes import shares
from probeprune.result_lines import Line
from probeprune.training.recovery import check_in_memory

Done = Callable[[Cell, Line], None]
"""Called with every cell and its row, measured just now or before."""


def run_cells(
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
        results: stores the rows.
        cells: what to measure; neighbours with the same subject share its preparation.
        done: called with every cell and its row.
        keep_going: record a cell that fails as a row with the reason, instead of raising.
        keep_trained: keep the checkpoints of trained models when their cells are done.

    Raises:
        UsageError: a cache that cannot take the statistics.
        UsageError, FloatingPointError: the error of a cell, unless `keep_going`. Rows measured before stay.
    """
    with shares.alike():
        if shares.leads() and any(c.subject.calibration is not None for c in cells):
            check_cache()
        if not keep_going:
            _check_ahead(bench, [c for c in cells if results.find(c) is None])
    for subject, of_subject in groupby(cells, key=lambda c: c.subject):
        group = list(of_subject)
        for cell, row in measure_cells(bench, missing(group, results, done), keep_going):
            results.add(row)
            done(cell, row)
        if not keep_trained and all(results.find(c) for c in group):
            shutil.rmtree(bench.trained_folder(subject), ignore_errors=True)
    return [results.rows[c.key] for c in cells]


def missing(cells: Iterable[Cell], results: Results, done: Done) -> list[Cell]:
    """The cells that `results` does not hold; calls `done` for those it holds."""
    not_measured = []
    for cell in cells:
        row = results.find(cell)
        if row is None:
            not_measured.append(cell)
        else:
            done(cell, row)
    return not_measured


def measure_cells(bench: Workbench, cells: Sequence[Cell], keep_going: bool) -> Iterator[tuple[Cell, Line]]:
    """Measure the cells of one subject, one after the other.

    The subject is prepared anew for each cell: a dynamic method must not carry its history over to the next
    text. Raises as `run_cells`.
    """
    for index, cell in enumerate(cells):
        try:
            yield cell, measure(bench, cell)
        except Unprepared as error:
            # The subject itself failed, so all its other cells fail too.
            if not keep_going:
                raise error.cause from error.cause.__cause__
            for failed in cells[index:]:
                yield failed, failure(failed, error.cause)
            return
        except Exception as error:
            if not keep_going:
                raise
            yield cell, failure(cell, error)


def _check_ahead(bench: Workbench, cells: Sequence[Cell]) -> None:
    """Raise `UsageError` before the run for a ratio that a method cannot reach, a text without windows, or
    training of a model whose layers are on disk."""
    drawn: set[object] = set()
    for subject in dict.fromkeys(c.subject for c in cells):
        if trains(subject.method):
            check_in_memory(bench.dense(subject).model, f"{subject.label}: training")
        if not prunes(subject.method):
            continue  # needs no model to be opened
        try:
            check_ratio(subject.method, subject.ratio, bench.dense(subject).model)
        except UsageError as error:
            raise UsageError(f"{subject.label}: {error}") from error
        source = None if subject.calibration in drawn else bench.source(subject)
        if source is not None:
            drawn.add(subject.calibration)
            token_windows(bench.dense(subject).model, torch.zeros(1, source.length, dtype=torch.long))
            source.draw(1)
