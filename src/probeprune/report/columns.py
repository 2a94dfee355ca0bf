"""The table of a summary as columns of text, the same for terminal, Markdown and page."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from probeprune.report.summary import Entry, Estimate, Speed, Summary

Published = Mapping[tuple[str, str, float], Mapping[str, float]]
"""By (model, method, ratio) the published "perplexity" and "accuracy", the mean over tasks in percent."""


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
        cells: one for each entry.
    """

    key: str
    label: str
    means: str
    better: int
    cells: tuple[Cell, ...]

    @property
    def told(self) -> bool:
        """Whether anything is in it."""
        return any(c.text != "-" for c in self.cells)


ALWAYS = ("method", "ratio", "pruned")


def columns(summaries: Sequence[Summary], published: Published | None = None) -> list[Column]:
    """The columns that have something to say about the entries of these summaries, one after the other."""
    result: list[Column] = []
    entries = [e for s in summaries for e in s.entries]
    texts = list(dict.fromkeys(t for s in summaries for t in s.texts))

    def add(key: str, label: str, means: str, better: int, cell: Callable[[Entry], Cell]) -> None:
        column = Column(key, label, means, better, tuple(map(cell, entries)))
        if key in ALWAYS or column.told:
            result.append(column)

    def theirs(entry: Entry, what: str, digits: int) -> Cell:
        found = (published or {}).get((entry.model, entry.name, entry.ratio), {})
        return number(found.get(what), digits)

    if len(summaries) > 1:
        add("model", "model", "", 0, lambda e: Cell(e.model))
    add("method", "method", "", 0, lambda e: Cell(e.label))
    add("ratio", "ratio", "asked for", 0, lambda e: share(e.ratio or None, 0))
    pruned = "share of all blocks' parameters really left out"
    add("pruned", "pruned", pruned, 0, lambda e: share(None if e.dense else e.removed_share))
    add("training", "training", "tokens seen in training", 0, _training)
    for text in texts:
        add(
            f"perplexity {text}",
            "perplexity" if len(texts) == 1 else text,
            f"perplexity on {text}",
            -1,
            lambda e, text=text: estimate(e.perplexity.get(text), 2),  # type: ignore[misc]
        )
        add(
            f"over dense {text}",
            "x dense",
            "perplexity over the dense model's, window by window",
            -1,
            lambda e, text=text: estimate(e.over_dense.get(text), 3),  # type: ignore[misc]
        )
    means = "perplexity in the paper"
    add("published perplexity", "published", means, -1, lambda e: theirs(e, "perplexity", 1))
    for task in dict.fromkeys(t for s in summaries for t in s.tasks):
        add(
            f"accuracy {task}",
            task,
            f"accuracy on {task}, %",
            1,
            lambda e, task=task: estimate(e.accuracy.get(task), 1, 100),  # type: ignore[misc]
        )
    for protocol in dict.fromkeys(p for s in summaries for p in s.protocols):
        said = "" if protocol == "harness" else f" ({protocol})"
        add(
            f"accuracy mean{said}",
            f"mean{said}",
            "accuracy, mean over the tasks, %",
            1,
            lambda e, p=protocol: estimate(e.mean_accuracy.get(p), 1, 100),  # type: ignore[misc]
        )
    means = "mean accuracy in the paper, %"
    add("published accuracy", "published", means, 1, lambda e: theirs(e, "accuracy", 1))
    means = "of the decoder with the probe, counted, over dense"
    add("flops", "FLOPs", means, -1, lambda e: share(e.flops_share))
    means = "the probe's part of the dense blocks' FLOPs"
    add("probe", "probe", means, -1, lambda e: share(e.probe_flops_share or None))
    if any(e.prefill or e.decode for e in entries):
        means = "measured speed over dense in interleaved rounds, median (range)"
        add("prefill", "prefill", f"prompt: {means}", 1, lambda e: _speed(e, e.prefill))
        add("decode", "decode", f"token by token: {means}", 1, lambda e: _speed(e, e.decode))
    else:
        means = "measured in this run, decoder tokens per second over dense, one method after the other"
        add("speed", "speed-up", means, 1, _speed_in_passing)
    add("memory", "memory", "peak (over dense)", -1, _memory)
    means = "size of the KV cache over dense"
    add("kv", "KV cache", means, -1, lambda e: share(e.kv_cache_share, 0))
    return result


def legend(shown: Sequence[Column]) -> str:
    """What the columns mean, in one paragraph."""
    said = [f"{c.label}: {c.means}" for c in shown if c.means]
    return (
        "; ".join(said)
        + ". ± se: standard error over windows or items of one seed; ± sd: standard deviation over seeds, "
        "another thing."
    )


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
    note = "" if steps is None else f"{steps} steps"
    return Cell("yes" if tokens is None else f"{tokens / 1e6:.2g} M", note, tokens)


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
