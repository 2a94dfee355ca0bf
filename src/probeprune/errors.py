"""The exception for mistakes that the user can fix, and the sentences it carries."""

from collections.abc import Iterable
from difflib import get_close_matches


class UsageError(ValueError):
    """Bad input. Its text is one sentence that says what is wrong and what to do.

    The library raises it; the command line prints the text and exits with code 2.
    """


def first_line(error: BaseException) -> str:
    """First line of another library's error, without a full stop, to quote inside our own message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def unknown(what: str, given: object, known: Iterable[object], others: str = "") -> str:
    """The message for an unknown name: the nearest known name, then all of them.

    Args:
        what: the kind of name, such as `method`.
        given: the unknown name.
        known: all names of that kind.
        others: what else is accepted, to end the list with.
    """
    names = sorted(map(str, known))
    if not names and not others:
        return f"unknown {what} {given!r}; there is none to give here."
    # In lower case too: `SmolLM2` is near `smollm2`.
    near = get_close_matches(str(given), names, n=1) or get_close_matches(str(given).lower(), names, n=1)
    hint = f"did you mean {near[0]!r}? Known:" if near else "known:"
    return f"unknown {what} {given!r}; {hint} {', '.join([*names, others] if others else names)}."
