"""Tables and plots, from result lines alone."""

import statistics
from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from typing import Any

from rich.table import Table

Row = dict[str, Any]

COLUMNS = (
    ("method", "left"),
    ("ratio", "right"),
    ("pruned", "right"),
    ("perplexity", "right"),
    ("x dense", "right"),
    ("FLOPs", "right"),
    ("probe", "right"),
    ("speed-up", "right"),
    ("memory", "right"),
)

LEGEND = (
    "ratio: asked for; pruned: share of all blocks' parameters really left out; perplexity: with standard "
    "error over windows; x dense: perplexity over the dense model's, with the standard error of the paired "
    "difference; FLOPs: of the decoder with the probe, counted, over dense; probe: its part of the dense "
    "blocks' FLOPs; speed-up: measured in this run, decoder tokens per second over dense; memory: peak."
)


def dense_row(rows: Sequence[Row]) -> Row | None:
    """The unpruned model's line, if there is one."""
    return next((r for r in rows if r["method"]["when"] == "never"), None)


def cells(row: Row, dense: Row | None) -> list[str]:
    """One line as text, in the order of `COLUMNS`."""
    pruned = row["method"]["when"] != "never"
    factor = flops = speed = "-"
    if dense is not None:
        flops = f"{row['flops_per_token'] / dense['flops_per_token']:.1%}"
        if pruned:
            ratio, error = paired_factor(row, dense)
            factor = f"{ratio:.3f} ± {error:.3f}"
            speed = f"{row['tokens_per_second'] / dense['tokens_per_second']:.2f}x"
    return [
        row["name"],
        f"{row['ratio']:.0%}" if pruned else "-",
        f"{row['removed_share']:.1%}" if pruned else "-",
        f"{row['value']:.2f} ± {row['standard_error']:.2f}",
        factor,
        flops,
        f"{row['probe_flops_share']:.1%}" if row["probe_flops_share"] else "-",
        speed,
        f"{row['peak_memory'] / 2**30:.2f} GiB",
    ]


def paired_factor(row: Row, other: Row) -> tuple[float, float]:
    """Perplexity over another's on the same windows, and its standard error.

    Windows differ far more from each other than methods do on one window, so the error is that of the mean
    difference of losses, window by window (delta method).
    """
    factor = row["value"] / other["value"]
    differences = [a - b for a, b in zip(row["losses"], other["losses"], strict=True)]
    if len(differences) < 2:
        return factor, float("nan")
    return factor, factor * statistics.stdev(differences) / sqrt(len(differences))


def table(rows: Sequence[Row], title: str) -> Table:
    """The results for a terminal."""
    result = Table(title=title, caption=LEGEND, caption_justify="left", title_justify="left")
    for name, justify in COLUMNS:
        result.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    dense = dense_row(rows)
    last = None
    for row in ordered(rows):
        if last is not None and row["ratio"] != last:
            result.add_section()
        last = row["ratio"]
        result.add_row(*cells(row, dense))
    return result


def markdown(rows: Sequence[Row], title: str) -> str:
    """The results as a Markdown table, with what the columns mean."""
    lines = [f"**{title}**", "", "| " + " | ".join(name for name, _ in COLUMNS) + " |"]
    lines.append("|" + "|".join(" --- " if j == "left" else " ---: " for _, j in COLUMNS) + "|")
    dense = dense_row(rows)
    lines += ["| " + " | ".join(cells(row, dense)) + " |" for row in ordered(rows)]
    return "\n".join([*lines, "", LEGEND, ""])


def ordered(rows: Sequence[Row]) -> list[Row]:
    """Dense first, then by ratio, each ratio best last."""
    return sorted(rows, key=lambda r: (r["method"]["when"] != "never", r["ratio"], -r["value"]))


def plot(rows: Sequence[Row], title: str, path: Path) -> list[Path]:
    """Perplexity against achieved FLOPs, one line a method, as PNG and SVG beside `path`.

    Returns the files written; none where there is nothing to compare with the dense model.
    """
    from matplotlib.figure import Figure

    dense = dense_row(rows)
    if dense is None or len(rows) < 2:
        return []
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    # Okabe and Ito's colours: told apart by colour-blind readers too.
    colours = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
    for i, name in enumerate(dict.fromkeys(r["name"] for r in rows if r is not dense)):
        own = sorted((r for r in rows if r["name"] == name), key=lambda r: r["ratio"])
        points = [dense, *own]
        axes.errorbar(
            [100 * r["flops_per_token"] / dense["flops_per_token"] for r in points],
            [r["value"] for r in points],
            yerr=[0.0, *(paired_factor(r, dense)[1] * dense["value"] for r in own)],
            marker="osD^vP*"[i % 7],
            color=colours[i % len(colours)],
            capsize=3,
            label=name,
        )
    axes.axhline(dense["value"], color="grey", linewidth=0.8, linestyle=":", label="dense")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.yaxis.set_minor_formatter("{x:.0f}")
    axes.set_xlabel("decoder FLOPs, % of dense (probe included)")
    axes.set_ylabel(f"{dense['task']} perplexity (log scale)")
    axes.set_title(title, fontsize=10)
    axes.invert_xaxis()
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    written = [path.with_suffix(".png"), path.with_suffix(".svg")]
    for file in written:
        figure.savefig(file, dpi=150)
    return written
