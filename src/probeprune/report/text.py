"""The table for a terminal and as Markdown."""

from collections.abc import Sequence

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from probeprune.report.columns import Column, columns, legend
from probeprune.report.grouping import is_dense
from probeprune.report.reading import Row
from probeprune.report.summary import Entry, summarise


def dense_row(rows: Sequence[Row]) -> Row | None:
    """The unpruned model's line, if there is one; the first of several."""
    return next((r for r in rows if is_dense(r)), None)


def cells(row: Row, dense: Row | None) -> list[str]:
    """One line as text, in the order of its columns."""
    rows = [row] if dense is None or dense is row else [dense, row]
    return [c.cells[-1].plain for c in columns(summarise(rows))]


def table(rows: Sequence[Row], title: str, width: int = 126) -> Group:
    """The results for a terminal: one table, or one for each part where they are wider than `width`."""
    summaries = summarise(rows)
    shown, entries = columns(summaries), [e for s in summaries for e in s.entries]
    parts = [shown]
    if _width(shown) > width:
        first = [c for c in shown if c.part == "entry"]
        others = [[c for c in shown if c.part == part] for part in ("perplexity", "accuracy", "cost")]
        parts = [[*first, *own] for own in others if own]
    said = [*failures(entries), legend(shown)]
    tables = [_table(part, entries, notes=_width(part) <= width) for part in parts]
    return Group(escape(title), *tables, *(f"[dim]{escape(s)}[/dim]" for s in said))


def _width(shown: Sequence[Column]) -> int:
    return 1 + sum(3 + max(len(text) for text in (c.label, *(cell.plain for cell in c.cells))) for c in shown)


def _table(shown: Sequence[Column], entries: Sequence[Entry], notes: bool) -> Table:
    """`notes` are how sure a figure is: left out where there is no room for it."""
    result = Table()
    for column in shown:
        justify = "left" if column.key in ("model", "method") else "right"
        result.add_column(column.label, justify=justify)  # type: ignore[arg-type]
    last = None
    for i, entry in enumerate(entries):
        if last is not None and (entry.model, entry.ratio) != last:
            result.add_section()
        last = entry.model, entry.ratio
        cells = [column.cells[i] for column in shown]
        result.add_row(*(escape(cell.plain if notes else cell.text) for cell in cells))
    return result


def markdown(rows: Sequence[Row], title: str) -> str:
    """The results as a Markdown table, with what the columns mean."""
    summaries = summarise(rows)
    shown = columns(summaries)
    lines = [f"**{title}**", "", "| " + " | ".join(c.label for c in shown) + " |"]
    lines.append("|" + "|".join(" --- " if c.key == "method" else " ---: " for c in shown) + "|")
    for row in zip(*(c.cells for c in shown), strict=True):
        lines.append("| " + " | ".join(cell.plain.replace("|", "\\|") for cell in row) + " |")
    said = failures([e for s in summaries for e in s.entries]) + [n for s in summaries for n in s.notes]
    return "\n".join([*lines, "", *(f"{sentence}\n" for sentence in said), legend(shown), ""])


def failures(entries: Sequence[Entry]) -> list[str]:
    """What could not be measured, a sentence each."""
    return [
        f"{e.name_and_ratio} failed{' on ' + f.task if f.task else ''}: {f.error}"
        for e in entries
        for f in e.failures
    ]
