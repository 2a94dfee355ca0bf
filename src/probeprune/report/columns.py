"""The table of a summary as columns of text, the same for terminal, Markdown and page."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from probeprune.report.estimates import Estimate, Speed
from probeprune.report.summary import Entry, Summary
from probeprune.result_lines import TrainingRecord

Published = Mapping[tuple[str, str, float], Mapping[str, float]]
"""By (model, method, ratio) the published "perplexity" and "accuracy", the mean over tasks in percent."""

Section = Literal["entry", "perplexity", "accuracy", "cost"]
Better = Literal[-1, 0, 1]


@dataclass(frozen=True)
class TableCell:
    """One cell: its text, a note such as its spread, and the value that rows are sorted by."""

    text: str = "-"
    note: str = ""
    value: float | None = None

    @property
    def plain(self) -> str:
        """Text and note in one line."""
        return f"{self.text} {self.note}".rstrip()


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        section: its part of the table, for tables that are too wide to be shown in one.
        key: unique among the columns.
        label: its header.
        meaning: what its figures are; empty where the header is enough.
        better: -1 where less is better, 1 where more is, 0 where neither.
        cells: one for each entry.
    """

    section: Section
    key: str
    label: str
    meaning: str
    better: Better
    cells: tuple[TableCell, ...]

    @property
    def has_values(self) -> bool:
        """Whether any cell has text."""
        return any(c.text != "-" for c in self.cells)


ALWAYS = ("method", "ratio", "pruned")
"""Keys of the columns that are shown even when they are empty."""


def columns(summaries: Sequence[Summary], published: Published | None = None) -> list[Column]:
    """The columns that have values for the entries of these summaries, one summary after the other."""
    entries = [e for s in summaries for e in s.entries]
    texts = list(dict.fromkeys(t for s in summaries for t in s.texts))
    tasks = list(dict.fromkeys(t for s in summaries for t in s.tasks))
    protocols = list(dict.fromkeys(p for s in summaries for p in s.protocols))
    candidates = [
        *_entry_columns(summaries, entries),
        *_perplexity_columns(entries, texts),
        _published_column(entries, published or {}, "perplexity", "perplexity in the paper", -1),
        *_accuracy_columns(entries, tasks, protocols),
        _published_column(entries, published or {}, "accuracy", "mean accuracy in the paper, %", 1),
        *_cost_columns(entries),
    ]
    return [c for c in candidates if c.key in ALWAYS or c.has_values]


def _column(
    entries: Sequence[Entry],
    section: Section,
    key: str,
    label: str,
    meaning: str,
    better: Better,
    cell: Callable[[Entry], TableCell],
) -> Column:
    return Column(section, key, label, meaning, better, tuple(map(cell, entries)))


def _entry_columns(summaries: Sequence[Summary], entries: Sequence[Entry]) -> list[Column]:
    models = tuple(TableCell(s.model) for s in summaries for _ in s.entries)
    removed = "share of all blocks' parameters that was removed"
    return [
        *([Column("entry", "model", "model", "", 0, models)] if len(summaries) > 1 else []),
        _column(entries, "entry", "method", "method", "", 0, lambda e: TableCell(e.label)),
        _column(
            entries, "entry", "ratio", "ratio", "share requested", 0, lambda e: share_cell(e.ratio or None, 0)
        ),
        _column(entries, "cost", "pruned", "pruned", removed, 0, _removed_cell),
        _column(entries, "cost", "training", "training", "tokens seen in training", 0, _training_cell),
    ]


def _perplexity_columns(entries: Sequence[Entry], texts: Sequence[str]) -> list[Column]:
    made = []
    for text in texts:
        label, meaning = ("perplexity", f"perplexity on {text}") if len(texts) == 1 else (text, "perplexity")

        def perplexity(entry: Entry, text: str = text) -> TableCell:
            return estimate_cell(entry.quality.perplexity.get(text), 2)

        def factor(entry: Entry, text: str = text) -> TableCell:
            return estimate_cell(entry.quality.over_dense.get(text), 3)

        def top1(entry: Entry, text: str = text) -> TableCell:
            return estimate_cell(entry.quality.top1.get(text), 1, 100)

        def divergence(entry: Entry, text: str = text) -> TableCell:
            return estimate_cell(entry.quality.divergence.get(text), 3)

        over = "perplexity over the dense model's, paired by window"
        same = "share of tokens whose likeliest successor is the dense model's, %"
        apart = "divergence from the dense model's predictions, nats a token"
        made += [
            _column(entries, "perplexity", f"perplexity {text}", label, meaning, -1, perplexity),
            _column(entries, "perplexity", f"over dense {text}", "x dense", over, -1, factor),
            _column(entries, "perplexity", f"top-1 {text}", "top-1", same, 1, top1),
            _column(entries, "perplexity", f"divergence {text}", "KL", apart, -1, divergence),
        ]
    return made


def _accuracy_columns(
    entries: Sequence[Entry], tasks: Sequence[str], protocols: Sequence[str]
) -> list[Column]:
    made = []
    for task in tasks:

        def accuracy(entry: Entry, task: str = task) -> TableCell:
            return estimate_cell(entry.quality.accuracy.get(task), 1, 100)

        made.append(_column(entries, "accuracy", f"accuracy {task}", task, "accuracy, %", 1, accuracy))
    for protocol in protocols:

        def mean(entry: Entry, protocol: str = protocol) -> TableCell:
            return estimate_cell(entry.quality.mean_accuracy.get(protocol), 1, 100)

        label = "mean" if protocol == "harness" else f"mean ({protocol})"
        meaning = "accuracy, mean over the tasks, %"
        made.append(_column(entries, "accuracy", f"accuracy {label}", label, meaning, 1, mean))
    return made


