"""Read result lines from a file, and refuse those that could not be shown."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from probeprune.errors import UsageError
from probeprune.files import RESULTS, read_lines
from probeprune.result_lines import Line

_NOT_JSON = (json.JSONDecodeError, UnicodeDecodeError)

TYPES: Mapping[str, tuple[type | tuple[type, ...], str]] = {
    "model": (str, "a string"),
    "seed": (int, "a whole number"),
    "removed_share": ((int, float), "a number"),
    "training": ((dict, type(None)), "a record or null"),
    "losses": (list, "a list"),
    "units": (list, "a list"),
    "correct": (str, "a string"),
    "prefill": (dict, "a record"),
    "decode": (dict, "a record"),
    "stages": (dict, "a record"),
    "versions": (dict, "a record"),
}
"""Types of optional keys, and their names in messages."""


def read_results(path: Path) -> tuple[list[Line], list[str]]:
    """Read the lines of a run; returns them, and a sentence for every line that could not be used.

    Of lines with the same key the last counts, so a later result replaces a failure.

    Args:
        path: a folder that holds `results.jsonl`, or such a file.

    Raises:
        UsageError: the file does not exist, cannot be read, or holds no result.
    """
    file = path / RESULTS if path.is_dir() else path
    try:
        raw = file.read_bytes()
    except FileNotFoundError:
        raise UsageError(f"{file} does not exist; give the folder of a run, or its {RESULTS}.") from None
    except OSError as error:
        raise UsageError(f"{file} cannot be read ({error.strerror}).") from error
    numbered, refused = read_lines(raw, _check)
    problems = [
        f"{file}, line {n} was left out: {'not JSON' if isinstance(e, _NOT_JSON) else e}." for n, e in refused
    ]
    lines: dict[object, Line] = {}
    for position, line in numbered:
        key = line.get("key", position)
        lines.pop(key, None)  # so that it takes the place of the newer line
        lines[key] = line
    if not any(line["kind"] == "result" for line in lines.values()):
        failed = f" (only {len(lines)} failures)" if lines else ""
        raise UsageError(f"{file} holds no results{failed}; run `probeprune compare` to make some.")
    return list(lines.values()), problems


def _check(line: Any) -> None:
    """Raise `ValueError` for a line that cannot be shown."""
    kind = line.get("kind") if isinstance(line, dict) else None
    if kind not in ("result", "failure"):
        raise ValueError(f"its kind is {kind!r}, neither 'result' nor 'failure'")
    for key in ("name", "method", "ratio", *(("task", "metric") if kind == "result" else ("error",))):
        if key not in line:
            raise ValueError(f"{key!r} is missing")
    if not isinstance(line["method"], dict) or "when" not in line["method"]:
        raise ValueError("'method' has no 'when'")
    if not _is_finite(line["ratio"]):
        raise ValueError("'ratio' is not a number")
    if kind == "result":
        _check_value(line)
    for key, (types, words) in TYPES.items():
        if key in line and not isinstance(line[key], types):
            raise ValueError(f"{key!r} is not {words}")


def _check_value(line: Mapping[str, Any]) -> None:
    metric, value = line["metric"], line.get("value")
    if metric not in ("perplexity", "accuracy", "cost"):
        raise ValueError(f"unknown metric {metric!r}")
    if metric != "cost" and not _is_finite(value):
        raise ValueError("'value' is not a finite number")
    if metric == "perplexity" and line["value"] <= 0:
        raise ValueError("a perplexity must be above 0")
    if metric == "accuracy" and "protocol" not in line:
        raise ValueError("'protocol' is missing")


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
