"""Which entry is better than which: paired comparisons of the entries of one ratio."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from probeprune.report.estimates import pairs
from probeprune.report.paired import Comparison, Difference, paired_accuracy, paired_bootstrap
from probeprune.report.summary import Entry, Summary

Compared = Comparison | Difference

MOST = 24
"""Most entries of a ratio that are compared, the best ones: each is compared with every other."""


@dataclass(frozen=True)
class Matrix:
    """Every entry of a ratio against every other: `cells[i][j]` compares entry i with entry j.

    Attributes:
        subject: the text, or the protocol of the tasks.
        accuracy: whether it compares accuracies, in points, or perplexities, as factors.
        entries: those that can be compared with at least one other.
        cells: None where two entries cannot be compared.
    """

    subject: str
    accuracy: bool
    entries: tuple[Entry, ...]
    cells: tuple[tuple[Compared | None, ...], ...]


def matrices(summary: Summary, entries: Sequence[Entry]) -> list[Matrix]:
    """A matrix for each text and protocol on which at least two of these entries can be compared.

    Args:
        summary: that of the entries.
        entries: those of one ratio, the best last; of more than `MOST`, the last ones are compared.
    """
    made, entries = [], entries[-MOST:]
    for text in summary.texts:

        def by_text(a: Entry, b: Entry, text: str = text) -> Comparison | None:
            return compare_on_text(a, b, text)

        made.append(_matrix(text, False, entries, by_text))
    for protocol, tasks in summary.protocols.items():

        def by_tasks(a: Entry, b: Entry, tasks: Sequence[str] = tasks) -> Difference | None:
            return compare_on_tasks(a, b, tasks)

        made.append(_matrix(protocol, True, entries, by_tasks))
    return [matrix for matrix in made if matrix.entries]


def compare_on_text(a: Entry, b: Entry, text: str) -> Comparison | None:
    """Perplexity of a over b on the same windows; None where they share fewer than two windows."""
    matched = [(x.get("losses", []), y.get("losses", [])) for x, y in pairs(a.on_text(text), b.on_text(text))]
    lengths = {len(losses) for pair in matched for losses in pair}
    if len(lengths) != 1 or min(lengths) < 2:
        return None
    return paired_bootstrap([x for x, _ in matched], [y for _, y in matched])


def compare_on_tasks(a: Entry, b: Entry, tasks: Sequence[str]) -> Difference | None:
    """Mean accuracy of a minus b over the same items; None where one lacks a task or its items."""
    ours: dict[str, list[str]] = {}
    theirs: dict[str, list[str]] = {}
    for task in tasks:
        matched = pairs(a.on_task(task), b.on_task(task))
        ours[task] = [line.get("correct", "") for line, _ in matched]
        theirs[task] = [line.get("correct", "") for _, line in matched]
        lengths = {len(correct) for correct in (*ours[task], *theirs[task])}
        if len(lengths) != 1 or 0 in lengths:
            return None
    return paired_accuracy(ours, theirs)


def _matrix(
    subject: str,
    accuracy: bool,
    entries: Sequence[Entry],
    compare: Callable[[Entry, Entry], Compared | None],
) -> Matrix:
    compared: dict[tuple[int, int], Compared] = {}
    for i, a in enumerate(entries):
        for j, b in enumerate(entries[:i]):
            if (result := compare(a, b)) is not None:
                compared[i, j], compared[j, i] = result, result.inverse
    shown = sorted({i for pair in compared for i in pair})
    cells = tuple(tuple(compared.get((i, j)) for j in shown) for i in shown)
    return Matrix(subject, accuracy, tuple(entries[i] for i in shown), cells)