def _cost_columns(entries: Sequence[Entry]) -> list[Column]:
    flops = "of the decoder, including the probe, counted, over dense"
    probe = "FLOPs of the probe over those of the dense blocks"
    speed = (
        "measured speed over dense, of prompts and token by token: median (range) of rounds, dense and "
        "pruned in turn; unclear where the rounds disagree"
    )
    return [
        _column(entries, "cost", "flops", "FLOPs", flops, -1, lambda e: share_cell(e.cost.flops_share)),
        _column(
            entries,
            "cost",
            "probe",
            "probe",
            probe,
            -1,
            lambda e: share_cell(e.cost.probe_flops_share or None),
        ),
        _column(entries, "cost", "prefill", "prefill", speed, 1, lambda e: _speed_cell(e, e.cost.prefill)),
        _column(entries, "cost", "decode", "decode", speed, 1, lambda e: _speed_cell(e, e.cost.decode)),
        _column(entries, "cost", "memory", "memory", "peak (over dense)", -1, _memory_cell),
        _column(
            entries,
            "cost",
            "kv",
            "KV cache",
            "size over dense",
            -1,
            lambda e: share_cell(e.cost.kv_cache_share, 0),
        ),
    ]


def _published_column(
    entries: Sequence[Entry],
    published: Published,
    section: Literal["perplexity", "accuracy"],
    meaning: str,
    better: Better,
) -> Column:
    def cell(entry: Entry) -> TableCell:
        return number_cell(published.get((entry.model, entry.name, entry.ratio), {}).get(section), 1)

    return _column(entries, section, f"published {section}", "published", meaning, better, cell)


def meanings(shown: Sequence[Column]) -> list[tuple[str, str]]:
    """The labels of columns, separated by commas, and the meaning that they share."""
    labels: dict[str, list[str]] = {}
    for column in shown:
        if column.meaning:
            labels.setdefault(column.meaning, []).append(column.label)
    made = [(", ".join(dict.fromkeys(own)), meaning) for meaning, own in labels.items()]
    notes = {cell.note.rpartition(" ")[2] for column in shown for cell in column.cells}
    if "se" in notes:
        made.append(("± se", "standard error over windows or items, for a single seed"))
    if "sd" in notes:
        made.append(("± sd", "standard deviation over seeds, not comparable with se"))
    return made


def column_notes(shown: Sequence[Column]) -> str:
    """The meanings of the columns in one paragraph."""
    return "; ".join(f"{labels}: {meaning}" for labels, meaning in meanings(shown)) + "."


def best(column: Column, among: Sequence[int]) -> set[int]:
    """Indices of the best among these cells; none where fewer than two have values or all are equal."""
    values = {i: value for i in among if (value := column.cells[i].value) is not None}
    if not column.better or len(values) < 2:
        return set()
    top = max(column.better * v for v in values.values())
    winners = {i for i, v in values.items() if column.better * v == top}
    return winners if len(winners) < len(values) else set()


def number_cell(value: float | None, digits: int, unit: str = "") -> TableCell:
    """A number with its unit."""
    return TableCell() if value is None else TableCell(f"{value:.{digits}f}{unit}", value=value)


def share_cell(value: float | None, digits: int = 1) -> TableCell:
    """A share of 1, in percent."""
    return number_cell(None if value is None else 100 * value, digits, "%")


def estimate_cell(estimate: Estimate | None, digits: int, scale: float = 1) -> TableCell:
    """An estimate times `scale`, with its spread and the kind of spread."""
    if estimate is None:
        return TableCell()
    kind = "sd" if estimate.seeds > 1 else "se"
    note = "" if estimate.spread is None else f"± {scale * estimate.spread:.{digits}f} {kind}"
    return TableCell(f"{scale * estimate.value:.{digits}f}", note, scale * estimate.value)


def trained_tokens(training: TrainingRecord) -> float | None:
    """Tokens seen in training; None where that is not recorded."""
    if training.get("tokens") is not None:
        return float(training["tokens"])
    steps, batch_size, length = (training.get("steps"), training.get("batch_size"), training.get("length"))
    if steps is None or batch_size is None or length is None:
        return None
    return float(steps * batch_size * length)


def _removed_cell(entry: Entry) -> TableCell:
    return share_cell(None if entry.dense else entry.cost.removed_share)


def _training_cell(entry: Entry) -> TableCell:
    if entry.training is None:
        return TableCell()
    tokens, steps = trained_tokens(entry.training), entry.training.get("steps")
    note = "" if steps is None else f"in {steps} steps"
    return TableCell("yes" if tokens is None else _amount(tokens), note, tokens)


def _amount(count: float) -> str:
    """`384`, `102k`, `9.8M`."""
    if count < 1e4:
        return f"{count:.0f}"
    return f"{count / 1e3:.0f}k" if count < 1e6 else f"{count / 1e6:.3g}M"


def _speed_cell(entry: Entry, speed: Speed | None) -> TableCell:
    if speed is None or entry.dense:
        return TableCell()
    note = f"({speed.low:.2f}-{speed.high:.2f})" if speed.low < speed.high else ""
    if not speed.clear:
        return TableCell("unclear", note)
    return TableCell(f"{speed.value:.2f}x", note, speed.value)


def _memory_cell(entry: Entry) -> TableCell:
    cost = entry.cost
    if cost.memory is None:
        return TableCell()
    note = "" if entry.dense or cost.memory_over_dense is None else f"({cost.memory_over_dense:.2f}x)"
    return TableCell(f"{cost.memory / 2**30:.2f} GiB", note, cost.memory)
