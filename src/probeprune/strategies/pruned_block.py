"""One block under a cut: its partition, the units it keeps, and its compensation.

Shared by surgery, which makes the cut permanent, and by the runtime, where a dynamic method cuts anew at
every batch. Nothing here waits for the device: counts stay on it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import record_function

from probeprune.algebra.moments import Moments
from probeprune.model.blocks import Block
from probeprune.model.partition import Partition
from probeprune.strategies import allocation
from probeprune.strategies.compensation import Compensation, Consumer
from probeprune.strategies.importance import ColumnNorms, Evidence


@dataclass(frozen=True, eq=False)
class Cut:
    """The first cut of one block."""

    width: int
    """Number of units that the block keeps."""
    units: torch.Tensor | None = None
    """Their ids, ascending: LongTensor (width,). None where a refit or each batch chooses them."""


class PrunedBlock:
    """A block of a model under a cut.

    Attributes:
        block: the block.
        width: number of units it keeps.
        partition: its weights, kept units first.
        first_units: ids of the first cut, LongTensor (width,); None where only a batch can choose.
        moments: moments of its coupled activation, if there are any.
        consumer: consumer refitted to `first_units`, if there is one.
        scorer: scores its units from energies, under a method that chooses units at every batch.
        swapped: LongTensor (), number of units brought into view so far.
        finite: BoolTensor (), whether the last scores or refitted weight were finite.
    """

    def __init__(
        self,
        block: Block,
        cut: Cut,
        compensation: Compensation,
        moments: Moments | None = None,
        consumer: Consumer | None = None,
        scorer: "BatchScorer | None" = None,
    ) -> None:
        self.block, self.width, self.scorer = block, cut.width, scorer
        self.partition = Partition(block)
        device = self.partition.order.device
        self.first_units = None if cut.units is None else cut.units.to(device)
        self.moments = None if moments is None else moments.to(device)
        self.consumer = None if consumer is None else consumer.to(device)
        self.swapped = torch.zeros((), dtype=torch.long, device=device)
        self.finite = torch.ones((), dtype=torch.bool, device=device)
        self._compensate = compensation.after_cut(self.partition, self.moments, self.consumer)

    def first_cut(self) -> None:
        """Show the units of the first cut, if there is one before any batch."""
        if self.first_units is not None:
            self._show(self.first_units)

    def score(self, energy: torch.Tensor) -> torch.Tensor:
        """Scores of the units (units,), by original ids, under the method's importance.

        Args:
            energy: of the channels (n,), float32, in the partition's present order.
        """
        assert self.scorer is not None
        with record_function("probeprune::score"):
            return self.scorer(energy, self.partition)

    def cut(self, scores: torch.Tensor) -> None:
        """Show the units with the best `scores` (units,), float32."""
        with record_function("probeprune::swap"):
            self.finite = torch.isfinite(scores).all()
            self._show(allocation.choose_units(scores, self.width, self.block))

    def show_consumer(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Replace the consumer's weight (d, kept channels) and bias (d,); see
        `Partition.replace_consumer`."""
        self.finite = torch.isfinite(weight).all()
        self.partition.replace_consumer(weight, bias)

    def _show(self, units: torch.Tensor) -> None:
        self.swapped += self.partition.keep(units)
        self._compensate()


class BatchScorer:
    """Scores a block's units from the energies of a batch. Create it before the block is first cut."""

    def __init__(self, block: Block, score: Callable[[Evidence], torch.Tensor], seed: int) -> None:
        self._block, self._score, self._seed = block, score, seed
        self._norms = ColumnNorms.of(block)

    def __call__(self, energy: torch.Tensor, partition: Partition) -> torch.Tensor:
        """Scores (units,) in the order of original ids, from energies (n,) in the partition's present
        order."""
        in_order = torch.empty_like(energy)
        in_order[partition.channels] = energy
        return self._score(Evidence(self._block, self._norms, energy=in_order, seed=self._seed))
