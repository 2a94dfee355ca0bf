"""The one error of the project that is the user's to mend."""

from difflib import get_close_matches


class UsageError(ValueError):
    """Bad input: one sentence that says what is wrong and what to do.

    The library raises it, the command line prints its text and exits with code 2.
    """


def first_line(error: BaseException) -> str:
    """What an error of somebody else's says, short enough to stand inside a sentence of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def unknown(what: str, given: str, known: object) -> str:
    """One sentence for an unknown name, with the nearest known one and all of them."""
    names = sorted(str(k) for k in known)  # type: ignore[attr-defined]
    near = get_close_matches(str(given), names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {what} {given!r}; {hint}Known: {', '.join(names)}."


def require_positive(**values: int) -> None:
    """Raise `UsageError` for the first argument, by name, that is below 1."""
    for name, value in values.items():
        if value < 1:
            raise UsageError(f"{name} must be at least 1, not {value}.")
