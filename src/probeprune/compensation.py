"""Compensation: what makes up for the units a cut removed."""

import torch


def lost_bias(weight: torch.Tensor, mean: torch.Tensor, kept_channels: int) -> torch.Tensor:
    """FLAP's bias, `W[:, pruned] @ mean(z)[pruned]`: (d,), float32.

    Args:
        weight: the consumer's full weight (d, n), kept channels first.
        mean: mean of `z` over calibration tokens (n,), float32, in the same order.
        kept_channels: how many channels stay.
    """
    return weight[:, kept_channels:].float() @ mean[kept_channels:]
