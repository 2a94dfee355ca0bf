"""Figures for papers: PNG and SVG by matplotlib, from result lines alone."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from probeprune.errors import UsageError
from probeprune.report.palette import COLOURS, MATPLOTLIB_MARKS
from probeprune.report.reading import Row
from probeprune.report.summary import Entry, Summary, summarise

Cost = Callable[[Entry], tuple[float, float, float] | None]
"""A cost in percent of dense, and its range."""

_FLOPS = "decoder FLOPs, % of dense (probe included)"
_TIME = "measured prefill time, % of dense"


def plot(rows: Sequence[Row], title: str, path: Path, text: str | None = None) -> list[Path]:
    """Perplexity against achieved FLOPs, one line a method, as PNG and SVG beside `path`.

    Returns the files written; none where there is nothing to compare with the dense model.

    Args:
        rows: lines of one model.
        title: above the figure.
        path: the file without its ending.
        text: what perplexity is of; the first text measured on when left out.

    Raises:
        UsageError: lines of more than one model, number type or device.
    """
    return _quality(_only(rows), title, path, text, _flops, _FLOPS)


def plot_time(rows: Sequence[Row], title: str, path: Path, text: str | None = None) -> list[Path]:
    """Perplexity against measured prefill time, with the range of the rounds; otherwise as `plot`."""
    return _quality(_only(rows), title, path, text, _time, _TIME)


def plot_tasks(rows: Sequence[Row], title: str, path: Path) -> list[Path]:
    """Accuracy task by task, a panel a ratio; dense as a line across its bars. Otherwise as `plot`."""
    return _tasks(_only(rows), title, path)


def _tasks(summary: Summary, title: str, path: Path) -> list[Path]:
    from matplotlib.figure import Figure

    panels = {r: [e for e in own if not e.dense and e.accuracy] for r, own in summary.ratios.items()}
    panels = {r: own for r, own in panels.items() if own}
    if not panels:
        return []
    figure = Figure(figsize=(1.5 + 1.35 * len(summary.tasks), 0.6 + 2.5 * len(panels)), layout="constrained")
    figure.suptitle(_plain(title), fontsize=10)
    for axes, (ratio, entries) in zip(
        figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels.items(), strict=True
    ):
        wide = 0.8 / len(entries)
        for i, entry in enumerate(sorted(entries, key=lambda e: summary.labels.index(e.label))):
            series = summary.labels.index(entry.label)
            known = [(x, entry.accuracy[t]) for x, t in enumerate(summary.tasks) if t in entry.accuracy]
            axes.bar(
                [x - 0.4 + (i + 0.5) * wide for x, _ in known],
                [100 * a.value for _, a in known],
                0.9 * wide,
                yerr=[100 * (a.spread or 0.0) for _, a in known],
                color=COLOURS[series % len(COLOURS)][0],
                error_kw={"linewidth": 0.8},
                label=_plain(entry.label),
            )
        for x, task in enumerate(summary.tasks):
            if summary.dense is not None and task in summary.dense.accuracy:
                value = 100 * summary.dense.accuracy[task].value
                axes.hlines(value, x - 0.45, x + 0.45, color="black", linewidth=0.9, linestyle=":")
        axes.set_xticks(range(len(summary.tasks)), list(map(_plain, summary.tasks)), fontsize=8)
        axes.set_ylabel(f"accuracy at {ratio:.0%}, %" if ratio else "accuracy, not pruned, %")
        axes.grid(axis="y", alpha=0.25)
        axes.set_axisbelow(True)
        axes.legend(
            frameon=False, fontsize=7, ncols=len(entries), loc="lower center", bbox_to_anchor=(0.5, 1.0)
        )
    return _saved(figure, path)


def write_figures(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Every figure that the lines allow: quality against FLOPs and time by text, and the tasks; by model."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    summaries = summarise(rows)
    for number, summary in enumerate(summaries, start=1):
        prefix = f"{number}-" if len(summaries) > 1 else ""
        for text in summary.texts:
            where, title = f"{prefix}{_file_name(text)}", f"{summary.model}, {text}"
            written += _quality(summary, title, folder / f"{where}-flops", text, _flops, _FLOPS)
            written += _quality(summary, title, folder / f"{where}-time", text, _time, _TIME)
        written += _tasks(summary, f"{summary.model}, zero-shot", folder / f"{prefix}tasks")
    return written


def _quality(
    summary: Summary, title: str, path: Path, text: str | None, cost: Cost, label: str
) -> list[Path]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    text, dense = text or next(iter(summary.texts), ""), summary.dense
    known = [e for e in summary.entries if text in e.perplexity and cost(e) is not None]
    if dense is None or len(known) < 2 or all(e is not dense for e in known):
        return []
    level = dense.perplexity[text].value
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for series, name in enumerate(summary.labels):
        own = sorted((e for e in known if e.label == name), key=lambda e: e.ratio)
        if not own:
            continue
        costs = [c for e in (dense, *own) if (c := cost(e)) is not None]
        factors = [e.over_dense.get(text) for e in own]
        around = [[at - low for at, low, _ in costs], [high - at for at, _, high in costs]]
        axes.errorbar(
            [at for at, _, _ in costs],
            [e.perplexity[text].value for e in (dense, *own)],
            # Of the difference to dense on the same windows, or over seeds.
            yerr=[0.0, *((f.spread or 0.0) * level if f else 0.0 for f in factors)],
            xerr=around if any(map(any, around)) else None,
            marker=MATPLOTLIB_MARKS[series % len(MATPLOTLIB_MARKS)],
            color=COLOURS[series % len(COLOURS)][0],
            elinewidth=0.9,
            capsize=3,
            label=_plain(name),
        )
    axes.axhline(level, color="grey", linewidth=0.8, linestyle=":", label="dense")
    axes.set_yscale("log")
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))  # more would be written over one another
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.yaxis.set_minor_formatter("{x:.0f}")
    axes.set_xlabel(label)
    axes.set_ylabel(_plain(f"{text} perplexity (log scale)"))
    axes.set_title(_plain(title), fontsize=10)
    axes.invert_xaxis()
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return _saved(figure, path)


def _flops(entry: Entry) -> tuple[float, float, float] | None:
    return None if entry.flops_share is None else (100 * entry.flops_share,) * 3


def _time(entry: Entry) -> tuple[float, float, float] | None:
    speed = entry.prefill
    return None if speed is None else (100 / speed.value, 100 / speed.high, 100 / speed.low)


def _only(rows: Sequence[Row]) -> Summary:
    found = summarise(rows)
    if len(found) != 1:
        raise UsageError(f"a figure shows one model, in one number type on one device, not {len(found)}.")
    return found[0]


def _saved(figure: Any, path: Path) -> list[Path]:
    # Not `with_suffix`: a text's name may hold dots.
    written = [path.parent / f"{path.name}{ending}" for ending in (".png", ".svg")]
    for file in written:
        figure.savefig(file, dpi=150)
    return written


def _file_name(text: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in text)


def _plain(words: str) -> str:
    """Words that matplotlib does not take for mathematics."""
    return words.replace("$", r"\$")
