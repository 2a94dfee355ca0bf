"""What was typed wrongly, as one sentence: Typer's own errors in the form of all others.

Typer reads what is typed before a command starts, and prints a box of its own for an unknown option or a word
in place of a number. Here that is a `UsageError`, which `cli.run` prints.
"""

import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from probeprune.errors import UsageError
from probeprune.ranges import plain

_MISUSE: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "UsageError")
"""Click's class of that name; Typer has it from Click or, since it brings its own, inside itself."""


class Commands(TyperGroup):
    """The commands of an app. Calling it exits with the command's code, or raises `UsageError`."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **settings: Any) -> Any:
        """Read what was typed (None: on the command line) and run its command.

        Raises `UsageError` for what cannot be read.
        """
        words = list(sys.argv[1:] if args is None else args)
        try:
            code = super().main(words, *rest, **{**settings, "standalone_mode": False})
        except _MISUSE as error:
            if type(error).__name__ == "NoArgsIsHelpError":  # the help was printed
                sys.exit(2)
            _check_number(error, words)
            raise UsageError(_sentence(error)) from error
        sys.exit(code if isinstance(code, int) else 0)


def _check_number(error: Any, words: list[str]) -> None:
    """Raise `BadValue`, as for any number out of range, if an option with a range was given a word."""
    option: Any = getattr(error, "param", None)
    ranges = getattr(error.cmd and error.cmd.callback, "ranges", {})
    if option is None or option.name not in ranges:
        return
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name in option.opts:
            plain(option.name, value if equals else following, name, ranges[option.name])


def _sentence(error: Any) -> str:
    """Click's own words for what is wrong, and where to look."""
    problem = " ".join(error.format_message().split()).rstrip(".")
    command = "probeprune"
    if error.ctx is not None and error.ctx.parent is not None:
        command = f"{command} {error.ctx.info_name}"
    return f"{problem[:1].lower()}{problem[1:]}; `{command} --help` shows what there is."
