"""Text that is not ours, shown as it is and never obeyed: on a terminal, in Markdown and in Python code.

Names, paths, prompts, generated tokens, other libraries' errors and the files of others may hold markup,
escape sequences or half a character. Everything that prints or writes documents goes through these functions.
"""

import re
import unicodedata
from typing import Any

from rich.console import Console
from rich.text import Text

_UNSEEN = frozenset(
    chr(code)
    for code in range(0x10000)
    if unicodedata.category(chr(code)) in ("Cc", "Cs", "Zl", "Zp")
    or unicodedata.bidirectional(chr(code)) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
    or code in (0x061C, 0x200E, 0x200F)  # marks that turn the direction of what follows
)
"""Control characters (C0, DEL, C1), line separators, half characters, and all that change the direction."""

_CODES = {ord(c): c.encode("unicode_escape").decode() for c in _UNSEEN}
_CODES_IN_LINES = {code: shown for code, shown in _CODES.items() if code not in (0x09, 0x0A)}

_MARKDOWN = re.compile(
    r"""[\\`*\[\]<>|~$&\#]          # emphasis, code, links, HTML, cells, entities, headings
    |(?<![^\W_])_ | _(?![^\W_])     # underscores, but for those inside a word
    |:(?=//) | (?<=www)\.           # addresses that are made links unasked
    |^[-+=]                         # lists and rules""",
    re.VERBOSE,
)
_NUMBER = re.compile(r"^(\d{1,9})([.)])(?=\s|$)")


def visible(text: str, *, lines: bool = False) -> str:
    r"""The text with all that a terminal would obey written as Python does: `\x1b[31m`, `\u202e`, `\ud83d`.

    Args:
        text: any string, lone surrogates too; the result can be encoded as UTF-8.
        lines: keep line feeds and tabs, for a text of several lines.
    """
    return text.translate(_CODES_IN_LINES if lines else _CODES)


def styled(text: str, style: str = "") -> Text:
    """One line for a rich console, literally: no markup, no emoji names, control characters visible."""
    return Text(visible(text), style)


def markdown(text: str) -> str:
    """The text as one line of Markdown that reads as the text does, in a paragraph, a heading or a cell."""
    return _NUMBER.sub(r"\1\\\2", _MARKDOWN.sub(r"\\\g<0>", visible(text.strip())))


def python_string(text: str) -> str:
    """The text as a Python string literal in one line."""
    escaped = text.replace("\\", r"\\").replace('"', r"\"")
    return f'"{visible(escaped)}"'


class LiteralConsole(Console):
    """A console that prints every string literally; what is styled is a `Text`, made by our own code."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, markup=False, emoji=False, highlight=False)

    def render_str(self, text: str, *args: Any, **others: Any) -> Text:
        """The string as styled text, whatever it holds. Rich calls this for all strings it is given."""
        return super().render_str(
            visible(text, lines=True), *args, **{**others, "markup": False, "emoji": False}
        )
