"""The table of a summary as columns of text, the same for terminal, Markdown and page."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from probeprune.report.summary import Entry, Estimate, Speed, Summary

Published = Mapping[tuple[str, str, float], Mapping[str, float]]
"""By (model, method, ratio) the published "perplexity" and "accuracy", the mean over tasks in percent."""


Part = Literal["entry", "perplexity", "accuracy", "cost"]


@dataclass(frozen=True)
class Cell:
    """One cell: what it says, how sure that is or what belongs to it, and what it is sorted by."""

    text: str = "-"
    note: str = ""
    value: float | None = None

    @property
    def plain(self) -> str:
        """All of it in one line."""
        return f"{self.text} {self.note}".rstrip()


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        key: names it among the others.
        label: its head.
        means: what its figures are.
        better: -1 where less is better, 1 where more is, 0 where neither.
        part: what it is about, for tables that are too wide to be shown in one.
        cells: one for each entry.
    """

    key: str
    label: str
    means: str
    better: int
    part: Part
    cells: tuple[Cell, ...]

    @property
    def told(self) -> bool:
        """Whether anything is in it."""
        return any(c.text != "-" for c in self.cells)


ALWAYS = ("method", "ratio", "pruned")


def columns(summaries: Sequence[Summary], published: Published | None = None) -> list[Column]:
    """The columns that have something to say about the entries of these summaries, one after the other."""
    entries = [e for s in summaries for e in s.entries]
    texts = list(dict.fromkeys(t for s in summaries for t in s.texts))
    tasks = list(dict.fromkeys(t for s in summaries for t in s.tasks))
    protocols = list(dict.fromkeys(p for s in summaries for p in s.protocols))
    found = [
        *_of_entry(summaries, entries),
        *_of_perplexity(entries, texts),
        _published(entries, published or {}, "perplexity", "perplexity in the paper", -1),
        *_of_accuracy(entries, tasks, protocols),
        _published(entries, published or {}, "accuracy", "mean accuracy in the paper, %", 1),
        *_of_cost(entries),
    ]
    return [c for c in found if c.key in ALWAYS or c.told]


def _of_entry(summaries: Sequence[Summary], entries: Sequence[Entry]) -> list[Column]:
    pruned = "share of all blocks' parameters really left out"
    models = tuple(Cell(s.model) for s in summaries for _ in s.entries)
    return [
        *([Column("model", "model", "", 0, "entry", models)] if len(summaries) > 1 else []),
        _column(entries, "entry", "method", "method", "", 0, lambda e: Cell(e.label)),
        _column(entries, "entry", "ratio", "ratio", "asked for", 0, lambda e: share(e.ratio or None, 0)),
        _column(
            entries,
            "cost",
            "pruned",
            "pruned",
            pruned,
            0,
            lambda e: share(None if e.dense else e.removed_share),
        ),
        _column(entries, "cost", "training", "training", "tokens seen in training", 0, _training),
    ]


def _of_perplexity(entries: Sequence[Entry], texts: Sequence[str]) -> list[Column]:
    over = "perplexity over the dense model's, window by window"
    found = []
    for text in texts:
        label = "perplexity" if len(texts) == 1 else text
        found += [
            _column(
                entries,
                "perplexity",
                f"perplexity {text}",
                label,
                f"perplexity on {text}" if len(texts) == 1 else "perplexity",
                -1,
                lambda e, text=text: estimate(e.perplexity.get(text), 2),  # type: ignore[misc]
            ),
            _column(
                entries,
                "perplexity",
                f"over dense {text}",
                "x dense",
                over,
                -1,
                lambda e, text=text: estimate(e.over_dense.get(text), 3),  # type: ignore[misc]
            ),
        ]
    return found


def _of_accuracy(entries: Sequence[Entry], tasks: Sequence[str], protocols: Sequence[str]) -> list[Column]:
    found = [
        _column(
            entries,
            "accuracy",
            f"accuracy {task}",
            task,
            "accuracy, %",
            1,
            lambda e, task=task: estimate(e.accuracy.get(task), 1, 100),  # type: ignore[misc]
        )
        for task in tasks
    ]
    for protocol in protocols:
        label = "mean" if protocol == "harness" else f"mean ({protocol})"
        found.append(
            _column(
                entries,
                "accuracy",
                f"accuracy {label}",
                label,
                "accuracy, mean over the tasks, %",
                1,
                lambda e, p=protocol: estimate(e.mean_accuracy.get(p), 1, 100),  # type: ignore[misc]
            )
        )
    return found


