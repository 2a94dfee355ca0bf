"""The one error of the project that is the user's to mend."""


class UsageError(ValueError):
    """Bad input: one sentence that says what is wrong and what to do.

    The library raises it, the command line prints its text and exits with code 2.
    """


def first_line(error: BaseException) -> str:
    """What an error of somebody else's says, short enough to stand inside a sentence of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
