"""How long work says where it is."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, parts done, parts in all)."""


def silent(what: str, done: int, total: int) -> None:
    """The progress of callers who do not want to know."""
