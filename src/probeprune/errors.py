"""The exception for mistakes that the user can fix, and the sentences it carries."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches


class UsageError(ValueError):
    """Bad input. Its text is one sentence that says what is wrong and what to do.

    The library raises it; the command line prints the text and exits with code 2.
    """


class Notice(UserWarning):
    """What was done otherwise than expected, in one sentence; the command line prints it."""


def first_line(error: BaseException) -> str:
    """First line of another library's error, without a full stop, to quote inside our own message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turn whatever libraries raise for files of others into a `UsageError` that begins with `what`.

    Only for calls whose one input is such a file: there is no list of what they raise.
    """
    try:
        yield
    except (UsageError, MemoryError):
        raise
    except BaseException as error:
        # A panic of a library in Rust (tokenizers) is no Exception, and its class cannot be imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        if isinstance(error, KeyError):  # its text is the key alone
            text = f"there is no {text}"
        raise UsageError(f"{what}: {text if len(text) <= 200 else text[:200] + '...'}.") from error


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


def require_positive(**values: int) -> None:
    """Raise `UsageError` for the first argument below 1, by its name."""
    for name, value in values.items():
        if value < 1:
            raise UsageError(f"{name} must be at least 1, not {value}.")
