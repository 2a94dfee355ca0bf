"""Importance: statistics and weights in, one score per unit out. One function each.

Scores are float32; larger is more important. Channels are in their original order. To add an importance,
write a function and give it a row in `IMPORTANCES`. Nothing here decides how many units are removed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from probeprune.model.blocks import Block
from probeprune.model.experts import Expert
from probeprune.strategies import Part
from probeprune.strategies.criteria import CRITERIA, REDUCTIONS


@dataclass(frozen=True)
class ColumnNorms:
    """Norms of the consumer's weight `W` (d, n) that importances read, computed once: each (n,), float32."""

    absolute: torch.Tensor
    """sum_i |W_ij|"""
    squared: torch.Tensor
    """sum_i W_ij^2"""
    quartic: torch.Tensor
    """sqrt(sum_i W_ij^4)"""

    @classmethod
    @torch.no_grad()
    def of(cls, block: Block | Expert) -> "ColumnNorms":
        """The norms of the block's consumer, in the weight's present order."""
        weight = block.consumer_weight.float()
        squared = weight.square()
        return cls(weight.abs().sum(0), squared.sum(0), squared.square().sum(0).sqrt())


@dataclass(frozen=True)
class Evidence:
    """The inputs of an importance for one block; parts that are not available are None."""

    block: Block | Expert
    norms: ColumnNorms
    energy: torch.Tensor | None = None
    """`e_j` (n,): mean over samples of `z_j^2`, summed over positions."""
    variance: torch.Tensor | None = None
    """Var(z_j) (n,) over calibration tokens."""
    saliences: tuple[torch.Tensor, ...] = ()
    """One tensor per member of the block, summed over each unit: (units,)."""
    gates: torch.Tensor | None = None
    """What training has learned of each unit (`calibration/gates.py`): (units,)."""
    reduction: str = "sum"
    """A key of `criteria.REDUCTIONS`."""
    seed: int = 0
    """Seed for importances that draw random numbers."""


def _units(scores: torch.Tensor, block: Block | Expert) -> torch.Tensor:
    """Channel scores (n,) as (units, unit_width)."""
    return scores.view(block.units, block.unit_width)


def ppsp(evidence: Evidence) -> torch.Tensor:
    """PPsp (PP): `norm2_i(e_j W_ij^2) = e_j sqrt(sum_i W_ij^4)`; a head: 2-norm of its channels."""
    assert evidence.energy is not None
    return torch.linalg.vector_norm(_units(evidence.energy * evidence.norms.quartic, evidence.block), dim=1)


def wanda_sp(evidence: Evidence) -> torch.Tensor:
    """Wanda-sp (An et al. 2023, after Wanda): `sqrt(e_j) sum_i |W_ij|`; a head: sum over its channels."""
    assert evidence.energy is not None
    return _units(evidence.energy.sqrt() * evidence.norms.absolute, evidence.block).sum(1)


def flap(evidence: Evidence) -> torch.Tensor:
    """FLAP (An et al. 2023): `Var(z_j) sum_i W_ij^2`, standardised within the block; a head: mean."""
    assert evidence.variance is not None
    scores = evidence.variance * evidence.norms.squared
    scores = (scores - scores.mean()) / scores.std(correction=0).clamp_min(torch.finfo(scores.dtype).tiny)
    return _units(scores, evidence.block).mean(1)


def taylor(evidence: Evidence) -> torch.Tensor:
    """LLM-Pruner (Ma et al. 2023): saliences of a unit's rows and columns, combined over the members."""
    return REDUCTIONS[evidence.reduction](torch.stack(evidence.saliences))


def lora_guided(evidence: Evidence) -> torch.Tensor:
    """LoRAPrune (Zhang et al. 2023): saliences of each member, divided by their 2-norm, summed over
    members."""
    return sum_of_shares(evidence.saliences)


def sum_of_shares(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """`sum_m s_m / (norm2(s_m) + 1e-8)`: (units,), from one tensor (units,) per linear map."""
    return torch.stack([s / (torch.linalg.vector_norm(s) + 1e-8) for s in parts]).sum(0)


def magnitude(evidence: Evidence) -> torch.Tensor:
    """Control: 2-norm of all weights that a cut of the unit removes."""
    total = torch.zeros(evidence.block.units, dtype=torch.float32, device=evidence.norms.squared.device)
    for m in evidence.block.members:
        weight = m.part(m.weight, evidence.block.units)
        squares = weight.float().square().sum(1 - m.axis)
        total += squares.view(evidence.block.units, m.width).sum(1)
    return total.sqrt()


def random(evidence: Evidence) -> torch.Tensor:
    """Control: uniform numbers from the seed, the layer and the block's kind."""
    block = evidence.block
    seed = (evidence.seed * 1009 + block.layer) * 2 + (block.kind == "mlp")
    generator = torch.Generator("cpu").manual_seed(seed)
    scores = torch.rand(block.units, generator=generator, dtype=torch.float32, device="cpu")
    return scores.to(evidence.norms.squared.device)


def gates(evidence: Evidence) -> torch.Tensor:
    """The logits of scales that were trained under the budget (`calibration/gates.py`)."""
    assert evidence.gates is not None
    return evidence.gates


@dataclass(frozen=True)
class Importance:
    """An importance function and its needs."""

    score: Callable[[Evidence], torch.Tensor] | None
    """The function; None where the refit of the block orders its units (`calibration/refit.py`)."""
    formula: str
    needs: frozenset[Part] = frozenset()
    """Parts of `Statistics` that the scores read."""
    from_batch: bool = False
    """Whether the energy of a batch suffices for the scores, so that a probe can choose units."""
    criterion: str | None = None
    """A key of `CRITERIA`, for an importance that reads saliences."""
    draws: bool = False
    """Whether the seed matters."""

    @property
    def ordered_by_refit(self) -> bool:
        """Whether units are ordered by the refit, not by scores."""
        return self.score is None

    @property
    def learned(self) -> bool:
        """Whether scores come from training, which itself starts from those of another importance."""
        return "gates" in self.needs


def by_gradients(score: Callable[[Evidence], torch.Tensor], criterion: str) -> Importance:
    """The record of an importance that scores units by saliences; `criterion` is a key of `CRITERIA`."""
    record = CRITERIA[criterion]
    return Importance(
        score, record.formula, frozenset({"saliences"}), criterion=criterion, draws=record.draws
    )


_MOMENTS: frozenset[Part] = frozenset({"moments"})

IMPORTANCES: dict[str, Importance] = {
    "ppsp": Importance(ppsp, "e_j sqrt(sum_i W_ij^4)", _MOMENTS, from_batch=True),
    "wanda-sp": Importance(wanda_sp, "sqrt(e_j) sum_i |W_ij|", _MOMENTS, from_batch=True),
    "flap": Importance(flap, "Var(z_j) sum_i W_ij^2, standardised", _MOMENTS),
    "param_first": by_gradients(taylor, "param_first"),
    "vectorize": by_gradients(taylor, "vectorize"),
    "param_second": by_gradients(taylor, "param_second"),
    "param_mix": by_gradients(taylor, "param_mix"),
    "lora-guided": by_gradients(lora_guided, "lora-guided"),
    "gates": Importance(gates, "logits of scales trained by KL under the budget", frozenset({"gates"})),
    "obs": Importance(None, "damage of leaving, all others refitted, one by one", frozenset({"consumers"})),
    "magnitude": Importance(magnitude, "norm2 of the unit's weights"),
    "random": Importance(random, "uniform random numbers", draws=True),
}
