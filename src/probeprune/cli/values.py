"""Reads the values of options: lists separated by commas, numbers, names. All errors name the option."""

import re
from collections.abc import Iterable
from typing import Any

from probeprune.errors import UsageError, quoted, unknown
from probeprune.ranges import RANGES, plain


def names(text: str, option: str, repeated: bool = False) -> list[str]:
    """The entries of a list separated by commas.

    Raises `UsageError` for an empty entry, and for a repeated one unless those have a meaning.
    """
    entries = [entry.strip() for entry in text.split(",")]
    if not all(entries):
        raise UsageError(f"--{option} {text!r} has an empty entry; separate entries by single commas.")
    if not repeated:
        _check_different(entries, text, option)
    return entries


def numbers(text: str, option: str, name: str) -> list[Any]:
    """Numbers separated by commas, each in the range of the parameter `name` (a key of `RANGES`).

    Raises `UsageError` for anything else, and for a repeated number.
    """
    allowed = RANGES[name]
    found = [plain(name, _number(entry, allowed.whole), f"--{option}") for entry in names(text, option)]
    _check_different(found, text, option)
    return found


_BASES = (("B", 1000), ("iB", 1024))
_UNITS = {f"{prefix}{unit}": base**power for power, prefix in enumerate("KMGT", 1) for unit, base in _BASES}


def size(option: str, text: str) -> int:
    """The bytes that a text such as `6GiB` or `800 MB` means. Raises `UsageError` for any other."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]i?B)", text.strip())
    if found is None or not (number := float(found[1])):
        raise UsageError(f"--{option} {quoted(text)} is no size; write a number and a unit, such as 6GiB.")
    return int(number * _UNITS[found[2]])


def one_of(what: str, given: str, known: Iterable[str]) -> None:
    """Raise `UsageError` unless `given` is one of the `known` names of a `what`."""
    if given not in known:
        raise UsageError(unknown(what, given, known))


def _number(entry: str, whole: bool) -> int | float | str:
    """The number that an entry writes; the entry itself, which no range holds, where it writes none."""
    try:
        return int(entry) if whole else float(entry)
    except ValueError:
        return entry


def _check_different(entries: list[Any], text: str, option: str) -> None:
    if len(set(entries)) < len(entries):
        raise UsageError(f"--{option} {text!r} has an entry twice; give each one once.")
