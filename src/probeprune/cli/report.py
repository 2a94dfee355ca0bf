"""`probeprune report`: a page and figures from the results of a run."""

import json
from pathlib import Path
from typing import Annotated

import typer

from probeprune.cli.common import JSON, err, out, warn
from probeprune.errors import UsageError


def report(
    run: Annotated[Path, typer.Argument(help="A folder that holds results.jsonl, or such a file.")],
    page: Annotated[
        Path | None, typer.Option("--out", help="The page. [default: report.html beside the results]")
    ] = None,
    as_json: JSON = False,
) -> None:
    """Write one HTML page with tables and charts of a run, and its figures for papers in figures/ beside it.

    Example: [bold]probeprune report runs/compare --out report.html[/bold]
    """
    from probeprune import report as reporting
    from probeprune.experiment.presets import published

    rows, problems = reporting.read_results(run)
    summaries = reporting.summarise(rows)
    warn((*problems, *(note for s in summaries for note in s.notes)))
    title = f"Pruning {' and '.join(s.model for s in summaries)}"
    page = page or (run if run.is_dir() else run.parent) / "report.html"
    if page.is_dir() or any(folder.is_file() for folder in page.parents):
        raise UsageError(f"{page} cannot be written, it is a folder or lies in a file; choose another --out.")
    reporting.write_html(rows, page, title, published=published(), problems=problems)
    figures = reporting.write_figures(rows, page.parent / "figures")
    if as_json:
        for summary in summaries:
            for record in summary.records():
                print(json.dumps(record))
    else:
        out().print(reporting.table(rows, title))
    said = f"{page}, {len(figures)} figures in {page.parent / 'figures'}"
    err.print(f"written: {said}", highlight=False, soft_wrap=True, markup=False)
