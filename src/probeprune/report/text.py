"""The table of results for a terminal, and as Markdown."""

from collections.abc import Sequence

from rich.console import Group
from rich.table import Table

from probeprune.foreign.literal import markdown as escaped
from probeprune.foreign.literal import styled
from probeprune.report.columns import Column, column_notes, columns
from probeprune.report.summary import Entry, summarise
from probeprune.result_lines import Line


def table(lines: Sequence[Line], title: str, width: int = 126) -> Group:
    """The results for a terminal: one table, or one for each section where it would be wider than `width`."""
    summaries = summarise(lines)
    shown, entries = columns(summaries), [e for s in summaries for e in s.entries]
    sections = [shown]
    if _width(shown) > width:
        first = [c for c in shown if c.section == "entry"]
        others = [[c for c in shown if c.section == name] for name in ("perplexity", "accuracy", "cost")]
        sections = [[*first, *other] for other in others if other]
    tables = [_table(section, entries, notes=_width(section) <= width) for section in sections]
    sentences = [*failures(entries), column_notes(shown)]
    return Group(styled(title), *tables, *(styled(s, "dim") for s in sentences))


def _width(shown: Sequence[Column]) -> int:
    return 1 + sum(3 + max(len(text) for text in (c.label, *(cell.plain for cell in c.cells))) for c in shown)


def _table(shown: Sequence[Column], entries: Sequence[Entry], notes: bool) -> Table:
    """One table; `notes` are the spreads of figures, left out where there is no room."""
    made = Table()
    for column in shown:
        justify = "left" if column.key in ("model", "method") else "right"
        made.add_column(styled(column.label), justify=justify)  # type: ignore[arg-type]
    last = None
    for i, entry in enumerate(entries):
        if last is not None and (entry.model, entry.ratio) != last:
            made.add_section()
        last = entry.model, entry.ratio
        cells = [column.cells[i] for column in shown]
        made.add_row(*(styled(cell.plain if notes else cell.text) for cell in cells))
    return made


def markdown(lines: Sequence[Line], title: str) -> str:
    """The results as a Markdown table, with the meaning of its columns."""
    summaries = summarise(lines)
    shown = columns(summaries)
    written = [f"**{escaped(title)}**", "", _row([c.label for c in shown])]
    written.append("|" + "|".join(" --- " if c.key == "method" else " ---: " for c in shown) + "|")
    written += [_row([cell.plain for cell in row]) for row in zip(*(c.cells for c in shown), strict=True)]
    sentences = failures([e for s in summaries for e in s.entries]) + [n for s in summaries for n in s.notes]
    sentences.append(column_notes(shown))
    return "\n".join([*written, *(f"\n{escaped(s)}" for s in sentences), ""])


def _row(cells: Sequence[str]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(map(escaped, cells))} |"


def failures(entries: Sequence[Entry]) -> list[str]:
    """One sentence for each failed measurement."""
    return [
        f"{e.title} failed{' on ' + f.task if f.task else ''}: {f.error}" for e in entries for f in e.failures
    ]
