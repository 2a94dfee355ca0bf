"""Statistics: everything one method must know of a model at one ratio, by block name."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from probeprune.algebra.moments import Moments
from probeprune.errors import UsageError
from probeprune.model.blocks import Block
from probeprune.strategies.allocation import Damage
from probeprune.strategies.compensation import Consumer


@dataclass(frozen=True)
class Statistics:
    """What calibration found out about a model's blocks; methods say which part they need."""

    moments: dict[str, Moments] = field(default_factory=dict)
    """Of every block's coupled activation, by block name (`calibrate`)."""
    saliences: dict[str, torch.Tensor] = field(default_factory=dict)
    """Of every row or column of the blocks' linear maps, by their name (`gradients.saliences`)."""
    damages: dict[str, Damage] = field(default_factory=dict)
    """Of every block, by its name (`surgery.method_damages`)."""
    consumers: dict[str, Consumer] = field(default_factory=dict)
    """Refitted to what one method keeps at one ratio, by block name (`surgery.method_consumers`)."""

    def check_moments(self, blocks: Sequence[Block]) -> None:
        """Raise `UsageError` unless these are moments of such blocks, and `FloatingPointError` for NaN."""
        for block in blocks:
            moments = self.moments.get(block.name)
            if moments is None or len(moments.mean) != block.width:
                raise UsageError(
                    f"the statistics do not fit {block.name}; they are of another model: calibrate this one."
                )
            if not all(bool(torch.isfinite(t).all()) for t in moments.state().values()):
                raise FloatingPointError(
                    f"calibration gave NaN or infinite statistics in {block.name}; use float32 or bfloat16."
                )

    def check_saliences(self, blocks: Sequence[Block]) -> None:
        """Likewise for saliences."""
        for m in (m for block in blocks for m in block.members):
            found = self.saliences.get(m.name)
            if found is None or len(found) != m.linear.weight.shape[m.axis]:
                raise UsageError(
                    f"there are no saliences that fit {m.name}; take them of this model with "
                    "probeprune.gradients.saliences."
                )
            if not torch.isfinite(found).all():
                raise FloatingPointError(f"the saliences of {m.name} are NaN or infinite.")

    def check_damages(self, blocks: Sequence[Block]) -> None:
        """Raise `UsageError` unless these are the damages of such blocks."""
        for block in blocks:
            found = self.damages.get(block.name)
            if found is None or found.curve.shape != (block.units + 1,):
                raise UsageError(
                    f"the statistics do not know what a cut of {block.name} would cost; collect the damages "
                    "on this very model: probeprune.surgery.method_damages."
                )

    def check_consumer(self, block: Block, keep: torch.Tensor | int) -> Consumer:
        """The block's refitted consumer. Raises `UsageError` unless it is refitted to these units, or to so
        many where the refit chose them."""
        found = self.consumers.get(block.name)
        count = keep if isinstance(keep, int) else len(keep)
        fits = found is not None and len(found.units) == count
        if found is not None and not isinstance(keep, int):
            fits = found.units.equal(keep.cpu())
        if found is None or not fits or found.weight.shape[1] != count * block.unit_width:
            raise UsageError(
                f"there is no consumer of {block.name} refitted to the units it keeps; refit with this "
                "model, method and ratio: probeprune.surgery.method_consumers."
            )
        return found

    def merge(self, other: "Statistics") -> None:
        """Take in statistics of other text on the same model (another process's share, say)."""
        for name, moments in self.moments.items():
            moments.merge(other.moments[name])
