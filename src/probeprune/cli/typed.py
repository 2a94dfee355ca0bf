"""What was typed wrongly, as one sentence: Typer's own errors in the form of all others.

Typer reads what is typed before a command starts, and prints a box of its own for an unknown option or a word
in place of a number. Here that is a `UsageError`, which `cli.run` prints.
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from probeprune.cli.config import Setting, read_config
from probeprune.cli.usage import without_types_of_switches
from probeprune.errors import BadValue, UsageError
from probeprune.ranges import plain

logger = logging.getLogger(__name__)

_MISUSE: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "UsageError")
"""Click's class of that name; Typer has it from Click or, since it brings its own, inside itself."""


class Commands(TyperGroup):
    """The commands of an app. Calling it exits with the command's code, or raises `UsageError`."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **settings: Any) -> Any:
        """Read what was typed (None: on the command line) and run its command.

        Raises `UsageError` for what cannot be read.
        """
        words = self._words = list(sys.argv[1:] if args is None else args)
        self._settings: dict[str, dict[str, Setting]] = {}
        try:
            code = super().main(words, *rest, **{**settings, "standalone_mode": False})
        except _MISUSE as error:
            if type(error).__name__ == "NoArgsIsHelpError":  # the help was printed
                sys.exit(2)
            _check_number(error, words)
            raise UsageError(self._where(error) + _sentence(error)) from error
        except BadValue as error:
            command = next((self.commands[word] for word in words if word in self.commands), None)
            option = next((p for p in command.params if p.name == error.name), None) if command else None
            where = self._origin(command.name, option) if command and option else ""
            if not where:
                raise
            raise UsageError(where + str(error)) from error
        sys.exit(code if isinstance(code, int) else 0)

    def defaults(self, config: Path | None, command: str) -> dict[str, dict[str, Any]]:
        """The values of options from a config file, by command and parameter, as Click's `default_map`.

        Logs where those of `command` come from. Raises `UsageError` for a file that cannot be used.
        """
        options = {
            name: {
                opt[2:]: (p.name, bool(getattr(p, "is_flag", False)))
                for p in known.params
                for opt in p.opts
                if opt.startswith("--") and p.name
            }
            for name, known in self.commands.items()
        }
        self._settings = read_config(config, options)
        of_command = {p.name: p for p in self.commands[command].params} if command in self.commands else {}
        for name, setting in self._settings.get(command, {}).items():
            if not self._typed(of_command[name]):
                logger.info("%s: --%s %s", setting.where, setting.option, setting.value)
        return {
            name: {parameter: setting.value for parameter, setting in found.items()}
            for name, found in self._settings.items()
        }

    def get_params(self, ctx: Any) -> list[Any]:
        """The options of all commands, `--help` among them."""
        return without_types_of_switches(super().get_params(ctx))

    def _typed(self, option: Any) -> bool:
        """Whether an option was given on the command line, in either of its forms."""
        forms = {*option.opts, *option.secondary_opts}
        return any(word.partition("=")[0] in forms for word in self._words)

    def _where(self, misuse: Any) -> str:
        """As `_origin`, for an error of Click's."""
        option = getattr(misuse, "param", None)
        return "" if option is None or misuse.ctx is None else self._origin(misuse.ctx.info_name, option)

    def _origin(self, command: str | None, option: Any) -> str:
        """The line of the config file that gave an option its value, to begin a sentence with."""
        setting = self._settings.get(command or "", {}).get(option.name)
        return "" if setting is None or self._typed(option) else f"{setting.where}: "


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
    problem = f"{problem[:1].lower()}{problem[1:]}"
    option = getattr(error, "option_name", None)
    if command != "probeprune" and any(option in p.opts for p in error.ctx.parent.command.params):
        return f"{option} stands in front of the command, as in `probeprune {option} ...`."
    stop = "" if problem.endswith("?") else ";"  # typer ends with a question where it knows a near name
    return f"{problem}{stop} `{command} --help` shows what there is."
