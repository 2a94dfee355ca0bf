"""`probeprune report`: a page and figures from the results of a run."""

import json
from pathlib import Path
from typing import Annotated

import typer

from probeprune.cli.groups import Json
from probeprune.cli.terminal import out, print_line, warn


def report(
    run: Annotated[Path, typer.Argument(help="Folder that holds results.jsonl, or that file itself.")],
    page: Annotated[
        Path | None,
        typer.Option("--out", help="HTML page to write.", show_default="report.html beside the results"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write an HTML page with the tables and charts of a run, and figures for papers in figures/ beside it.

    Example: [bold]probeprune report runs/compare --out report.html[/bold]
    """
    from probeprune import report as reporting
    from probeprune.experiment.presets import published
    from probeprune.places import check_file, check_writable

    page = page or (run if run.is_dir() else run.parent) / "report.html"
    check_file(page)
    check_writable(page.parent / "figures")
    rows, problems = reporting.read_results(run)
    summaries = reporting.summarise(rows)
    warn((*problems, *(note for s in summaries for note in s.notes)))
    title = f"Pruning {' and '.join(s.model for s in summaries)}"
    reporting.write_html(rows, page, title, published=published(), problems=problems)
    figures = reporting.write_figures(rows, page.parent / "figures")
    if as_json:
        for summary in summaries:
            for record in summary.records():
                print(json.dumps(record))
    else:
        out().print(reporting.table(rows, title))
    print_line(f"written: {page}, {len(figures)} figures in {page.parent / 'figures'}")
