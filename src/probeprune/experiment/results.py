"""The results file: one JSON line a measurement, append-only, found again by its cell's key.

A run that is killed and started again continues where it was. Knows nothing of how results are made or shown.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from probeprune.errors import UsageError
from probeprune.experiment.cells import Cell
from probeprune.files import RESULTS, Row, read_lines


@dataclass
class Results:
    """The lines of a results file.

    Attributes:
        path: the file.
        rows: by cell key, the newest line of each.
        problems: one sentence for each line that could not be read; all others are kept.
    """

    path: Path
    rows: dict[str, Row] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @classmethod
    def open(cls, folder: Path) -> "Results":
        """The results in `folder`, none if there is no file yet.

        A last line cut short by a kill is dropped from the file; a corrupt one is named in `problems`.
        Raises `UsageError` for a file none of whose lines is a result.
        """
        results = cls(folder / RESULTS)
        if not results.path.exists():
            return results
        raw = results.path.read_bytes()
        complete = raw[: raw.rfind(b"\n") + 1]
        lines, wrong = read_lines(complete, _check)
        results.problems = [
            f"line {n} of {results.path} is corrupt and was left out; what it held is measured anew."
            for n, _ in wrong
        ]
        if complete and not lines:
            raise UsageError(f"{results.path} is not a results file of this version; choose another --out.")
        results.rows = {row["key"]: row for _, row in lines}
        if len(complete) < len(raw):
            with results.path.open("r+b") as file:
                file.truncate(len(complete))
        return results

    def find(self, cell: Cell) -> Row | None:
        """The line of that cell, if it has been measured; a failure counts as not measured."""
        row = self.rows.get(cell.key)
        return row if row is not None and row["kind"] == "result" else None

    def add(self, row: Row) -> None:
        """Append one line; it is on disk when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
        # One write call: a kill leaves at most one incomplete last line, which `open` drops.
        with self.path.open("ab", buffering=0) as file:
            file.write(line)
            os.fsync(file.fileno())
        self.rows[row["key"]] = row


def _check(row: Any) -> None:
    """Raise `ValueError` for what no cell can be found by."""
    if not isinstance(row, dict) or row.get("kind") not in ("result", "failure"):
        raise ValueError("neither a result nor a failure")
    if not isinstance(row.get("key"), str):
        raise ValueError("no key")
