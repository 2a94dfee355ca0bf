"""Tables, plots and one HTML page, from result lines alone."""

from probeprune.report.columns import Published
from probeprune.report.estimates import paired_factor
from probeprune.report.html import write_html
from probeprune.report.paper_plots import plot, write_figures
from probeprune.report.reading import read_results
from probeprune.report.summary import summarise
from probeprune.report.text import markdown, table

__all__ = [
    "Published",
    "markdown",
    "paired_factor",
    "plot",
    "read_results",
    "summarise",
    "table",
    "write_figures",
    "write_html",
]
