"""The plan: scores of every block's units from calibration, and how many each block keeps.

What `attach` opens as a window and `prune` cuts for good. Nothing here touches a weight.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from probeprune.calibration.statistics import Statistics
from probeprune.errors import UsageError
from probeprune.methods import Method
from probeprune.model.blocks import Block
from probeprune.strategies import allocation
from probeprune.strategies.importance import IMPORTANCES, ColumnNorms, Evidence

Scores = torch.Tensor
"""Importance of a block's units (units,), float32; larger is more important."""


@dataclass(frozen=True)
class Kept:
    """What one block keeps: unit ids of the model as given, ascending."""

    name: str
    kind: Literal["attention", "mlp"]
    units: tuple[int, ...]
    of: int


def check_statistics(method: Method, blocks: Sequence[Block], statistics: Statistics | None) -> Statistics:
    """The statistics, once they are known to be what `method` needs for these blocks.

    Raises `UsageError` where a part is missing or of another model, `FloatingPointError` where one is NaN.
    """
    if statistics is None:
        if method.needs_calibration:
            raise UsageError(
                f"method {method.name!r} needs statistics: give statistics=calibrate(model, windows)"
                + (", with saliences" if method.needs_gradients else "")
                + (", with damages" if method.needs_damages else "")
                + (", with consumers" if method.needs_refit else "")
                + "."
            )
        return Statistics()
    if method.needs_moments:
        statistics.check_moments(blocks)
    if method.needs_gradients:
        statistics.check_saliences(blocks)
    if method.needs_damages:
        statistics.check_damages(blocks)
    return statistics


def static_scores(method: Method, block: Block, statistics: Statistics) -> Scores | None:
    """Scores of a block's units before any batch was seen, or None where a method has none to give."""
    importance = IMPORTANCES[method.importance]
    moments = statistics.moments.get(block.name)
    if method.when == "never" or importance.score is None:
        return None
    if moments is None and importance.needs in ("energy", "variance"):
        return None
    device = block.consumer.weight.device
    if moments is not None:
        moments = moments.to(device)
    parts: tuple[torch.Tensor, ...] = ()
    if importance.needs == "gradients":
        parts = tuple(
            m.part(statistics.saliences[m.name].to(device), block.units).view(block.units, m.width).sum(1)
            for m in block.members
        )
    return importance.score(
        Evidence(
            block,
            ColumnNorms.of(block),
            energy=None if moments is None else moments.sample_energy,
            variance=None if moments is None else moments.variance,
            saliences=parts,
            reduction=method.gradients.reduction if method.gradients else "sum",
            seed=method.seed,
        )
    )


def widths(
    method: Method,
    ratio: float,
    blocks: Sequence[Block],
    scores: Sequence[Scores | None],
    statistics: Statistics | None = None,
) -> list[int]:
    """Units each block keeps under the method's allocation. Raises `UsageError` for an impossible ratio.

    `statistics` are needed for damages only.
    """
    allocation.check_ratio(ratio)
    if method.when == "never" or not ratio:
        return [b.units for b in blocks]
    if method.allocation == "global":
        known = [s for s in scores if s is not None]
        return allocation.global_threshold(
            blocks, known, ratio, skip_layers=method.skip_layers, kinds=method.blocks
        )
    rules: dict[str, Callable[..., list[int]]] = {
        "uniform": allocation.uniform,
        "even": allocation.even,
        "damage": allocation.least_damage,
        "damage-even": allocation.least_damage_even,
    }
    options: dict[str, Any] = {}
    if method.allocation == "nominal-kept":
        options["floor_kept"] = True
    if method.needs_damages:
        assert statistics is not None
        options["damages"] = [statistics.damages[b.name] for b in blocks]
    return rules.get(method.allocation, allocation.nominal)(
        blocks,
        ratio,
        skip_layers=method.skip_layers,
        round_to=method.round_to,
        kinds=method.blocks,
        **options,
    )


def check_finite(scores: Scores, block: Block) -> None:
    """Raise `FloatingPointError` for scores that order nothing."""
    if not scores.is_meta and not torch.isfinite(scores).all():
        raise overflow(block)


def overflow(block: Block) -> FloatingPointError:
    """What to raise where the scores of a block's units, or its refitted weight, are not finite."""
    return FloatingPointError(
        f"the importance or the refit of {block.name} is NaN or infinite; the model's activations overflowed."
    )
