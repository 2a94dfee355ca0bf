"""Progress reports of long-running work."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with (name of the work, parts done, parts in total)."""


def silent(what: str, done: int, total: int) -> None:
    """Report nothing."""
