"""`probeprune report`: a page and figures from the results of a run."""

import json
from pathlib import Path
from typing import Annotated

import typer

from probeprune.cli.groups import Json
from probeprune.cli.terminal import drawn, out, print_line, print_written, warn
from probeprune.errors import UsageError
from probeprune.files import RESULTS


def report(
    run: Annotated[Path, typer.Argument(help="Folder that holds results.jsonl, or that file itself.")],
    page: Annotated[
        Path | None,
        typer.Option("--out", help="HTML page to write.", show_default="report.html beside the results"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write an HTML page with the tables and charts of a run, and figures for papers in a folder beside it.

    The folder is named after the page: report-figures/ for report.html.

    Example: [bold]probeprune report runs/compare --out report.html[/bold]
    """
    from probeprune import report as reporting
    from probeprune.experiment.presets import published
    from probeprune.places import check_file, check_writable

    page = page or (run if run.is_dir() else run.parent) / "report.html"
    figures = page.with_name(f"{page.stem}-figures")
    check_file(page)
    check_writable(figures)
    _check_results_stay(page, run)
    rows, problems = reporting.read_results(run)
    summaries = reporting.summarise(rows)
    warn((*problems, *(note for s in summaries for note in s.notes)))
    title = f"Pruning {' and '.join(s.model for s in summaries)}"
    reporting.write_html(rows, page, title, published=published(), problems=problems)
    files = drawn(lambda: reporting.write_figures(rows, figures))
    if as_json:
        for summary in summaries:
            for record in summary.records():
                print(json.dumps(record))
    else:
        out().print(reporting.table(rows, title))
    print_written([page, *([figures] if files else [])])
    print_line(f"next: open {page} in a browser", "dim")


def _check_results_stay(page: Path, run: Path) -> None:
    """Raise `UsageError` for a page that would take the place of the results."""
    results = run / RESULTS if run.is_dir() else run
    if page.exists() and results.exists() and page.samefile(results):
        raise UsageError(f"{page} holds the results themselves; choose another --out for the page.")
