"""Result lines from a file, whatever has happened to it. Knows nothing of what the lines mean to a reader."""

import json
import math
from pathlib import Path
from typing import Any

from probeprune.errors import UsageError
from probeprune.files import RESULTS, Row, read_lines

_NOT_JSON = (json.JSONDecodeError, UnicodeDecodeError)

_PARTS: dict[str, type | tuple[type, ...]] = {
    "model": str,
    "seed": int,
    "removed_share": (int, float),
    "training": (dict, type(None)),
    "losses": list,
    "units": list,
    "correct": str,
    "prefill": dict,
    "decode": dict,
    "stages": dict,
    "versions": dict,
}
"""What optional parts are, where they are there."""


def read_rows(path: Path) -> tuple[list[Row], list[str]]:
    """The lines of a run, and one sentence for every line that could not be used.

    Of lines with the same key the last counts: a failure that was mended is gone.

    Args:
        path: a folder that holds `results.jsonl`, or such a file.

    Raises:
        UsageError: no such file, one that cannot be read, or no result in it.
    """
    file = path / RESULTS if path.is_dir() else path
    try:
        raw = file.read_bytes()
    except FileNotFoundError:
        raise UsageError(f"{file} does not exist; give the folder of a run, or its {RESULTS}.") from None
    except OSError as error:
        raise UsageError(f"{file} cannot be read ({error.strerror}).") from error
    lines, wrong = read_lines(raw, _check)
    problems = [
        f"{file}, line {n} was left out: {'not JSON' if isinstance(e, _NOT_JSON) else e}." for n, e in wrong
    ]
    rows: dict[object, Row] = {}
    for number, row in lines:
        key = row.get("key", number)
        rows.pop(key, None)  # so that it moves to where the newer line is
        rows[key] = row
    if not any(r["kind"] == "result" for r in rows.values()):
        failed = f" ({len(rows)} lines of other kinds)" if rows else ""
        raise UsageError(f"{file} holds no results{failed}; run `probeprune compare` to make some.")
    return list(rows.values()), problems


def _check(row: Any) -> None:
    """Raise `ValueError` for what cannot be shown."""
    kind = row.get("kind") if isinstance(row, dict) else None
    if kind == "settings":
        return
    if kind not in ("result", "failure"):
        raise ValueError(f"neither a result nor a failure but {kind!r}")
    for part in ("name", "method", "ratio", *(("task", "metric") if kind == "result" else ("error",))):
        if part not in row:
            raise ValueError(f"{part!r} is missing")
    if not isinstance(row["method"], dict) or "when" not in row["method"]:
        raise ValueError("'method' does not say when it prunes")
    if not _finite(row["ratio"]):
        raise ValueError("'ratio' is not a number")
    if kind == "result" and row["metric"] != "cost" and not _finite(row.get("value")):
        raise ValueError("'value' is not a finite number")
    if kind == "result" and row["metric"] == "perplexity" and row["value"] <= 0:
        raise ValueError("a perplexity is above 0")
    for part, kinds in _PARTS.items():
        if part in row and not isinstance(row[part], kinds):
            raise ValueError(f"{part!r} is not what it should be")


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
