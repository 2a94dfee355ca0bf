"""Read result lines from a file; those that could not be shown are named."""

from pathlib import Path

from probeprune.errors import UsageError
from probeprune.files import RESULTS
from probeprune.foreign.reading import read_lines
from probeprune.result_lines import Line, check_line


def read_results(path: Path) -> tuple[list[Line], list[str]]:
    """Read the lines of a run; returns them, and a sentence for every line that could not be used.

    Of lines with the same key the last counts, so a later result replaces a failure.

    Args:
        path: a folder that holds `results.jsonl`, or such a file.

    Raises:
        UsageError: the file does not exist, is no regular file, is too large, or holds no result.
    """
    file = path / RESULTS if path.is_dir() else path
    if not file.exists():
        raise UsageError(f"{file} does not exist; give the folder of a run, or its {RESULTS}.")
    numbered, refused, _ = read_lines(file, check_line)
    problems = [f"{file}, line {n} was left out: {e}." for n, e in refused]
    lines: dict[object, Line] = {}
    for position, line in numbered:
        key = line.get("key", position)
        lines.pop(key, None)  # so that it takes the place of the newer line
        lines[key] = line
    if not any(line["kind"] == "result" for line in lines.values()):
        failed = f" (only {len(lines)} failures)" if lines else ""
        raise UsageError(f"{file} holds no results{failed}; run `probeprune compare` to make some.")
    return list(lines.values()), problems
