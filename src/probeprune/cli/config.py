"""Options that are repeated, from `probeprune.toml` or the file of `--config`.

    dtype = "float32"            # of every command that has the option

    [compare]                    # of this command alone
    ratios = [0.2, 0.4]

Keys are options without their dashes. What is typed comes first, then the command's section, then the keys
above all sections. Paths are those that the options take: relative to the working directory.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from probeprune.errors import UsageError, first_line, unknown
from probeprune.foreign.reading import read_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

NAME = "probeprune.toml"
"""The file that is read from the working directory where `--config` names none."""

Options = Mapping[str, Mapping[str, tuple[str, bool]]]
"""For each command, its options by the names that keys have, such as `calibration-windows`: the name of the
parameter, and whether it is a switch."""


@dataclass(frozen=True)
class Setting:
    """One value of a file, as a command takes it.

    Attributes:
        option: as it would be typed, without dashes.
        value: as the command line reads it: text, a number or a switch.
        where: file and line.
    """

    option: str
    value: Any
    where: str


def read_config(file: Path | None, options: Options) -> dict[str, dict[str, Setting]]:
    """For every command, its settings by parameter; none where no file is given and none lies here.

    Raises `UsageError`, with the line, for a file that is missing or no TOML, for a key that is no option,
    and for a value that no option takes.
    """
    path = Path(NAME) if file is None else file
    if not path.is_file():
        if file is None:
            return {}
        raise UsageError(f"--config {str(path)!r} is no file; give a TOML file of options.")
    text = read_text(path)
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path} is no TOML file: {first_line(error)}.") from error
    lines = _lines(text)
    found: dict[str, dict[str, Setting]] = {command: {} for command in options}
    everywhere = {option for known in options.values() for option in known}
    sections = {key: value for key, value in content.items() if isinstance(value, dict)}
    for key, value in content.items():
        if key in sections:
            continue
        where = _where(path, lines, "", key)
        option = _known(key, everywhere, f"{where}: ", "option", others="[sections] of commands")
        for command, known in options.items():
            # `json` is a switch of most commands, and a file of `eval`.
            if option in known and (known[option][1] or not isinstance(value, bool)):
                found[command][known[option][0]] = Setting(option, _value(value, key, where), where)
        if not any(option in known and known[option][0] in found[c] for c, known in options.items()):
            raise _no_switch(where, key)
    for command, values in sections.items():
        _known(command, options, f"{_where(path, lines, command, '')}: ", "command")
        for key, value in values.items():
            where = _where(path, lines, command, key)
            option = _known(key, options[command], f"{where}: ", f"option of {command}")
            parameter, switch = options[command][option]
            if isinstance(value, bool) and not switch:
                raise _no_switch(where, key)
            found[command][parameter] = Setting(option, _value(value, key, where), where)
    return found


def _no_switch(where: str, key: str) -> UsageError:
    return UsageError(f"{where}: {key} takes a value, not true or false.")


def _known(key: str, names: Collection[str], where: str, what: str, others: str = "") -> str:
    name = key.replace("_", "-")
    if name not in names:
        raise UsageError(where + unknown(what, key, names, others))
    return name


def _value(value: Any, key: str, where: str) -> Any:
    """A list becomes the text that a list is on the command line."""
    if isinstance(value, list) and all(isinstance(entry, str | int | float) for entry in value):
        return ",".join(map(str, value))
    if isinstance(value, str | int | float):
        return value
    raise UsageError(f"{where}: {key} must be text, a number, true or false, or a list of texts or numbers.")


def _lines(text: str) -> dict[tuple[str, str], int]:
    """The line of every section, with an empty key, and of every key in one; the parser tells none."""
    found: dict[tuple[str, str], int] = {}
    section = ""
    for number, line in enumerate(text.splitlines(), start=1):
        if header := re.match(r"\s*\[\s*[\"']?([\w-]+)[\"']?\s*\]", line):
            section = header[1]
            found.setdefault((section, ""), number)
        elif key := re.match(r"\s*[\"']?([\w-]+)[\"']?\s*=", line):
            found.setdefault((section, key[1]), number)
    return found


def _where(path: Path, lines: Mapping[tuple[str, str], int], section: str, key: str) -> str:
    line = lines.get((section, key))
    return f"{path}, line {line}" if line else str(path)
