"""One self-contained HTML page: the table of results, charts of them, and paired comparisons.

It loads nothing from elsewhere and runs one small script, for sorting and the colour scheme. Knows nothing of
how figures are computed (`summary.py`) or drawn (`page_plots.py`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from probeprune.errors import UsageError
from probeprune.files import write_text
from probeprune.foreign.literal import visible
from probeprune.report import page_plots, svg_charts
from probeprune.report.columns import Column, Published, best, columns, meanings
from probeprune.report.comparing import MOST, matrices
from probeprune.report.estimates import prr
from probeprune.report.facts import facts
from probeprune.report.palette import COLOURS, style
from probeprune.report.plot_data import FLOPS, TIME, ratio_label
from probeprune.report.summary import Entry, Summary, summarise
from probeprune.result_lines import Line
from probeprune.stages import MODEL, STAGES

_PAGE = Path(__file__).parent / "page"


def write_html(
    lines: Sequence[Line],
    path: Path,
    title: str,
    *,
    published: Published | None = None,
    problems: Sequence[str] = (),
) -> None:
    """Write the page.

    Args:
        lines: result lines, for example from `read_results`.
        path: the file; its folder is made. A file that is there stays until the new one is complete.
        title: the page's heading.
        published: figures to show beside the measured ones.
        problems: sentences about lines that could not be used, shown at the end.

    Raises:
        UsageError: no result among the lines.
    """
    results = [line for line in lines if line["kind"] == "result"]
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
        studies=[_study(summary, published) for summary in summarise(lines)],
        problems=problems,
        heat_levels=svg_charts.LEVELS,
        style=Markup(style_sheet()),
        script=Markup((_PAGE / "page.js").read_text(encoding="utf-8")),
    )
    write_text(path, visible(page, lines=True))


def style_sheet() -> str:
    """The page's CSS: `page.css`, and the colours of methods, stages and heat maps from their one source."""
    rules = [(_PAGE / "page.css").read_text(encoding="utf-8")]
    for series in range(len(COLOURS)):
        drawn = style(series)
        dashes = " ".join(map(str, drawn.dashes)) or "none"
        rules.append(f".s{series} {{ --c: light-dark({drawn.light}, {drawn.dark}); --dashes: {dashes}; }}")
    for stage in (MODEL, *STAGES):
        colour = f"light-dark({stage.light}, {stage.dark})"
        rules.append(f".{stage.name} {{ fill: {colour}; background: {colour}; }}")
    for level in range(1, svg_charts.LEVELS + 1):
        rules.append(f".f{level} {{ fill: var(--heat); fill-opacity: {level / svg_charts.LEVELS:g}; }}")
    return "\n".join(rules)


def _study(summary: Summary, published: Published | None) -> dict[str, Any]:
    """The part of the page about one model, by the names that the template uses."""
    pruned = {f"{ratio:.0%}": entries for ratio, entries in summary.ratios.items() if ratio}
    shown = columns([summary], published)
    quality = {
        axis: [page_plots.quality_plot(summary, t, axis) for t in summary.texts] for axis in (FLOPS, TIME)
    }
    units = [(r, [page_plots.units_map(e) for e in entries]) for r, entries in pruned.items()]
    return {
        "model": summary.model,
        "notes": summary.notes,
        "highlights": _highlights(summary),
        "columns": shown,
        "meanings": meanings(shown),
        "groups": _groups(summary, shown),
        "legend": page_plots.series_legend(summary),
        "by_flops": list(filter(None, quality[FLOPS])),
        "by_time": list(filter(None, quality[TIME])),
        "tasks": list(filter(None, (page_plots.task_plot(summary, task) for task in summary.tasks))),
        "most_compared": MOST if any(len(entries) > MOST for entries in pruned.values()) else None,
        "comparisons": [(r, made) for r, entries in pruned.items() if (made := matrices(summary, entries))],
        "prr": _prr_table(summary),
        "units": [(ratio, maps) for ratio, all_maps in units if (maps := list(filter(None, all_maps)))],
        "stages": page_plots.stages_plot(summary),
        "stage_names": [(stage.name, stage.label) for stage in (MODEL, *STAGES)],
    }


def _groups(summary: Summary, shown: Sequence[Column]) -> list[dict[str, Any]]:
    """The table's rows by ratio, cells as (column, cell, whether it is the ratio's best), and failures."""
    groups = []
    for ratio, entries in summary.ratios.items():
        indices = [summary.entries.index(e) for e in entries if e.lines]
        winners = {c.key: best(c, indices) if ratio else set() for c in shown}
        groups.append(
            {
                "heading": ratio_label(ratio),
                "rows": [[(c, c.cells[i], i in winners[c.key]) for c in shown] for i in indices],
                "failures": [(e, failure) for e in entries for failure in e.failures],
            }
        )
    return groups


def _highlights(summary: Summary) -> list[dict[str, Any]]:
    """On the first text: dense, and at each ratio the best entry that needs fewer FLOPs than dense."""
    highlights = []
    for text in summary.texts[:1]:
        for ratio, entries in summary.ratios.items():
            measured = [e for e in entries if text in e.quality.perplexity]
            candidates = [e for e in measured if (_is_cheaper(e) if ratio else e.dense)]
            if candidates:
                entry = min(candidates, key=lambda e: e.quality.perplexity[text].value)
                highlights.append(
                    {
                        "label": entry.label,
                        "ratio": f"{ratio:.0%}" if ratio else "",
                        "glyph": svg_charts.glyph(summary.series(entry)),
                        "value": f"{entry.quality.perplexity[text].value:.1f}",
                        "words": f"perplexity on {text}" if entry.dense else _beside_dense(entry, text),
                    }
                )
    return highlights


def _is_cheaper(entry: Entry) -> bool:
    return entry.cost.flops_share is not None and entry.cost.flops_share < 1


def _beside_dense(entry: Entry, text: str) -> str:
    """Quality and cost of an entry in a few words."""
    factor, share, speed = entry.quality.over_dense.get(text), entry.cost.flops_share, entry.cost.prefill
    parts = [
        "" if factor is None else f"{factor.value:.2f} times dense",
        "" if share is None else f"{100 * share:.1f}% of the FLOPs",
        "" if speed is None or not speed.clear else f"{speed.value:.2f}x as fast",
    ]
    return ", ".join(filter(None, parts))


def _prr_table(summary: Summary) -> dict[str, Any] | None:
    """PRR of every entry whose time was measured: by text, and by protocol for accuracy."""
    dense = summary.dense
    timed = [e for e in summary.entries if e.cost.prefill and not e.dense]
    if not timed or dense is None:
        return None
    rows = []
    for entry in timed:
        lost = [summary.perplexity_lost(entry, text) for text in summary.texts]
        for protocol in summary.protocols:
            ours, theirs = (e.quality.mean_accuracy.get(protocol) for e in (entry, dense))
            lost.append(100 * (theirs.value - ours.value) if ours and theirs else None)
        ratios = [None if value is None else prr(value, entry.cost.prefill) for value in lost]
        saved = 100 * (1 - 1 / entry.cost.prefill.value) if entry.cost.prefill else 0.0
        rows.append((entry, f"{saved:.1f}%", ["-" if r is None else f"{r:.1f}" for r in ratios]))
    texts = [f"perplexity, {text}" for text in summary.texts]
    return {"headers": [*texts, *(f"mean accuracy, points, {p}" for p in summary.protocols)], "rows": rows}
