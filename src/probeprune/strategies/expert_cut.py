"""The first cut of experts: shown by `attach`, made permanent by `prune`. Chooses nothing."""

from dataclasses import dataclass

import torch

from probeprune.model.experts import Stack
from probeprune.model.stack_cut import StackCut
from probeprune.strategies.compensation import Consumer


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
