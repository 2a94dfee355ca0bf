"""Compensation: how the loss of units is made up for.

Nothing, FLAP's bias, or a least-squares refit of the consumer. A compensation is a small frozen record that
names its needs and returns a function to call after every cut. `algebra/least_squares.py` computes a refit;
`calibration/refit.py` provides its activations. To add a compensation, write a record and give it a row in
`COMPENSATIONS`.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch

from probeprune.algebra.moments import Moments
from probeprune.errors import UsageError
from probeprune.model.partition import Partition
from probeprune.ranges import check_fields
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
            moments: moments of the block, if there are any.
            consumer: consumer refitted to the kept units, if there is one.
        """
        return lambda: None


@dataclass(frozen=True)
class Bias(Compensation):
    """FLAP's bias: add the mean output of the removed channels (An et al., AAAI 2024, equation 5)."""

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

    Raises `UsageError` for values out of range.
    """

    kind: ClassVar[str] = "least-squares"
    needs: ClassVar[frozenset[Part]] = frozenset({"consumers"})

    windows: int = 128
    """Maximum number of calibration windows to use, from the first on. Their hidden states stay in memory,
    twice if sequential."""
    damping: tuple[float, ...] = (0.3,)
    """Candidates for the damping, as a share of every channel's own second moment. With several, each block
    takes the one with the smallest error on the held-out windows, and keeps its weight where none lowers that
    error. A single value for all blocks gives a better model (docs/best.md)."""
    held_out: float = 0.125
    """Share of the calibration windows (the last ones) on which the damping is chosen. The weights are then
    fitted to all windows. No effect with one candidate."""
    sequential: bool = True
    """Fit a block to the activations of the model pruned and refitted so far; otherwise to those of the dense
    model."""
    share: float = 0.85
    """Share, in [0, 1], of the error accumulated in the residual stream before a block that its refit makes
    up for; sequential only. No effect where a norm follows the consumer (Gemma)."""
    sensitivity: int = 8
    """Number of calibration windows on which to measure how an error in a block's output changes the model's
    prediction. The choice of units (importance `obs`) weights errors by it; 0 weights all errors equally."""
    bias: bool = False
    """Add a bias to a consumer without one; few plain configs can hold it. An existing bias is always
    refitted."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.damping:
            raise UsageError("a refit's damping must be one or more numbers above 0.")
        if self.share and not self.sequential:
            raise UsageError("only a sequential refit has an accumulated error to make up for: give share=0.")

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
"""Compensations by name, with default settings."""


def lost_bias(weight: torch.Tensor, mean: torch.Tensor, kept_channels: int) -> torch.Tensor:
    """FLAP's bias, `W[:, pruned] @ mean(z)[pruned]`: (d,), float32.

    Args:
        weight: the consumer's full weight (d, n), kept channels first.
        mean: mean of `z` over calibration tokens (n,), float32, in the same order.
        kept_channels: number of channels kept.
    """
    return weight[:, kept_channels:].float() @ mean[kept_channels:]


@dataclass(frozen=True, eq=False)
class Consumer:
    """A block's consumer, refitted to the kept units; or those of all experts of a layer, each to its own.
    Tensors of experts have one entry for each in front."""

    units: torch.Tensor
    """Ids of these units, ascending: LongTensor (kept,)."""
    weight: torch.Tensor
    """Weight (d, kept channels), in the order of `units`."""
    bias: torch.Tensor | None
    """Bias (d,), or None."""
    damping: float | None
    """The chosen candidate; None where none beat the original weight, which then stays. Of experts the median
    of those whose weights did not stay."""
    error: float
    """Squared error of the block's output over the variance of that output: on the held-out windows, after a
    fit to the others; on all windows where none were held out."""
    error_before: float
    """The same for the weight before the refit."""
    inverse: torch.Tensor | None = None
    """Inverse of the damped second moment of the kept channels (kept, kept), float32, for refits at every
    batch (`algebra/batch_refit.py`)."""
    mean: torch.Tensor | None = None
    """Mean of the kept channels (kept,), float32, around which moments are taken. None without a bias to
    refit."""

    def to(self, device: torch.device | str) -> "Consumer":
        """The same consumer on a device."""
        moved = {
            f.name: value.to(device)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), torch.Tensor)
        }
        return replace(self, **moved)  # type: ignore[arg-type]

    def record(self) -> dict[str, Any]:
        """The figures of the refit as JSON values."""
        return {"damping": self.damping, "error": self.error, "error_before": self.error_before}
