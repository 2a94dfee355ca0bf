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

RESULTS = "results.jsonl"

Row = dict[str, Any]


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
        lines, results.problems = read_lines(complete, results.path)
        if complete and not lines:
            raise UsageError(f"{results.path} is not a results file of this version; choose another --out.")
        results.rows = {row["key"]: row for row in lines}
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


def read_lines(raw: bytes, path: Path) -> tuple[list[Row], list[str]]:
    """The rows among a results file's lines, and a sentence for every line that is none."""
    rows, problems = [], []
    for number, line in enumerate(raw.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if row["kind"] not in ("result", "failure") or not isinstance(row["key"], str):
                raise KeyError("kind")
            rows.append(row)
        except (ValueError, KeyError, TypeError):
            problems.append(
                f"line {number} of {path} is corrupt and was left out; what it held is measured anew."
            )
    return rows, problems
