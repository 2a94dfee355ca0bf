"""Paired comparisons against slow versions that draw windows and items one by one."""

import math
import random

import numpy as np
import pytest

from probeprune.errors import UsageError
from probeprune.report.paired import Comparison, paired_accuracy, paired_bootstrap


def losses(seed: int, windows: int = 30) -> list[float]:
    draw = random.Random(seed)
    return [draw.gauss(3, 0.5) for _ in range(windows)]


def shifted(base: list[float], by: float, noise: float, seed: int) -> list[float]:
    draw = random.Random(seed)
    return [x + by + draw.gauss(0, noise) for x in base]


def percentile(values: list[float], share: float) -> float:
    """Linear interpolation between order statistics, written out."""
    values, at = sorted(values), share * (len(values) - 1)
    below = math.floor(at)
    return values[below] + (at - below) * (values[min(below + 1, len(values) - 1)] - values[below])


def slow(a: list[list[float]], b: list[list[float]], samples: int, seed: int) -> tuple[float, float, float]:
    windows = len(a[0])

    def factor(chosen: list[int]) -> float:
        product = 1.0
        for ours, theirs in zip(a, b, strict=True):
            product *= math.exp(math.fsum(ours[i] for i in chosen) / windows)
            product /= math.exp(math.fsum(theirs[i] for i in chosen) / windows)
        return product ** (1 / len(a))

    draws = np.random.default_rng(seed).integers(windows, size=(samples, windows)).tolist()
    logs = [math.log(factor(chosen)) for chosen in draws]
    ends = (math.exp(percentile(logs, share)) for share in (0.025, 0.975))
    return factor(list(range(windows))), *ends


def test_factor_and_interval_are_those_of_drawing_windows():
    base = losses(0)
    a, b = shifted(base, 0.2, 0.05, 1), shifted(base, 0.0, 0.05, 2)
    found = paired_bootstrap(a, b, samples=200, seed=3)
    assert (found.factor, found.low, found.high) == pytest.approx(slow([a], [b], 200, 3), rel=1e-12)


def test_windows_are_paired_within_their_seed():
    base = losses(0)
    a = [shifted(base, 0.2 + 0.1 * s, 0.05, s) for s in range(3)]
    b = [shifted(base, 0.0, 0.05, 10 + s) for s in range(3)]
    found = paired_bootstrap(a, b, samples=200, seed=3)
    assert (found.factor, found.low, found.high) == pytest.approx(slow(a, b, 200, 3), rel=1e-12)


def test_the_other_way_round_is_the_inverse():
    base = losses(0)
    a, b = shifted(base, 0.1, 0.2, 1), shifted(base, 0.0, 0.2, 2)
    one, other = paired_bootstrap(a, b), paired_bootstrap(b, a).inverse
    assert (one.factor, one.low, one.high) == pytest.approx((other.factor, other.low, other.high), rel=1e-9)


def test_interval_is_that_of_the_differences_not_of_the_windows():
    # Windows differ by half a nat, methods by exactly a tenth: nothing is uncertain.
    base = losses(0)
    found = paired_bootstrap([x + 0.1 for x in base], base)
    assert (found.low, found.high) == pytest.approx((math.exp(0.1),) * 2)
    # With noise it is about the normal interval of the mean difference.
    many = losses(1, 2000)
    noisy = shifted(many, 0.1, 0.3, 2)
    found = paired_bootstrap(noisy, many)
    wide = 2 * 1.96 * 0.3 / math.sqrt(2000)
    assert math.log(found.high / found.low) == pytest.approx(wide, rel=0.1)


def test_verdict_needs_the_whole_interval():
    assert Comparison(0.9, 0.8, 0.99).verdict == 1
    assert Comparison(0.9, 0.8, 1.01).verdict == 0
    assert Comparison(1.1, 1.01, 1.2).verdict == -1


def bits(seed: int, items: int, right: float) -> str:
    draw = random.Random(seed)
    return "".join(str(int(draw.random() < right)) for _ in range(items))


def test_accuracy_difference_is_the_mean_over_tasks_in_points():
    a = {"x": ["1100", "1110"], "y": ["1" * 9 + "0"] * 2}
    b = {"x": ["0100", "0100"], "y": ["0" * 10] * 2}
    found = paired_accuracy(a, b)
    assert found.points == pytest.approx(100 * ((5 - 2) / 8 + 9 / 10) / 2)
    other = paired_accuracy(b, a)
    assert other.points == pytest.approx(-found.points)
    assert paired_accuracy(a, a) == type(found)(0.0, 0.0, 0.0)


def test_accuracy_interval_is_that_of_drawing_items():
    a = {"x": [bits(1, 120, 0.6)], "y": [bits(2, 60, 0.5), bits(3, 60, 0.5)]}
    b = {"x": [bits(4, 120, 0.5)], "y": [bits(5, 60, 0.4), bits(6, 60, 0.4)]}
    draw, drawn = random.Random(0), []
    for _ in range(4000):
        total = 0.0
        for task in a:
            items = len(a[task][0])
            for i in [draw.randrange(items) for _ in range(items)]:
                for ours, theirs in zip(a[task], b[task], strict=True):
                    total += (int(ours[i]) - int(theirs[i])) / items / len(a[task])
        drawn.append(100 * total / len(a))
    found = paired_accuracy(a, b, samples=4000)
    # Two bootstraps of 4000 samples: their ends differ by about a twentieth of the interval at most.
    room = 0.05 * (found.high - found.low)
    assert found.low == pytest.approx(percentile(drawn, 0.025), abs=room)
    assert found.high == pytest.approx(percentile(drawn, 0.975), abs=room)


def test_what_cannot_be_paired_is_refused():
    with pytest.raises(UsageError, match="not 3 and 2 windows"):
        paired_bootstrap([1.0, 2.0, 3.0], [1.0, 2.0])
    with pytest.raises(UsageError, match="two or more windows"):
        paired_bootstrap([1.0], [1.0])
    with pytest.raises(UsageError, match="same one or more tasks"):
        paired_accuracy({}, {})
    with pytest.raises(UsageError, match="'x' was not run on the same items"):
        paired_accuracy({"x": ["01"]}, {"x": ["011"]})
    with pytest.raises(UsageError, match="one 0 or 1 an item"):
        paired_accuracy({"x": ["01"]}, {"x": ["0?"]})
