"""The results file: one JSON line a measurement, append-only, looked up by the key of its cell.

A run that was killed continues where it stopped. Knows nothing of how results are made or shown.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from probeprune.errors import UsageError
from probeprune.experiment.cells import Cell
from probeprune.files import RESULTS
from probeprune.foreign.reading import read_lines
from probeprune.processes import shares
from probeprune.result_lines import Line, check_line

_START = b'{"kind": "'
"""How every line begins that was written here."""


@dataclass
class Results:
    """The lines of a results file.

    Attributes:
        path: the file.
        rows: the newest line of each cell, by cell key.
        problems: one sentence for each line that could not be read.
    """

    path: Path
    rows: dict[str, Line] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @classmethod
    def open(cls, folder: Path) -> "Results":
        """Open the results in `folder`; there are none if there is no file yet.

        A last line that was cut short by a kill is removed from the file; one that only lacks its line end
        gets it. Corrupt lines are named in `problems` and their cells are measured again. Where work is
        shared out, the first process opens the file, and all get its lines.

        Raises:
            UsageError: a file without a single valid line, or one that is no regular file.
        """
        results = cls(folder / RESULTS)
        with shares.alike():
            if shares.leads() and results.path.exists():
                results._read()
        results.rows = shares.agreed(results.rows)
        return results

    def _read(self) -> None:
        """The lines of the file, which is there; see `open`."""
        lines, refused, complete = read_lines(self.path, check_key)
        open_end = complete < self.path.stat().st_size
        last = lines[-1][0] if lines else 0
        cut = open_end and bool(refused) and refused[-1][0] > last
        if refused and not lines and not (cut and not complete and _is_start(self.path)):
            raise UsageError(f"{self.path} is not a results file of this version; choose another --out.")
        self.problems = [
            f"line {n} of {self.path} is corrupt ({e}) and was left out; its cell will be measured again."
            for n, e in refused[: len(refused) - cut]
        ]
        self.rows = {row["key"]: row for _, row in lines}
        if cut:
            os.truncate(self.path, complete)
        elif open_end:
            with self.path.open("ab") as file:
                file.write(b"\n")

    def find(self, cell: Cell) -> Line | None:
        """The line of that cell; None if it was not measured or failed."""
        row = self.rows.get(cell.key)
        return row if row is not None and row["kind"] == "result" else None

    def add(self, row: Line) -> None:
        """Append one line, on disk when this returns; an `OSError` leaves the file as it was.

        Where work is shared out, the first process writes.
        """
        if shares.leads():
            self._append(row)
        self.rows[row["key"]] = row

    def _append(self, row: Line) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(row).encode() + b"\n"
        # A kill leaves at most one incomplete last line, which `open` drops.
        with self.path.open("ab") as file:
            end = file.tell()
            try:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                os.ftruncate(file.fileno(), end)
                raise


def check_key(row: Any) -> None:
    """Raise `ValueError` for a line that cannot belong to a cell, or could not be shown."""
    check_line(row)
    if "key" not in row:
        raise ValueError("'key' is missing")


def _is_start(path: Path) -> bool:
    """Whether the file begins as a line does that `Results.add` began to write."""
    with path.open("rb") as file:
        return _START.startswith(file.read(len(_START)))
