"""Importance of experts: what the tokens routed to them say, and their weights, in; one score a unit out.

Channels of an expert are scored by the method's own importance, with the expert as a block of its own whose
statistics are those of its tokens. Whole experts have importances of their own, in `EXPERT_IMPORTANCES`.
Scores are float32; larger is more important.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from probeprune.algebra.leaving import leaving_order
from probeprune.algebra.routed_moments import RoutedMoments
from probeprune.model.experts import Expert, Stack
from probeprune.strategies.importance import IMPORTANCES, ColumnNorms, Evidence


@dataclass(frozen=True)
class ExpertImportance:
    """An importance of whole experts."""

    score: Callable[[Stack, RoutedMoments | None, int], torch.Tensor]
    """From the stack, moments of its experts and a seed: scores (experts,)."""
    formula: str
    routed: bool = True
    """Whether it reads the moments."""
    exchange: bool = False
    """Whether it reads what the output changes by when an expert leaves."""


def reap(stack: Stack, moments: RoutedMoments | None, seed: int) -> torch.Tensor:
    """REAP (Lasby et al. 2025, arXiv 2510.13999): the mean over an expert's tokens of the router's weight
    times the 2-norm of the expert's output. Where the weight multiplies the input (LLaMA 4), the norm of what
    the expert adds."""
    assert moments is not None
    return moments.mean_contribution


def total(stack: Stack, moments: RoutedMoments | None, seed: int) -> torch.Tensor:
    """The same, summed over an expert's tokens and divided by all tokens: seldom used experts count less."""
    assert moments is not None
    return moments.contribution / moments.tokens.clamp_min(1)


def frequency(stack: Stack, moments: RoutedMoments | None, seed: int) -> torch.Tensor:
    """The share of tokens that the router sends to an expert."""
    assert moments is not None
    return moments.count / moments.tokens.clamp_min(1)


def refit(stack: Stack, moments: RoutedMoments | None, seed: int) -> torch.Tensor:
    """The squared error per token of the layer's experts when it has left, and all that leave before it
    (`leaving.leaving_order`): their tokens go to the experts that the router takes without them, and those
    that are left have been given the best scale each. An order by elimination, one expert after the other."""
    assert moments is not None
    order, damages = leaving_order(moments.exchange / moments.tokens.clamp_min(1))
    ranks = torch.arange(len(order), dtype=damages.dtype, device=damages.device)
    scores = torch.empty_like(damages)
    scores[order] = (
        damages + 1e-6 * damages[-1] * ranks
    )  # where the error stays, who leaves later is worth more
    return scores.float()


def magnitude(stack: Stack, moments: RoutedMoments | None, seed: int) -> torch.Tensor:
    """Control: 2-norm of all weights of an expert's matrices."""
    squares = torch.zeros(stack.experts, dtype=torch.float32, device=stack.device)
    for name in (stack.record.producer, "down_proj"):
        for i in range(stack.experts):
            squares[i] += stack.matrix(name, i).float().square().sum()
    return squares.sqrt()


def random(stack: Stack, moments: RoutedMoments | None, seed: int) -> torch.Tensor:
    """Control: uniform numbers from the seed and the layer."""
    return _uniform(stack, (stack.experts,), seed)


EXPERT_IMPORTANCES: dict[str, ExpertImportance] = {
    "reap": ExpertImportance(reap, "mean over its tokens of g(x) norm2(f(x))"),
    "total": ExpertImportance(total, "sum over its tokens of g(x) norm2(f(x)), over all tokens"),
    "frequency": ExpertImportance(frequency, "share of tokens routed to it"),
    "refit": ExpertImportance(
        refit, "squared error when it leaves, others taking over and rescaled, one by one", exchange=True
    ),
    "magnitude": ExpertImportance(magnitude, "norm2 of its weights", routed=False),
    "random": ExpertImportance(random, "uniform random numbers", routed=False),
}
"""Importances of whole experts by name: `g` is the router's weight of an expert, `f` its output."""

CHANNEL_IMPORTANCES = ("ppsp", "wanda-sp", "flap", "magnitude", "random", "obs")
"""Importances that are defined for channels of experts beside those from gradients; by `obs` the refit orders
them."""


def scores_channels(importance: str) -> bool:
    """Whether an importance of blocks is defined for channels of experts."""
    return importance in CHANNEL_IMPORTANCES or IMPORTANCES[importance].criterion is not None


def channel_scores(
    stack: Stack,
    importance: str,
    moments: RoutedMoments | None,
    seed: int,
    saliences: Mapping[str, torch.Tensor] | None = None,
    reduction: str = "sum",
) -> torch.Tensor:
    """Scores of the channels of each expert by an importance of blocks: (experts, channels).

    Args:
        stack: the experts.
        importance: a key of `IMPORTANCES`.
        moments: of the experts, where it reads them.
        seed: for random numbers.
        saliences: of the stack's `gate_up_proj` and `down_proj`, by these names, where it reads them:
            (experts, rows or columns).
        reduction: how those of a channel's matrices are combined.
    """
    score = IMPORTANCES[importance].score
    assert score is not None and scores_channels(importance)
    if importance == "random":
        return _uniform(stack, (stack.experts, stack.width), seed)
    energy = None if moments is None else moments.sample_energy
    variance = None if moments is None else moments.variance

    def own(i: int) -> torch.Tensor:
        expert = stack.expert(i)
        return score(
            Evidence(
                expert,
                ColumnNorms.of(expert),
                energy=None if energy is None else energy[i],
                variance=None if variance is None else variance[i],
                saliences=() if saliences is None else _parts(expert, saliences, i),
                reduction=reduction,
            )
        )

    return torch.stack([own(i) for i in range(stack.experts)])


def _parts(expert: Expert, saliences: Mapping[str, torch.Tensor], index: int) -> tuple[torch.Tensor, ...]:
    """One tensor (channels,) for each part of an expert's matrices."""
    keys = [*["gate_up_proj"] * (len(expert.members) - 1), "down_proj"]
    return tuple(
        saliences[key][index].narrow(0, m.start, expert.units * m.width).view(expert.units, m.width).sum(1)
        for key, m in zip(keys, expert.members, strict=True)
    )


def by_rank(scores: torch.Tensor) -> torch.Tensor:
    """One score for each width that a stack may have, from those of its experts' channels: (channels,).

    A stack that loses a channel loses the least important one of every expert, so entry `i` is the mean over
    experts of their scores of rank `i`.
    """
    return scores.sort(dim=1, descending=True).values.mean(0)


def _uniform(stack: Stack, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed((seed * 1009 + stack.layer) * 2 + 2**32)
    return torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu").to(stack.device)
