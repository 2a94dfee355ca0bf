"""The table for a terminal and as Markdown."""

from collections.abc import Sequence

from rich.table import Table

from probeprune.report.columns import columns, legend
from probeprune.report.reading import Row
from probeprune.report.summary import is_dense, summarise


def dense_row(rows: Sequence[Row]) -> Row | None:
    """The unpruned model's line, if there is one; the first of several."""
    return next((r for r in rows if is_dense(r)), None)


def ordered(rows: Sequence[Row]) -> list[Row]:
    """Dense first, then by ratio, each ratio best last."""
    return sorted(rows, key=lambda r: (not is_dense(r), r["ratio"], -r["value"]))


def cells(row: Row, dense: Row | None) -> list[str]:
    """One line as text, in the order of its columns."""
    rows = [row] if dense is None or dense is row else [dense, row]
    return [c.cells[-1].plain for c in columns(summarise(rows))]


def table(rows: Sequence[Row], title: str) -> Table:
    """The results for a terminal."""
    summaries = summarise(rows)
    shown, entries = columns(summaries), [e for s in summaries for e in s.entries]
    result = Table(title=title, caption=legend(shown), caption_justify="left", title_justify="left")
    for column in shown:
        result.add_column(column.label, justify="left" if column.key in ("method", "model") else "right")
    last = None
    for i, entry in enumerate(entries):
        if last is not None and (entry.model, entry.ratio) != last:
            result.add_section()
        last = entry.model, entry.ratio
        result.add_row(*(column.cells[i].plain for column in shown))
    return result


def markdown(rows: Sequence[Row], title: str) -> str:
    """The results as a Markdown table, with what the columns mean."""
    shown = columns(summarise(rows))
    lines = [f"**{title}**", "", "| " + " | ".join(c.label for c in shown) + " |"]
    lines.append("|" + "|".join(" --- " if c.key == "method" else " ---: " for c in shown) + "|")
    for row in zip(*(c.cells for c in shown), strict=True):
        lines.append("| " + " | ".join(cell.plain.replace("|", "\\|") for cell in row) + " |")
    return "\n".join([*lines, "", legend(shown), ""])
