"""Statistics: everything that one method needs to know about a model at one ratio, by block name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from probeprune.algebra.moments import Moments
from probeprune.algebra.routed_moments import RoutedMoments
from probeprune.errors import UsageError
from probeprune.model.blocks import Block
from probeprune.model.experts import Stack
from probeprune.strategies import Part
from probeprune.strategies.compensation import Consumer
from probeprune.strategies.widths import Damage, Prunable


@dataclass(frozen=True)
class Statistics:
    """Statistics of a model's blocks. Which parts are filled depends on the method (`plan.needs`)."""

    moments: Mapping[str, Moments] = field(default_factory=dict)
    """Moments of every block's coupled activation, by block name (`calibration/collecting.py`)."""
    routed: Mapping[str, RoutedMoments] = field(default_factory=dict)
    """Moments of the experts of every sparse layer, by the stack's name (`calibration/routed.py`)."""
    saliences: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Saliences of every row or column of the blocks' linear maps, by the name of the map
    (`calibration/gradients.py`)."""
    gates: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Learned scores of the units of every block, by block name (`calibration/gates.py`)."""
    damages: Mapping[str, Damage] = field(default_factory=dict)
    """Damage of every block, by block name (`calibration/damage.py`)."""
    consumers: Mapping[str, Consumer] = field(default_factory=dict)
    """Consumers refitted to the units that one method keeps at one ratio, by block name
    (`calibration/refit.py`)."""

    def check(self, parts: frozenset[Part], all_blocks: Sequence[Prunable], experts: bool = False) -> None:
        """Raise `UsageError` unless these parts are present and fit the blocks; `FloatingPointError` for NaN.

        With `experts`, saliences of experts are parts too. Consumers are checked one by one, against the
        units that each was made for (`check_consumer`).
        """
        blocks = [b for b in all_blocks if isinstance(b, Block)]
        if "routed" in parts:
            self._check_routed([b for b in all_blocks if isinstance(b, Stack)])
        if "moments" in parts:
            self._check_moments(blocks)
        if "saliences" in parts:
            stacks = [b for b in all_blocks if isinstance(b, Stack) and experts]
            self._check_saliences(blocks, stacks)
        if "damages" in parts:
            self._check_damages(blocks)
        if "gates" in parts:
            self._check_gates(blocks)

    def _check_moments(self, blocks: Sequence[Block]) -> None:
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

    def _check_routed(self, stacks: Sequence[Stack]) -> None:
        for stack in stacks:
            routed = self.routed.get(stack.name)
            if routed is None or routed.mean.shape != (stack.experts, stack.width):
                raise UsageError(
                    f"the statistics do not fit {stack.name}; they are of another model: calibrate this one."
                )
            if not all(bool(torch.isfinite(t).all()) for t in routed.state().values()):
                raise FloatingPointError(
                    f"calibration gave NaN or infinite statistics in {stack.name}; use float32 or bfloat16."
                )

    def _check_saliences(self, blocks: Sequence[Block], stacks: Sequence[Stack]) -> None:
        for stack in stacks:
            rows = (2 if stack.record.gated else 1) * stack.width
            sizes = {stack.record.producer: rows, "down_proj": stack.width}
            for key, size in sizes.items():
                name = f"{stack.name}.{key}"
                own = self.saliences.get(name)
                if own is None or own.shape != (stack.experts, size):
                    raise UsageError(f"there are no saliences that fit {name}; prepare this very model.")
                if not torch.isfinite(own).all():
                    raise FloatingPointError(f"the saliences of {name} are NaN or infinite.")
        for m in (m for block in blocks for m in block.members):
            saliences = self.saliences.get(m.name)
            if saliences is None or len(saliences) != m.weight.shape[m.axis]:
                raise UsageError(f"there are no saliences that fit {m.name}; prepare this very model.")
            if not torch.isfinite(saliences).all():
                raise FloatingPointError(f"the saliences of {m.name} are NaN or infinite.")

    def _check_damages(self, blocks: Sequence[Block]) -> None:
        for block in blocks:
            damage = self.damages.get(block.name)
            if damage is None or damage.curve.shape != (block.units + 1,):
                raise UsageError(f"there is no damage curve that fits {block.name}; prepare this very model.")

    def _check_gates(self, blocks: Sequence[Block]) -> None:
        for block in blocks:
            scores = self.gates.get(block.name)
            if scores is None or scores.shape != (block.units,):
                raise UsageError(f"there are no gates that fit {block.name}; prepare this very model.")
            if not torch.isfinite(scores).all():
                raise FloatingPointError(f"the gates of {block.name} are NaN or infinite.")

    def check_consumer(self, block: Prunable, width: int, units: torch.Tensor | None) -> Consumer:
        """The refitted consumer of a block, or those of a stack of experts.

        Raises `UsageError` unless it was made for these units, or for `width` units that the refit chose.
        """
        consumer = self.consumers.get(block.name)
        of_one = 1 if isinstance(block, Stack) else block.unit_width
        fits = consumer is not None and consumer.units.shape[-1] == width
        if consumer is not None and units is not None:
            fits = consumer.units.equal(units.cpu())
        if consumer is None or not fits or consumer.weight.shape[-1] != width * of_one:
            raise UsageError(
                f"there is no consumer of {block.name} refitted to the units it keeps; prepare this model, "
                "method and ratio: probeprune.prepare."
            )
        return consumer
