"""The first cut of experts: shown by `attach`, made permanent by `prune`. Chooses nothing."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from probeprune.calibration.statistics import Statistics
from probeprune.methods import Method
from probeprune.model.experts import Stack
from probeprune.model.stack_cut import StackCut
from probeprune.strategies.compensation import Consumer
from probeprune.strategies.pruned_block import Cut
from probeprune.strategies.widths import Prunable


@dataclass(frozen=True, eq=False)
class ExpertCut:
    """A stack of experts that loses units."""

    shown: StackCut
    units: torch.Tensor
    """Ids of those it keeps: (kept,) experts, or (experts, kept) channels of each."""
    consumer: Consumer | None = None
    """The experts' `down_proj` refitted to the channels they keep, for a method with a refit."""

    @property
    def stack(self) -> Stack:
        """The whole stack."""
        return self.shown.stack

    def show(self) -> None:
        """Show what stays alone, refitted if it was."""
        self.shown.keep(self.units)
        if self.consumer is not None:
            own = self.consumer.to(self.stack.device)
            self.shown.replace_consumers(own.weight, own.bias)


def stack_cuts(
    method: Method, blocks: Sequence[Prunable], cuts: Sequence[Cut], statistics: Statistics
) -> list[ExpertCut]:
    """The stacks of experts that lose units.

    Raises `UsageError` where refitted experts are missing or were made for other units.
    """
    found = []
    for block, cut in zip(blocks, cuts, strict=True):
        if not isinstance(block, Stack) or cut.width >= block.units:
            continue
        consumer, units = None, cut.units
        if "consumers" in method.compensation.needs:
            consumer = statistics.check_consumer(block, cut.width, cut.units)
            units = consumer.units
        assert units is not None
        found.append(ExpertCut(StackCut(block), units, consumer))
    return found
