"""The knapsack against every combination there is."""

import random
from itertools import product

import pytest

from probeprune.algebra import knapsack
from probeprune.algebra.knapsack import Choice, solve
from probeprune.errors import UsageError


def brute(choices, budget):
    """The least damage among all combinations that save enough."""
    return min(
        sum(c.damage for c in chosen)
        for chosen in product(*choices)
        if sum(c.saving for c in chosen) >= budget
    )


def found(choices, budget):
    chosen = [block[i] for block, i in zip(choices, solve(choices, budget), strict=True)]
    assert sum(c.saving for c in chosen) >= budget
    return sum(c.damage for c in chosen)


@pytest.mark.parametrize("seed", range(40))
def test_it_finds_what_trying_everything_finds(seed):
    rng = random.Random(seed)
    choices = [
        [
            Choice(0, 0.0),
            *(Choice(rng.randrange(1, 30) * 6, rng.random()) for _ in range(rng.randrange(1, 5))),
        ]
        for _ in range(rng.randrange(1, 6))
    ]
    most = sum(max(c.saving for c in block) for block in choices)
    for budget in (0, 1, most // 3, most // 2 + 1, most):
        assert found(choices, budget) == pytest.approx(brute(choices, budget))


def test_damage_need_be_neither_convex_nor_rising():
    choices = [[Choice(0, 0.0), Choice(5, 10.0), Choice(10, 1.0)], [Choice(0, 0.3), Choice(5, 0.2)]]
    assert solve(choices, 6) == [2, 1]
    assert solve(choices, 0) == [0, 1]


def test_rounded_savings_never_miss_the_budget(monkeypatch):
    monkeypatch.setattr(knapsack, "STATES", 50)
    rng = random.Random(0)
    choices = [
        [Choice(0, 0.0), *(Choice(rng.randrange(1, 9999), rng.random()) for _ in range(3))] for _ in range(5)
    ]
    for budget in (1001, 7919):
        assert brute(choices, budget) <= found(choices, budget) <= brute(choices, int(budget * 1.1)) + 1e-9


def test_a_budget_out_of_reach_is_said_with_what_can_be_saved():
    with pytest.raises(UsageError, match=r"at most 50\.0%"):
        solve([[Choice(0, 0.0), Choice(5, 1.0)]], 10)
