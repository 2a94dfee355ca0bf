"""What `--help` shows of a command: whole paragraphs, and no type where an option takes no value.

Typer breaks the paragraphs of a docstring where the source does, and gives a switch the type `<bool>`, as if
a word had to follow it.
"""

import inspect
from typing import Any

from typer.core import TyperCommand


class Command(TyperCommand):
    """A command of the app."""

    def __init__(self, *names: Any, help: str | None = None, **settings: Any) -> None:
        super().__init__(*names, help=paragraphs(help or ""), **settings)

    def get_params(self, ctx: Any) -> list[Any]:
        """The options, `--help` among them."""
        return without_types_of_switches(super().get_params(ctx))


def paragraphs(text: str) -> str:
    """A docstring with each paragraph on one line, which breaks where the terminal ends."""
    return "\n\n".join(" ".join(one.split()) for one in inspect.cleandoc(text).split("\n\n"))


def without_types_of_switches(options: list[Any]) -> list[Any]:
    """The same options; those that take no value show no type."""
    for option in options:
        if getattr(option, "is_flag", False):
            option.metavar = ""
    return options
