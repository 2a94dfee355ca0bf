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
from probeprune.files import RESULTS, read_lines
from probeprune.result_lines import Line

_BEGINNING = b'{"kind": "'
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

        A last line that was cut short by a kill is removed from the file; one without a newline gets it.
        Corrupt lines are named in `problems` and their cells are measured again.

        Raises:
            UsageError: a file without a single valid line, which is left as it is.
        """
        results = cls(folder / RESULTS)
        if not results.path.exists():
            return results
        raw = results.path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1] if _is_cut(raw) else raw
        lines, refused = read_lines(whole, _check)
        results.problems = [
            f"line {n} of {results.path} is corrupt and was left out; its cell will be measured again."
            for n, _ in refused
        ]
        if whole and not lines:
            raise UsageError(f"{results.path} is not a results file of this version; choose another --out.")
        results.rows = {row["key"]: row for _, row in lines}
        with results.path.open("ab") as file:
            file.truncate(len(whole))
            if whole and not whole.endswith(b"\n"):
                file.write(b"\n")
        return results

    def find(self, cell: Cell) -> Line | None:
        """The line of that cell; None if it was not measured or failed."""
        row = self.rows.get(cell.key)
        return row if row is not None and row["kind"] == "result" else None

    def add(self, row: Line) -> None:
        """Append one line, on disk when this returns; an `OSError` leaves the file as it was."""
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
        self.rows[row["key"]] = row


def _is_cut(raw: bytes) -> bool:
    """Whether a file ends in the beginning of a line, as a kill leaves it."""
    last = raw[raw.rfind(b"\n") + 1 :]
    try:
        json.loads(last)
    except ValueError:
        # A single line may also be somebody else's.
        return last != raw or last.startswith(_BEGINNING) or _BEGINNING.startswith(last)
    return False


def _check(row: Any) -> None:
    """Raise `ValueError` for a line that cannot belong to a cell."""
    if not isinstance(row, dict) or row.get("kind") not in ("result", "failure"):
        raise ValueError("neither a result nor a failure")
    if not isinstance(row.get("key"), str):
        raise ValueError("'key' is missing")
