"""Schedule: when a method prunes. Never, once (trained or not), while LoRA trains, or at every batch.

There is one record per schedule, so that settings of one cannot be given to another. The two dynamic
schedules have files of their own: `probe_every_batch.py` and `refit_every_batch.py`. To add a dynamic method
with state, write a record like theirs and a `Follower` (CONTRIBUTING.md has an example).
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol

import torch

from probeprune.algebra.moments import Tokens
from probeprune.model.blocks import Block
from probeprune.strategies import Part
from probeprune.strategies.probe import Probe, Selection
from probeprune.strategies.pruned_block import PrunedBlock

Stage = Literal["choose", "reuse", "keep", "refresh"]
"""The role of a forward pass in a dynamic method: a new batch that is probed (`choose`) or uses the previous
choice (`reuse`); a pass that continues a cache under the prompt's choice (`keep`), or that also runs MLPs
dense as its own probe (`refresh`)."""


@dataclass(frozen=True)
class When:
    """The interface of all schedules.

    Attributes:
        kind: its key in `methods.SCHEDULES`.
        prunes: False for the dense model.
        every_batch: whether the method is dynamic.
        chooses: whether it chooses units anew, by scores from the energies of a batch. If not, the units of
            the first cut stay.
        trains: whether the method includes training.
        needs: the parts of `Statistics` that it needs.
    """

    kind: ClassVar[str]
    prunes: ClassVar[bool] = True
    every_batch: ClassVar[bool] = False
    chooses: ClassVar[bool] = False
    needs: ClassVar[frozenset[Part]] = frozenset()

    @property
    def trains(self) -> bool:
        """Whether the method includes training."""
        return False


@dataclass(frozen=True)
class Never(When):
    """The dense model."""

    kind: ClassVar[str] = "never"
    prunes: ClassVar[bool] = False
    recovery: bool = False
    """Whether it is trained, as the control for methods with recovery."""

    @property
    def trains(self) -> bool:
        """Whether recovery follows."""
        return self.recovery


@dataclass(frozen=True)
class Once(When):
    """Prune once, after calibration."""

    kind: ClassVar[str] = "once"
    recovery: bool = False
    """Whether the pruned model is trained afterwards (LoRA)."""

    @property
    def trains(self) -> bool:
        """Whether recovery follows."""
        return self.recovery


@dataclass(frozen=True)
class Distilled(When):
    """Prune once, then train the pruned model (LoRA) towards the dense model's predictions."""

    kind: ClassVar[str] = "distilled"

    @property
    def trains(self) -> bool:
        """Always: the training is what it adds."""
        return True


@dataclass(frozen=True)
class DuringTraining(When):
    """Prune on a schedule while LoRA trains (LoRAPrune)."""

    kind: ClassVar[str] = "training"

    @property
    def trains(self) -> bool:
        """Always: the training prunes."""
        return True


@dataclass(frozen=True)
class EveryBatch(When):
    """The interface of dynamic schedules: a probe runs ahead of every batch."""

    every_batch: ClassVar[bool] = True
    chooses: ClassVar[bool] = True
    probe: Probe = field(default_factory=Probe)
    refresh: ClassVar[int] = 0
    """Number of tokens between two refreshes while decoding; 0 for none."""

    def sees(self, stage: Stage) -> bool:
        """Whether followers are shown passes of this stage. Others run without a hook of ours in any block.

        By default all but those that continue a cache, and these too where there are refreshes, for what is
        learnt in between.
        """
        return stage != "keep" or self.refresh > 0

    def follows(self, block: Block) -> bool:
        """Whether a block that loses units follows the batch; it keeps its first cut otherwise."""
        return True

    def follower(self, block: PrunedBlock) -> "Follower":
        """New state for one block that follows the batch, before its first cut."""
        raise NotImplementedError


class Follower(Protocol):
    """The state of a dynamic method for one block, and its reactions to a probe and to a pass."""

    def start(self) -> None:
        """Set up the state and make the first cut, before any batch."""

    def on_probe(self, z: torch.Tensor, selection: Selection, tokens: Tokens) -> None:
        """React to a probe that has run ahead through the dense block.

        Args:
            z: its coupled activation (samples, tokens, n), channels in the partition's present order.
            selection: the samples and columns of the batch in the probe.
            tokens: tokens of the whole batch.
        """

    def on_pass(self, z: torch.Tensor, tokens: Tokens, stage: Stage) -> None:
        """React to the model's own pass, behind the consumer, where the schedule `sees` it.

        Args:
            z: input of the consumer (batch, sequence, k): the channels in view, all of them in a refresh.
            tokens: which tokens are real.
            stage: see `Stage`.
        """
