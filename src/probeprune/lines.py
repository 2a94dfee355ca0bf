"""Result lines: one JSON object a line, in a file that a kill or an editor may have damaged."""

import json
from collections.abc import Callable
from typing import Any

RESULTS = "results.jsonl"

Row = dict[str, Any]


def read_lines(
    raw: bytes, check: Callable[[Any], None]
) -> tuple[list[tuple[int, Row]], list[tuple[int, ValueError]]]:
    """The lines that can be used and those that cannot, each with its number from 1; blank ones are neither.

    Args:
        raw: the file's content.
        check: raises `ValueError` for what is JSON but no line of results.
    """
    rows, wrong = [], []
    for number, line in enumerate(raw.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            check(row)
        except ValueError as error:
            wrong.append((number, error))
        else:
            rows.append((number, row))
    return rows, wrong
