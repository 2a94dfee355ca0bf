"""One self-contained HTML page: the table, what it says as charts, and who is better than whom.

It loads nothing from anywhere and runs one small script, for sorting and the colour scheme. Knows nothing of
how figures are computed (`summary.py`) or drawn (`pictures.py`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from probeprune.errors import UsageError
from probeprune.report import charts, pictures
from probeprune.report.columns import Column, Published, best, columns, meanings
from probeprune.report.comparing import matrices
from probeprune.report.facts import facts
from probeprune.report.palette import COLOURS
from probeprune.report.reading import Row
from probeprune.report.summary import Entry, Summary, prr, summarise

_PAGE = Path(__file__).parent / "page"


def write_html(
    rows: Sequence[Row],
    path: Path,
    title: str,
    *,
    published: Published | None = None,
    problems: Sequence[str] = (),
) -> None:
    """Write the page.

    Args:
        rows: result lines, from `read_rows` say.
        path: the file; its folder is made.
        title: its head.
        published: figures to show beside ours.
        problems: sentences about lines that could not be used, shown at the end.

    Raises:
        UsageError: no result among the rows.
    """
    results = [r for r in rows if r.get("kind", "result") == "result"]
    if not results:
        raise UsageError("there is no result to make a page of; run `probeprune compare` first.")
    environment = Environment(
        loader=FileSystemLoader(_PAGE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("page.html.j2").render(
        title=title,
        facts=facts(results),
        studies=[_study(s, published) for s in summarise(rows)],
        settings=[{k: v for k, v in r.items() if k != "kind"} for r in rows if r.get("kind") == "settings"],
        problems=problems,
        colours=COLOURS,
        style=Markup((_PAGE / "page.css").read_text(encoding="utf-8")),
        script=Markup((_PAGE / "page.js").read_text(encoding="utf-8")),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def _study(summary: Summary, published: Published | None) -> dict[str, Any]:
    """What the page shows of one model, by the template's names."""
    ratios = {f"{r:.0%}" if r else "": own for r, own in summary.ratios.items()}
    shown = columns([summary], published)
    return {
        "model": summary.model,
        "notes": summary.notes,
        "highlights": _highlights(summary),
        "columns": shown,
        "meanings": meanings(shown),
        "groups": _groups(summary, shown),
        "legend": pictures.legend(summary),
        "by_flops": [f for t in summary.texts if (f := pictures.by_flops(summary, t))],
        "by_time": [f for t in summary.texts if (f := pictures.by_time(summary, t))],
        "tasks": [pictures.task(summary, t) for t in summary.tasks],
        "comparisons": [(r, found) for r, own in ratios.items() if r and (found := matrices(summary, own))],
        "prr": _prr_table(summary),
        "kept": [
            (r, maps)
            for r, own in ratios.items()
            if (maps := [f for e in own if (f := pictures.kept_units(e))])
        ],
        "stages": pictures.stages(summary),
        "stage_names": [("rest", "the model itself"), *pictures.STAGES],
    }


def _groups(summary: Summary, shown: Sequence[Column]) -> list[dict[str, Any]]:
    """The table's rows by ratio: (column, cell, whether it is the ratio's best), and what failed."""
    groups = []
    for ratio, entries in summary.ratios.items():
        numbers = [summary.entries.index(e) for e in entries if e.rows]
        tops = {c.key: best(c, numbers) if ratio else set() for c in shown}
        groups.append(
            {
                "head": f"{ratio:.0%} pruned" if ratio else "not pruned",
                "rows": [[(c, c.cells[i], i in tops[c.key]) for c in shown] for i in numbers],
                "failures": [(e, f) for e in entries for f in e.failures],
            }
        )
    return groups


def _highlights(summary: Summary) -> list[dict[str, Any]]:
    """Dense, and at each ratio the best entry that needs fewer FLOPs than dense, on the first text."""
    found = []
    for text in summary.texts[:1]:
        for ratio, entries in summary.ratios.items():
            known = [e for e in entries if text in e.perplexity and (e.dense if ratio == 0 else _cheaper(e))]
            if known:
                entry = min(known, key=lambda e: e.perplexity[text].value)
                found.append(
                    {
                        "label": entry.label,
                        "ratio": f"{ratio:.0%}" if ratio else "",
                        "glyph": charts.glyph(pictures.series(summary, entry)),
                        "value": f"{entry.perplexity[text].value:.1f}",
                        "said": f"perplexity on {text}" if entry.dense else _said(entry, text),
                    }
                )
    return found


def _cheaper(entry: Entry) -> bool:
    return entry.flops_share is not None and entry.flops_share < 1


def _said(entry: Entry, text: str) -> str:
    factor, speed = entry.over_dense.get(text), entry.prefill
    parts = [
        "" if factor is None else f"{factor.value:.2f} times dense",
        "" if entry.flops_share is None else f"{100 * entry.flops_share:.1f}% of the FLOPs",
        "" if speed is None else f"{speed.value:.2f}x as fast",
    ]
    return ", ".join(filter(None, parts))


def _prr_table(summary: Summary) -> dict[str, Any] | None:
    """PRR of every entry whose time was measured: by text, and by protocol for accuracy."""
    dense = summary.dense
    timed = [e for e in summary.entries if e.prefill and not e.dense]
    if not timed or dense is None:
        return None
    rows = []
    for entry in timed:
        lost = [summary.lost(entry, t) for t in summary.texts]
        for protocol in summary.protocols:
            ours, theirs = entry.mean_accuracy.get(protocol), dense.mean_accuracy.get(protocol)
            lost.append(100 * (theirs.value - ours.value) if ours and theirs else None)
        found = [None if x is None else prr(x, entry.prefill) for x in lost]
        saved = 100 * (1 - 1 / entry.prefill.value) if entry.prefill else 0.0
        rows.append((entry, f"{saved:.1f}%", ["-" if f is None else f"{f:.1f}" for f in found]))
    heads = [f"perplexity, {t}" for t in summary.texts]
    return {"heads": [*heads, *(f"mean accuracy, points, {p}" for p in summary.protocols)], "rows": rows}
