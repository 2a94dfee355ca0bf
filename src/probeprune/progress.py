"""The one type for functions that report progress."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with (name of the work, parts done, parts in all)."""


def silent(what: str, done: int, total: int) -> None:
    """Report nothing."""