def _of_cost(entries: Sequence[Entry]) -> list[Column]:
    flops = "of the decoder with the probe, counted, over dense"
    probe = "the probe's part of the dense blocks' FLOPs"
    speed = "measured speed over dense, of prompts and token by token: median (range) of interleaved rounds"
    in_passing = "measured in this run, decoder tokens per second over dense, one method after the other"
    if any(e.prefill or e.decode for e in entries):
        speeds = [
            _column(entries, "cost", "prefill", "prefill", speed, 1, lambda e: _speed(e, e.prefill)),
            _column(entries, "cost", "decode", "decode", speed, 1, lambda e: _speed(e, e.decode)),
        ]
    else:
        speeds = [_column(entries, "cost", "speed", "speed-up", in_passing, 1, _speed_in_passing)]
    cache = "its size over dense"
    return [
        _column(entries, "cost", "flops", "FLOPs", flops, -1, lambda e: share(e.flops_share)),
        _column(entries, "cost", "probe", "probe", probe, -1, lambda e: share(e.probe_flops_share or None)),
        *speeds,
        _column(entries, "cost", "memory", "memory", "peak (over dense)", -1, _memory),
        _column(entries, "cost", "kv", "KV cache", cache, -1, lambda e: share(e.kv_cache_share, 0)),
    ]


def _published(
    entries: Sequence[Entry],
    published: Published,
    what: Literal["perplexity", "accuracy"],
    means: str,
    better: int,
) -> Column:
    def cell(entry: Entry) -> Cell:
        return number(published.get((entry.model, entry.name, entry.ratio), {}).get(what), 1)

    return _column(entries, what, f"published {what}", "published", means, better, cell)


def _column(
    entries: Sequence[Entry],
    part: Part,
    key: str,
    label: str,
    means: str,
    better: int,
    cell: Callable[[Entry], Cell],
) -> Column:
    return Column(key, label, means, better, part, tuple(map(cell, entries)))


def meanings(shown: Sequence[Column]) -> list[tuple[str, str]]:
    """What the columns mean: labels, separated by commas, and the meaning they share."""
    labels: dict[str, list[str]] = {}
    for column in shown:
        if column.means:
            labels.setdefault(column.means, []).append(column.label)
    found = [(", ".join(dict.fromkeys(own)), means) for means, own in labels.items()]
    notes = {cell.note.rpartition(" ")[2] for column in shown for cell in column.cells}
    if "se" in notes:
        found.append(("± se", "standard error over windows or items, of one seed"))
    if "sd" in notes:
        found.append(("± sd", "standard deviation over seeds, which is another thing"))
    return found


def legend(shown: Sequence[Column]) -> str:
    """What the columns mean, in one paragraph."""
    return "; ".join(f"{labels}: {means}" for labels, means in meanings(shown)) + "."


def best(column: Column, among: Sequence[int]) -> set[int]:
    """Which of these cells hold the best figure; none where there is nothing to choose from."""
    known = {i: value for i in among if (value := column.cells[i].value) is not None}
    if not column.better or len(known) < 2:
        return set()
    top = max(column.better * v for v in known.values())
    found = {i for i, v in known.items() if column.better * v == top}
    return found if len(found) < len(known) else set()


def number(value: float | None, digits: int, unit: str = "") -> Cell:
    """A figure as it is."""
    return Cell() if value is None else Cell(f"{value:.{digits}f}{unit}", value=value)


def share(value: float | None, digits: int = 1) -> Cell:
    """A share of 1, in percent."""
    return number(None if value is None else 100 * value, digits, "%")


def estimate(found: Estimate | None, digits: int, times: float = 1) -> Cell:
    """A figure with its spread, and which kind of spread that is."""
    if found is None:
        return Cell()
    kind = "sd" if found.seeds > 1 else "se"
    note = "" if found.spread is None else f"± {times * found.spread:.{digits}f} {kind}"
    return Cell(f"{times * found.value:.{digits}f}", note, times * found.value)


def budget(training: dict[str, Any] | None) -> float | None:
    """Tokens seen in training."""
    if training is None:
        return None
    if training.get("tokens") is not None:
        return float(training["tokens"])
    sizes = [training.get(k) for k in ("steps", "batch_size", "length")]
    return None if None in sizes else float(sizes[0] * sizes[1] * sizes[2])  # type: ignore[operator]


def _training(entry: Entry) -> Cell:
    if entry.training is None:
        return Cell()
    tokens, steps = budget(entry.training), entry.training.get("steps")
    note = "" if steps is None else f"in {steps} steps"
    return Cell("yes" if tokens is None else _amount(tokens), note, tokens)


def _amount(number: float) -> str:
    """`384`, `102k`, `9.8M`."""
    if number < 1e4:
        return f"{number:.0f}"
    return f"{number / 1e3:.0f}k" if number < 1e6 else f"{number / 1e6:.3g}M"


def _speed(entry: Entry, speed: Speed | None) -> Cell:
    if speed is None or entry.dense:
        return Cell()
    note = f"({speed.low:.2f}-{speed.high:.2f})" if speed.low < speed.high else ""
    return Cell(f"{speed.value:.2f}x", note, speed.value)


def _speed_in_passing(entry: Entry) -> Cell:
    return Cell() if entry.dense else number(entry.speed_in_passing, 2, "x")


def _memory(entry: Entry) -> Cell:
    if entry.memory is None:
        return Cell()
    note = "" if entry.dense or entry.memory_over_dense is None else f"({entry.memory_over_dense:.2f}x)"
    return Cell(f"{entry.memory / 2**30:.2f} GiB", note, entry.memory)
