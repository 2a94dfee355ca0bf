"""Gradient criteria: the salience of one row or column of a linear map, given the gradient of its weight.

Notation: a weight `w` with the gradient `g` of the mean language-model loss; sums run over the row
(producers) or column (consumers). To add a criterion, write its two functions and give it a row in
`CRITERIA`.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from probeprune.errors import BadValue, unknown
from probeprune.model.blocks import Member
from probeprune.model.experts import ExpertMap
from probeprune.ranges import check_fields

REDUCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sum": lambda parts: parts.sum(0),
    "mean": lambda parts: parts.mean(0),
    "max": lambda parts: parts.amax(0),
    "prod": lambda parts: parts.prod(0),
}
"""Ways to combine the saliences of the linear maps that a unit has a part in: (maps, units) to (units,)."""


@dataclass(frozen=True)
class Gradients:
    """Which gradients are taken, and how the parts of a unit are combined.

    Raises `UsageError` for a number out of range or an unknown reduction.
    """

    windows: int = 10
    """Number of calibration windows (10 in both published codes)."""
    length: int = 64
    """Tokens per window (LLM-Pruner 64, LoRAPrune 512)."""
    reduction: str = "sum"
    """A key of `REDUCTIONS`, over the linear maps that a unit has a part in (Taylor criteria)."""
    rank: int = 8
    """Rank of the random matrix A (`lora-guided`)."""
    draws: int = 8
    """Number of random matrices A to average over (`lora-guided`; the published code draws one)."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.reduction not in REDUCTIONS:
            raise BadValue("reduction", unknown("reduction", self.reduction, REDUCTIONS))


@dataclass(frozen=True)
class Settled:
    """The inputs of a criterion for one linear map, after the last sample.

    Attributes:
        means: the tensors of `Criterion.observe`, averaged over the samples.
        member: the linear map's part of a block.
        weight: its weight, float32.
        gradients: settings of the random matrices of `lora-guided`.
        seed: seed of these matrices.
    """

    means: Sequence[torch.Tensor]
    member: Member | ExpertMap
    weight: torch.Tensor
    gradients: Gradients
    seed: int


@dataclass(frozen=True)
class Criterion:
    """How gradients become saliences.

    `observe(g, member)` returns the tensors to average over samples, from the gradient of one sample
    (float32, shaped like the weight). `salience(settled)` turns the averages into a float32 tensor:
    (out_features,) for a producer, (in_features,) for a consumer.
    """

    formula: str
    observe: Callable[[torch.Tensor, Member | ExpertMap], tuple[torch.Tensor, ...]]
    salience: Callable[[Settled], torch.Tensor]
    gradients: Gradients = Gradients()
    """The published settings, which a method uses by default."""
    draws: bool = False
    """Whether the seed matters."""


def _summed(x: torch.Tensor, member: Member | ExpertMap) -> torch.Tensor:
    """Sum over each row of a producer or each column of a consumer."""
    return x.sum(1 - member.axis)


def _gradient(g: torch.Tensor, member: Member | ExpertMap) -> tuple[torch.Tensor, ...]:
    return (g,)


def _gradient_and_square(g: torch.Tensor, member: Member | ExpertMap) -> tuple[torch.Tensor, ...]:
    return g, g * g


def _squared_products(g: torch.Tensor, member: Member | ExpertMap) -> tuple[torch.Tensor, ...]:
    # Summed per sample: A itself, as large as the weight, is never kept.
    return (_summed((member.weight.float() * g).square(), member),)


def _first_order(settled: Settled) -> torch.Tensor:
    return _summed((settled.weight * settled.means[0]).abs_(), settled.member)


def _vectorized(settled: Settled) -> torch.Tensor:
    return _summed(settled.weight * settled.means[0], settled.member).abs_()


def _second_order(settled: Settled) -> torch.Tensor:
    return settled.means[0]


def _mixed(settled: Settled) -> torch.Tensor:
    g, squares = settled.means
    second = settled.weight * squares * settled.weight
    return _summed((settled.weight * g - 0.5 * second).abs_(), settled.member)


def _lora_guided(settled: Settled) -> torch.Tensor:
    g, w = settled.means[0], settled.weight
    total: torch.Tensor | float = 0.0
    for a in lora_matrices(settled):
        total = total + _summed(((g @ a.T) @ a * w).abs_(), settled.member)
    assert isinstance(total, torch.Tensor)
    return total / settled.gradients.draws


def lora_matrices(settled: Settled) -> Iterator[torch.Tensor]:
    """LoRA's matrices A (rank, in_features), drawn as PEFT does: Kaiming-uniform with a = sqrt(5)."""
    text = f"{settled.seed} {settled.member.name}".encode()
    seed = int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "little")
    generator = torch.Generator("cpu").manual_seed(seed)
    columns = settled.weight.shape[1]
    bound = 1 / math.sqrt(columns)
    for _ in range(settled.gradients.draws):
        a = torch.empty(settled.gradients.rank, columns, dtype=torch.float32, device="cpu")
        a.uniform_(-bound, bound, generator=generator)
        yield a.to(settled.weight.device)


CRITERIA: dict[str, Criterion] = {
    "param_first": Criterion("sum |w g|", _gradient, _first_order),
    "vectorize": Criterion("|sum w g|", _gradient, _vectorized),
    "param_second": Criterion("sum |w A w|, A = mean g_n^2", _squared_products, _second_order),
    "param_mix": Criterion("sum |w g - w A w / 2|", _gradient_and_square, _mixed),
    "lora-guided": Criterion(
        "sum |(dB A) w|, divided by its norm in each map",
        _gradient,
        _lora_guided,
        Gradients(length=512),
        draws=True,
    ),
}
"""Criteria by name. `param_first` and `vectorize`: LLM-Pruner, equation 3 and its vector-wise form.
`param_second` and `param_mix`: LLM-Pruner, equation 5, A the diagonal of its Hessian, estimated by the mean
of squared per-sample gradients. `lora-guided`: LoRAPrune, equation 8 at its first step, where B is zero and
`dB = g A^T`."""
