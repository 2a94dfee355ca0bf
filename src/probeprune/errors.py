"""The one error of the project that is the user's to mend."""


class UsageError(ValueError):
    """Bad input: one sentence that says what is wrong and what to do.

    The library raises it, the command line prints its text and exits with code 2.
    """
