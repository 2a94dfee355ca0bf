"""Compensation: what makes up for the units a cut removed.

A bias, or a refit of the consumer. How a refit is computed is in `least_squares.py`, on which activations
in `refit.py`; here is what can be asked for and what comes out.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from probeprune.errors import UsageError


def lost_bias(weight: torch.Tensor, mean: torch.Tensor, kept_channels: int) -> torch.Tensor:
    """FLAP's bias, `W[:, pruned] @ mean(z)[pruned]`: (d,), float32.

    Args:
        weight: the consumer's full weight (d, n), kept channels first.
        mean: mean of `z` over calibration tokens (n,), float32, in the same order.
        kept_channels: how many channels stay.
    """
    return weight[:, kept_channels:].float() @ mean[kept_channels:]


@dataclass(frozen=True)
class Refit:
    """How consumers are refitted by least squares.

    Raises `UsageError` for values that make no refit.
    """

    windows: int = 128
    """Calibration windows at most, the first ones: their hidden states are kept, twice if sequential."""
    damping: tuple[float, ...] = (0.3,)
    """Candidates for the damping, as a share of every channel's own second moment. Of several, each block
    takes the one with the smallest error on the windows held out, and keeps its weight where none lowers that
    error. One for all blocks makes the better model (docs/best.md)."""
    held_out: float = 0.125
    """Share of the calibration windows (the last ones) that the damping is chosen on. The weights are then
    fitted to all windows. Of no effect with one candidate."""
    sequential: bool = True
    """Whether a block is fitted to what the model pruned and refitted so far makes of the text; else to what
    the dense model makes of it."""
    share: float = 0.85
    """Of the error that the residual stream has gathered in front of a block, how much its refit makes up
    for, in [0, 1]; sequential only. Of no effect where a norm stands behind the consumer (Gemma)."""
    sensitivity: int = 8
    """Calibration windows on which it is measured what an error of a block's output does to the model's
    prediction, so that the choice of units (importance `obs`) weighs it by that; 0 weighs all alike."""
    batch_share: float = 0.35
    """Of the moments that MLPs are refitted to at a batch, the share that its probe has (as many tokens of it
    as `runtime.SAMPLE`; fewer have less), the calibration text having the others, in (0, 1); methods that
    follow the batch only."""
    bias: bool = False
    """Whether a consumer without a bias gets one, which few plain configs can hold. One that is there is
    always refitted."""

    def __post_init__(self) -> None:
        if self.windows < 1:
            raise UsageError("a refit needs at least 1 window.")
        if not self.damping or not all(0 < d < float("inf") for d in self.damping):
            raise UsageError("a refit's damping must be one or more numbers above 0.")
        if not 0 < self.held_out < 1:
            raise UsageError(f"a refit's held_out={self.held_out} must be between 0 and 1.")
        if not 0 < self.batch_share < 1:
            raise UsageError(f"a refit's batch_share={self.batch_share} must be between 0 and 1.")
        if self.sensitivity < 0:
            raise UsageError("a refit's sensitivity is a number of windows, 0 or more.")
        if not 0 <= self.share <= 1:
            raise UsageError(f"a refit's share={self.share} must be in [0, 1].")
        if self.share and not self.sequential:
            raise UsageError("only a sequential refit knows an error to make up for: give share=0.")


@dataclass(frozen=True, eq=False)
class Consumer:
    """A block's consumer, refitted to the units that stay."""

    units: torch.Tensor
    """Their ids, ascending: LongTensor (kept,)."""
    weight: torch.Tensor
    """(d, kept channels), in the order of `units`."""
    bias: torch.Tensor | None
    """(d,); None where there is none."""
    damping: float | None
    """The candidate chosen; None where none was better than the weight as it was, which then stays."""
    error: float
    """Squared error of the block's output on the windows held out, over the output's own variance there,
    fitted to the others; on all windows where none were held out."""
    error_before: float
    """The same, for the weight as it was."""
    inverse: torch.Tensor | None = None
    """Inverse of the damped second moment of the kept channels (kept, kept), float32, where the refit is to
    follow batches (`batch_refit.py`)."""
    mean: torch.Tensor | None = None
    """Of the kept channels (kept,), float32: moments are around it. None where there is no bias to refit."""

    def to(self, device: torch.device | str) -> "Consumer":
        """The same on a device."""
        moved = {
            f.name: value.to(device)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), torch.Tensor)
        }
        return replace(self, **moved)  # type: ignore[arg-type]

    def record(self) -> dict[str, Any]:
        """The figures as JSON has them."""
        return {"damping": self.damping, "error": self.error, "error_before": self.error_before}
