"""Perplexity of a causal LM, as it stands, on windows of tokens.

Every token of a window but the first is predicted from those before it in the window; no special tokens.
The decoder runs whole batches (dynamic pruning sees them), the output head a few windows at a time, because
logits of a whole batch would be the largest tensor by far. Knows nothing of pruning.
"""

import math
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from probeprune.data.windows import batches
from probeprune.errors import UsageError
from probeprune.evaluation.likelihood import HEAD_TOKENS, next_token_logits
from probeprune.model.cost import counting_flops, synced_clock
from probeprune.model.passes import check_windows, find_decoder

Averaging = Literal["token", "published"]


@dataclass(frozen=True)
class Perplexity:
    """A measured perplexity.

    Attributes:
        value: exp of the mean loss.
        standard_error: of `value`, over windows (delta method); NaN for a single window.
        losses: mean loss of each window, in nats a token.
        tokens: tokens run through the decoder.
        seconds: spent in the decoder's forward passes, the output head left out.
        tokens_per_second: of the median batch through the decoder.
        flops_per_token: matrix-product FLOPs of the decoder, counted on the first batch as it ran.
    """

    value: float
    standard_error: float
    losses: tuple[float, ...]
    tokens: int
    seconds: float
    tokens_per_second: float
    flops_per_token: float


def perplexity(
    model: nn.Module,
    windows: torch.Tensor,
    *,
    batch_size: int = 16,
    averaging: Averaging = "token",
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Perplexity on `windows` (count, length >= 2), in order, the short last batch included.

    Args:
        model: a causal LM in eval mode, with or without a method attached.
        windows: LongTensor, from `data.evaluation_windows` say.
        batch_size: windows a forward pass; dynamic methods choose units for each pass anew.
        averaging: `token` weighs every predicted token alike. `published` is the research code's: the mean
            over batches of each batch's mean, an incomplete last batch dropped; for comparing with published
            tables, together with `sampling="published"`.
        progress: called with (windows done, windows in all).

    Raises:
        UsageError: windows too short or longer than the model's positions, or too few for `published`.
        FloatingPointError: a loss that is not finite.
    """
    check_windows(model, windows)
    if windows.shape[1] < 2:
        raise UsageError("windows need at least 2 tokens: the first predicts the second.")
    if averaging == "published":
        windows = windows[: len(windows) // batch_size * batch_size]
    elif averaging != "token":
        raise UsageError(f"unknown averaging {averaging!r}; choose token or published.")
    if not len(windows):
        raise UsageError(f"there is no full batch of {batch_size} windows; lower the batch size.")
    decoder, device = find_decoder(model), next(model.parameters()).device
    losses: list[float] = []
    rates: list[float] = []
    seconds = 0.0
    flops_per_token = math.nan
    with torch.inference_mode():
        for batch in batches(windows, batch_size):
            ids = batch.to(device)
            with nullcontext() if losses else counting_flops() as count:
                started = synced_clock(device)
                hidden = decoder(input_ids=ids, use_cache=False)[0]
                took = synced_clock(device) - started
            if count is not None:
                flops_per_token = count.flops / ids.numel()
            seconds += took
            rates.append(ids.numel() / took)
            losses += window_losses(model, hidden, ids).tolist()
            if not math.isfinite(losses[-1]):
                raise FloatingPointError("the model's loss is NaN or infinite; try another dtype.")
            if progress is not None:
                progress(len(losses), len(windows))
    value = math.exp(statistics.fmean(losses))
    spread = statistics.stdev(losses) / math.sqrt(len(losses)) if len(losses) > 1 else math.nan
    return Perplexity(
        value=value,
        standard_error=value * spread,
        losses=tuple(losses),
        tokens=windows.numel(),
        seconds=seconds,
        tokens_per_second=statistics.median(rates),
        flops_per_token=flops_per_token,
    )


def window_losses(model: nn.Module, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Mean next-token loss of each window: (batch,), float64.

    Args:
        model: the causal LM; its output head is applied here.
        hidden: last hidden states of its decoder (batch, length, hidden).
        ids: the windows (batch, length).
    """
    per_step = max(1, HEAD_TOKENS // ids.shape[1])
    losses = []
    for h, target in zip(hidden.split(per_step), ids.split(per_step), strict=True):
        logits = next_token_logits(model, h[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten(), reduction="none")
        losses.append(loss.view(len(h), -1).double().mean(1))
    return torch.cat(losses)
