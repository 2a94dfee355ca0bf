"""The exception for mistakes that the user can fix, and the sentences it carries."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from reprlib import Repr


class UsageError(ValueError):
    """Bad input. Its text is one sentence that says what is wrong and what to do.

    The library raises it; the command line prints the text and exits with code 2.
    """


class Notice(UserWarning):
    """What was done otherwise than expected, in one sentence; the command line prints it."""


class BadValue(UsageError):
    """A value that a parameter or field cannot have.

    Attributes:
        name: the parameter or field.
    """

    def __init__(self, name: str, sentence: str) -> None:
        super().__init__(sentence)
        self.name = name


_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = 100
_SHORT.maxlong = 40


def quoted(value: object) -> str:
    """The value as Python writes it, cut to a length that fits into a sentence."""
    if isinstance(value, int) and value.bit_length() > 128:  # Python writes no integer of thousands of digits
        return f"an integer of {value.bit_length()} bits"
    return _SHORT.repr(value)


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
    """The message for an unknown name: the nearest known name, or those it begins, then all.

    Args:
        what: the kind of name, such as `method`.
        given: the unknown name.
        known: all names of that kind.
        others: what else is accepted, to end the list with.
    """
    names = sorted(map(str, known))
    if not names and not others:
        return f"unknown {what} {quoted(given)}; there is none to give here."
    # In lower case too: `SmolLM2` is near `smollm2`.
    word = str(given)
    near = get_close_matches(word, names, n=1) or get_close_matches(word.lower(), names, n=1)
    if not near and word:  # `best` begins two names
        near = [name for name in names if name.startswith(word.lower()) and "+" not in name]
    hint = f"did you mean {' or '.join(map(repr, near))}? Known:" if near else "known:"
    return f"unknown {what} {quoted(given)}; {hint} {', '.join([*names, others] if others else names)}."
