"""Schedule: when a method prunes. Never, once, while LoRA trains, or again at every batch.

One record per way, so that settings of one way cannot be given to another. The two dynamic ways lie in files
of their own: `probe_every_batch.py` and `refit_every_batch.py`. A dynamic method with state of its own is a
record like theirs and a `Follower` (CONTRIBUTING.md has an example).
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol

import torch

from probeprune.algebra.moments import Tokens
from probeprune.strategies import Part
from probeprune.strategies.probe import Probe, Selection
from probeprune.strategies.pruned_block import PrunedBlock

Stage = Literal["choose", "reuse", "keep", "refresh"]
"""What a pass of the model is to a dynamic method: a batch that is probed (`choose`) or runs under the choice
before (`reuse`); a pass that continues a cache under the prompt's choice (`keep`), or one that runs MLPs
dense and is its own probe (`refresh`)."""


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
        needs: parts of `Statistics` that it needs.
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
    """Train it all the same, as the control of methods with recovery."""

    @property
    def trains(self) -> bool:
        """Whether recovery follows."""
        return self.recovery


@dataclass(frozen=True)
class Once(When):
    """Prune once, after calibration."""

    kind: ClassVar[str] = "once"
    recovery: bool = False
    """Train the pruned model (LoRA)."""

    @property
    def trains(self) -> bool:
        """Whether recovery follows."""
        return self.recovery


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
    """The interface of dynamic schedules: a probe is run ahead of every batch."""

    every_batch: ClassVar[bool] = True
    chooses: ClassVar[bool] = True
    probe: Probe = field(default_factory=Probe)
    refresh: ClassVar[int] = 0
    """Tokens between two refreshes while decoding; 0 for none."""

    def follower(self, block: PrunedBlock) -> "Follower | None":
        """The state of one block under this schedule, before its first cut; None for a block that does not
        follow the batch."""
        raise NotImplementedError


class Follower(Protocol):
    """The state that a dynamic method keeps for one block, and its answer to a probe and to a pass."""

    def start(self) -> None:
        """Set up the state and make the first cut, before any batch."""

    def on_probe(self, z: torch.Tensor, selection: Selection, tokens: Tokens) -> None:
        """A probe has run ahead through the dense block.

        Args:
            z: its coupled activation (samples, tokens, n), channels in the partition's present order.
            selection: which samples and columns of the batch it is.
            tokens: of the whole batch.
        """

    def on_pass(self, z: torch.Tensor, tokens: Tokens, stage: Stage) -> None:
        """The model's own pass has gone through the consumer.

        Args:
            z: its input (batch, sequence, k): the channels in view, all of them in a refresh.
            tokens: which tokens are real.
            stage: see `Stage`.
        """
