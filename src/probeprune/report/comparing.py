"""Which entry is better than which: paired comparisons of the entries of one ratio."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from probeprune.report.paired import Comparison, Difference, paired_accuracy, paired_bootstrap
from probeprune.report.summary import Entry, Summary, pairs

Compared = Comparison | Difference


@dataclass(frozen=True)
class Matrix:
    """Every entry of a ratio against every other: `cells[i][j]` says how i compares with j.

    Attributes:
        what: the text, or the protocol of the tasks.
        accuracy: whether it compares accuracies, in points, or perplexities, as factors.
    """

    what: str
    accuracy: bool
    entries: tuple[Entry, ...]
    cells: tuple[tuple[Compared | None, ...], ...]


def matrices(summary: Summary, entries: Sequence[Entry]) -> list[Matrix]:
    """One for each text and protocol on which two of these entries or more can be compared."""
    found = [_matrix(t, False, entries, lambda a, b, t=t: on_text(a, b, t)) for t in summary.texts]  # type: ignore[misc]
    for protocol, tasks in summary.protocols.items():
        found.append(_matrix(protocol, True, entries, lambda a, b, own=tasks: on_tasks(a, b, own)))  # type: ignore[misc]
    return [m for m in found if m.entries]


def on_text(a: Entry, b: Entry, text: str) -> Comparison | None:
    """Perplexity of a over b on the same windows; None where there are no two that both were measured on."""
    matched = [(x.get("losses", []), y.get("losses", [])) for x, y in pairs(a.on(text), b.on(text))]
    lengths = {len(losses) for pair in matched for losses in pair}
    if len(lengths) != 1 or min(lengths) < 2:
        return None
    return paired_bootstrap([x for x, _ in matched], [y for _, y in matched])


def on_tasks(a: Entry, b: Entry, tasks: Sequence[str]) -> Difference | None:
    """Mean accuracy of a minus b over the same items; None where one lacks a task or its items."""
    ours, theirs = {}, {}
    for task in tasks:
        matched = pairs(a.at(task), b.at(task))
        ours[task], theirs[task] = (
            ([row.get("correct", "") for row in side] for side in zip(*matched, strict=True))
            if matched
            else ([], [])
        )
        lengths = {len(correct) for correct in (*ours[task], *theirs[task])}
        if len(lengths) != 1 or 0 in lengths:
            return None
    return paired_accuracy(ours, theirs)


def _matrix(
    what: str,
    accuracy: bool,
    entries: Sequence[Entry],
    compare: Callable[[Entry, Entry], Compared | None],
) -> Matrix:
    found: dict[tuple[int, int], Compared] = {}
    for i, a in enumerate(entries):
        for j, b in enumerate(entries[:i]):
            if (compared := compare(a, b)) is not None:
                found[i, j], found[j, i] = compared, compared.inverse
    known = sorted({i for pair in found for i in pair})
    cells = tuple(tuple(found.get((i, j)) for j in known) for i in known)
    return Matrix(what, accuracy, tuple(entries[i] for i in known), cells)
