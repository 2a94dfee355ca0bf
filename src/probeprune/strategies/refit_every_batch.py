"""Refit at every batch: keep the units, and refit the consumers of MLPs to each batch (this project).

A few evenly spaced tokens of the batch run through the dense block. Their outputs join the moments of the
calibration text, and the narrower consumer is solved anew, as a low-rank correction.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch.nn.functional import linear
from torch.profiler import record_function

from probeprune.algebra.batch_refit import Sample, refit_to_batch
from probeprune.algebra.moments import Tokens
from probeprune.errors import UsageError
from probeprune.model.blocks import Block
from probeprune.ranges import check_fields
from probeprune.strategies.probe import Probe, Selection
from probeprune.strategies.pruned_block import PrunedBlock
from probeprune.strategies.schedule import EveryBatch, Stage

SAMPLE = 256
"""Maximum number of probe tokens in a refit."""


@dataclass(frozen=True)
class RefitEveryBatch(EveryBatch):
    """Refit the consumers of MLPs to some tokens of every batch.

    Raises `UsageError` for a share outside (0, 1).
    """

    kind: ClassVar[str] = "refit"
    chooses: ClassVar[bool] = False

    probe: Probe = field(
        default_factory=lambda: Probe(tokens=1 / 64, samples=1.0, min_size=128, pick="even", pays="auto")
    )
    """The tokens of a batch that consumers are refitted to, and which batches those are: by default the ones
    for which it pays."""
    share: float = 0.35
    """Weight of the batch's probe tokens against calibration text. Reached at `SAMPLE` tokens; fewer weigh
    proportionally less."""

    def __post_init__(self) -> None:
        check_fields(self)

    def follows(self, block: Block) -> bool:
        return block.kind == "mlp"

    def sees(self, stage: Stage) -> bool:
        return stage == "choose"  # it learns nothing from a pass

    def follower(self, block: PrunedBlock) -> "BatchRefit":
        return BatchRefit(self, block)


class BatchRefit:
    """State of one MLP whose consumer is refitted at every batch."""

    def __init__(self, settings: RefitEveryBatch, block: PrunedBlock) -> None:
        self.settings, self.block = settings, block

    def start(self) -> None:
        """Set up the state and make the first cut."""
        if self.block.consumer is None or self.block.consumer.inverse is None:
            raise UsageError(
                f"the refit of {self.block.block.name} was made for a method that prunes once; "
                "prepare this one."
            )
        self.block.first_cut()

    def on_probe(self, z: torch.Tensor, selection: Selection, tokens: Tokens) -> None:
        """Answer a probe; see `Follower`."""
        start = self.block.consumer
        assert start is not None and start.inverse is not None
        with record_function("probeprune::refit"):
            z, real = z.flatten(0, 1), None
            count = min(len(z), SAMPLE)
            rows = torch.arange(count, device=z.device) * len(z) // count
            if tokens.valid is not None:
                real = tokens.valid[selection.samples][:, selection.tokens].flatten()[rows]
            z, partition = z[rows], self.block.partition
            target = linear(z, partition.consumer_weight, partition.consumer_bias).float()
            kept = z[:, : len(start.inverse)].float()  # the kept channels stand in front
            sample = Sample(kept, target, real, SAMPLE * (1 / self.settings.share - 1))
            self.block.show_consumer(
                *refit_to_batch(sample, start.weight, start.bias, start.inverse, start.mean)
            )

    def on_pass(self, z: torch.Tensor, tokens: Tokens, stage: Stage) -> None:
        """Take note of a pass; see `Follower`."""
        pass
