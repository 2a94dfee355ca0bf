"""Reads the values of options: lists separated by commas, numbers, names. All errors name the option."""

from collections.abc import Iterable

from probeprune.errors import UsageError, unknown


def names(text: str, option: str) -> list[str]:
    """The entries of a list separated by commas. Raises `UsageError` for an empty list."""
    entries = [entry.strip() for entry in text.split(",") if entry.strip()]
    if not entries:
        raise UsageError(f"--{option} is empty; give at least one entry, and separate several by commas.")
    return entries


def numbers(text: str, option: str) -> list[float]:
    """Numbers separated by commas. Raises `UsageError` for anything else."""
    try:
        return [float(entry) for entry in names(text, option)]
    except ValueError:
        raise UsageError(
            f"--{option} {text!r} is not a number or a list of numbers separated by commas, such as 0.2,0.4."
        ) from None


def whole_numbers(text: str, option: str, least: int) -> list[int]:
    """Whole numbers separated by commas. Raises `UsageError` for anything else, or one below `least`."""
    entries = names(text, option)
    if not all(entry.isdecimal() and int(entry) >= least for entry in entries):
        raise UsageError(f"--{option} {text!r} must be whole numbers of at least {least}, such as 1,16.")
    return [int(entry) for entry in entries]


def one_of(what: str, given: str, known: Iterable[str]) -> None:
    """Raise `UsageError` unless `given` is one of the `known` names of a `what`."""
    if given not in known:
        raise UsageError(unknown(what, given, known))


def at_least(least: int, **values: int) -> None:
    """Raise `UsageError` for the first option, named as its parameter, with a value below `least`."""
    for name, value in values.items():
        if value < least:
            raise UsageError(f"--{name.replace('_', '-')} must be at least {least}, not {value}.")
