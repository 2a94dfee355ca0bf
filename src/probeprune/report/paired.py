"""Is one method better than another on the same windows or items? Bootstrap intervals of paired differences.

Windows differ far more from each other than methods do on one window, so both methods are resampled together.
The bootstrap resamples text, not seeds: an interval covers other text of the same kind. Knows nothing of
models.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from probeprune.errors import UsageError

_INTERVAL = (2.5, 97.5)


@dataclass(frozen=True)
class Comparison:
    """Perplexity of one method over another's, with its 95 % interval; below 1 the first is better."""

    factor: float
    low: float
    high: float

    @property
    def inverse(self) -> "Comparison":
        """The second compared with the first."""
        return Comparison(1 / self.factor, 1 / self.high, 1 / self.low)

    @property
    def verdict(self) -> int:
        """1: the first is better; -1: the second is better; 0: the interval includes no difference."""
        return (self.high < 1) - (self.low > 1)


@dataclass(frozen=True)
class Difference:
    """Accuracy of one method minus another's in points (hundredths), with its 95 % interval."""

    points: float
    low: float
    high: float

    @property
    def inverse(self) -> "Difference":
        """The second compared with the first."""
        return Difference(-self.points, -self.high, -self.low)

    @property
    def verdict(self) -> int:
        """1: the first is better; -1: the second is better; 0: the interval includes no difference."""
        return (self.low > 0) - (self.high < 0)


def paired_bootstrap(
    a_losses: ArrayLike, b_losses: ArrayLike, samples: int = 2000, seed: int = 0
) -> Comparison:
    """Perplexity of a over that of b on the same windows (percentile bootstrap over windows).

    Args:
        a_losses, b_losses: mean loss of each window in nats, (windows,), or (seeds, windows) where the two
            were run with several seeds; each window is then paired within its seed, a window is drawn for all
            seeds at once, and the factor is the geometric mean over seeds.
        samples: number of bootstrap samples.
        seed: of the bootstrap.

    Raises:
        UsageError: the two sides have different windows, or fewer than two.
    """
    a, b = np.atleast_2d(np.asarray(a_losses, float)), np.atleast_2d(np.asarray(b_losses, float))
    if a.shape != b.shape or a.shape[1] < 2:
        raise UsageError(
            f"a paired comparison needs the same two or more windows on both sides, not {a.shape[1]} and "
            f"{b.shape[1]} windows of {len(a)} and {len(b)} seeds."
        )
    differences = (a - b).mean(0)
    draws = np.random.default_rng(seed).integers(len(differences), size=(samples, len(differences)))
    # In logarithms, so that b over a has exactly the inverse interval.
    low, high = np.percentile(differences[draws].mean(1), _INTERVAL)
    return Comparison(*(float(np.exp(x)) for x in (differences.mean(), low, high)))


def paired_accuracy(
    a_correct: Mapping[str, Sequence[str]],
    b_correct: Mapping[str, Sequence[str]],
    samples: int = 2000,
    seed: int = 0,
) -> Difference:
    """Mean accuracy of a minus that of b over the same tasks, in points (percentile bootstrap over items).

    Args:
        a_correct, b_correct: by task, a string of 0 and 1 for each seed, one character an item. Items are
            drawn within their task, and every task weighs alike.
        samples: number of bootstrap samples.
        seed: of the bootstrap.

    Raises:
        UsageError: the two sides have different tasks, seeds or items, or no task.
    """
    if not a_correct or a_correct.keys() != b_correct.keys():
        raise UsageError("a paired comparison of accuracies needs the same one or more tasks on both sides.")
    random = np.random.default_rng(seed)
    mean, drawn = 0.0, np.zeros(samples)
    for task in a_correct:
        a, b = (_bits(task, side[task]) for side in (a_correct, b_correct))
        if a.shape != b.shape:
            raise UsageError(f"task {task!r} was not run on the same items and seeds by both methods.")
        # An item's difference takes few values, so a sample only needs how often each is drawn: the same
        # distribution as drawing thousands of items one by one.
        values, counts = np.unique((a - b).mean(0), return_counts=True)
        items = counts.sum()
        mean += float(values @ counts) / items
        drawn += random.multinomial(items, counts / items, size=samples) @ values / items
    low, high = np.percentile(drawn, _INTERVAL)
    return Difference(*(100 * float(x) / len(a_correct) for x in (mean, low, high)))


def _bits(task: str, seeds: Sequence[str]) -> NDArray[np.float64]:
    """Array (seeds, items) of 0 and 1."""
    lengths = {len(s) for s in seeds}
    if len(lengths) != 1 or 0 in lengths or set("".join(seeds)) - {"0", "1"}:
        raise UsageError(f"task {task!r} needs one 0 or 1 an item, for the same items with every seed.")
    return np.array([[float(c) for c in s] for s in seeds])
