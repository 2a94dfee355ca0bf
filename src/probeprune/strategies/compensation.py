"""Compensation: what makes up for the units that a cut removed.

Nothing, FLAP's bias, or a least-squares refit of the consumer. A compensation is a small frozen record; it
says what it needs and gives a function to call after every cut. How a refit is computed is in
`algebra/least_squares.py`, on which activations in `calibration/refit.py`. To add a compensation, write a
record and give it a row in `COMPENSATIONS`.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch

from probeprune.algebra.moments import Moments
from probeprune.errors import UsageError
from probeprune.model.partition import Partition
from probeprune.strategies import Part


@dataclass(frozen=True)
class Compensation:
    """No compensation, and the interface of all others.

    Attributes:
        kind: its key in `COMPENSATIONS`.
        needs: parts of `Statistics` that it needs.
    """

    kind: ClassVar[str] = "none"
    needs: ClassVar[frozenset[Part]] = frozenset()

    @property
    def adds_bias(self) -> bool:
        """Whether a consumer without a bias gets one."""
        return False

    def after_cut(
        self, partition: Partition, moments: Moments | None, consumer: "Consumer | None"
    ) -> Callable[[], None]:
        """A function to call whenever `partition` shows another choice of units.

        Called before the first cut, so that it may add tensors to `partition.companions`.

        Args:
            partition: the block's, showing all units in their original order.
            moments: of the block, if there are any.
            consumer: refitted to the units that stay, if there is one.
        """
        return lambda: None


@dataclass(frozen=True)
class Bias(Compensation):
    """FLAP's bias: add the mean output of the lost channels (An et al., AAAI 2024, equation 5)."""

    kind: ClassVar[str] = "bias"
    needs: ClassVar[frozenset[Part]] = frozenset({"moments"})

    @property
    def adds_bias(self) -> bool:
        return True

    def after_cut(
        self, partition: Partition, moments: Moments | None, consumer: "Consumer | None"
    ) -> Callable[[], None]:
        assert moments is not None
        mean = moments.mean.to(partition.order.device).clone()
        partition.companions.append(mean)

        def add() -> None:
            channels = partition.shown * partition.block.unit_width
            partition.add_bias(lost_bias(partition.consumer_weight, mean, channels))

        return add


@dataclass(frozen=True)
class Refit(Compensation):
    """Refit the consumer by least squares.

    Raises `UsageError` for values that make no refit.
    """

    kind: ClassVar[str] = "least-squares"
    needs: ClassVar[frozenset[Part]] = frozenset({"consumers"})

    windows: int = 128
    """Calibration windows to use at most, the first ones. Their hidden states are kept, twice if
    sequential."""
    damping: tuple[float, ...] = (0.3,)
    """Candidates for the damping, as a share of every channel's own second moment. Of several, each block
    takes the one with the smallest error on the windows held out, and keeps its weight where none lowers that
    error. One for all blocks makes the better model (docs/best.md)."""
    held_out: float = 0.125
    """Share of the calibration windows (the last ones) that the damping is chosen on. The weights are then
    fitted to all windows. No effect with one candidate."""
    sequential: bool = True
    """Fit a block to the activations of the model pruned and refitted so far; otherwise to those of the dense
    model."""
    share: float = 0.85
    """How much of the error that the residual stream has gathered in front of a block its refit makes up for,
    in [0, 1]; sequential only. No effect where a norm follows the consumer (Gemma)."""
    sensitivity: int = 8
    """Calibration windows to measure on how an error of a block's output changes the model's prediction. The
    choice of units (importance `obs`) weighs errors by it; 0 weighs all alike."""
    bias: bool = False
    """Give a consumer without a bias one, which few plain configs can hold. An existing bias is always
    refitted."""

    def __post_init__(self) -> None:
        if self.windows < 1:
            raise UsageError("a refit needs at least 1 window.")
        if not self.damping or not all(0 < d < float("inf") for d in self.damping):
            raise UsageError("a refit's damping must be one or more numbers above 0.")
        if not 0 < self.held_out < 1:
            raise UsageError(f"a refit's held_out={self.held_out} must be between 0 and 1.")
        if self.sensitivity < 0:
            raise UsageError("a refit's sensitivity is a number of windows, 0 or more.")
        if not 0 <= self.share <= 1:
            raise UsageError(f"a refit's share={self.share} must be in [0, 1].")
        if self.share and not self.sequential:
            raise UsageError("only a sequential refit knows an error to make up for: give share=0.")

    @property
    def adds_bias(self) -> bool:
        return self.bias

    def after_cut(
        self, partition: Partition, moments: Moments | None, consumer: "Consumer | None"
    ) -> Callable[[], None]:
        assert consumer is not None
        refitted = consumer
        return lambda: partition.replace_consumer(refitted.weight, refitted.bias)


COMPENSATIONS: dict[str, Compensation] = {c.kind: c for c in (Compensation(), Bias(), Refit())}
"""By name, with their default settings."""


def lost_bias(weight: torch.Tensor, mean: torch.Tensor, kept_channels: int) -> torch.Tensor:
    """FLAP's bias, `W[:, pruned] @ mean(z)[pruned]`: (d,), float32.

    Args:
        weight: the consumer's full weight (d, n), kept channels first.
        mean: mean of `z` over calibration tokens (n,), float32, in the same order.
        kept_channels: number of channels that stay.
    """
    return weight[:, kept_channels:].float() @ mean[kept_channels:]


@dataclass(frozen=True, eq=False)
class Consumer:
    """A block's consumer, refitted to the units that stay."""

    units: torch.Tensor
    """Ids of these units, ascending: LongTensor (kept,)."""
    weight: torch.Tensor
    """(d, kept channels), in the order of `units`."""
    bias: torch.Tensor | None
    """(d,); None where there is none."""
    damping: float | None
    """The candidate chosen; None where none was better than the weight before, which then stays."""
    error: float
    """Squared error of the block's output over the output's own variance, on the windows held out, fitted to
    the others; on all windows where none were held out."""
    error_before: float
    """The same for the weight before the refit."""
    inverse: torch.Tensor | None = None
    """Inverse of the damped second moment of the kept channels (kept, kept), float32, where the refit is to
    follow batches (`algebra/batch_refit.py`)."""
    mean: torch.Tensor | None = None
    """Mean of the kept channels (kept,), float32: moments are around it. None without a bias to refit."""

    def to(self, device: torch.device | str) -> "Consumer":
        """The same consumer on a device."""
        moved = {
            f.name: value.to(device)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), torch.Tensor)
        }
        return replace(self, **moved)  # type: ignore[arg-type]

    def record(self) -> dict[str, Any]:
        """Its figures as JSON values."""
        return {"damping": self.damping, "error": self.error, "error_before": self.error_before}
