"""Tables, figures and one HTML page, from result lines alone."""

from probeprune.report.columns import Published
from probeprune.report.figures import plot, plot_tasks, plot_time, write_figures
from probeprune.report.html import write_html
from probeprune.report.reading import Row, read_rows
from probeprune.report.summary import paired_factor, summarise
from probeprune.report.text import cells, dense_row, markdown, table

__all__ = [
    "Published",
    "Row",
    "cells",
    "dense_row",
    "markdown",
    "paired_factor",
    "plot",
    "plot_tasks",
    "plot_time",
    "read_rows",
    "summarise",
    "table",
    "write_figures",
    "write_html",
]
