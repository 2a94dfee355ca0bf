"""Perplexity of a causal LM on windows of tokens.

Each token of a window except the first is predicted from the tokens before it; no special tokens are added.
The decoder runs whole batches, because dynamic pruning depends on them. The output head runs a few windows at
a time, because the logits of a whole batch would be by far the largest tensor. Knows nothing of pruning.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

from probeprune.data.windows import batches
from probeprune.errors import UsageError, unknown
from probeprune.model.decoding import decoded, next_token_losses
from probeprune.model.passes import is_followed, token_windows
from probeprune.model.wrappers import unwrapped
from probeprune.processes import shares
from probeprune.progress import Progress, silent
from probeprune.ranges import plain

Averaging = Literal["token", "published"]


@dataclass(frozen=True)
class Perplexity:
    """A measured perplexity.

    Attributes:
        value: exp of the mean loss.
        standard_error: of `value`, over windows (delta method); NaN for a single window.
        losses: mean loss of each window, in nats per token.
        tokens: number of tokens run through the decoder.
        seconds: time of the decoder's forward passes, without the output head.
        tokens_per_second: throughput of the decoder on the median batch.
        flops_per_token: matrix-product FLOPs of the decoder, counted during the first batch.
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
    see: Callable[[int, torch.Tensor], None] | None = None,
    progress: Progress = silent,
) -> Perplexity:
    """Measure perplexity on `windows` (count, length >= 2), in order, including a shorter last batch.

    Args:
        model: a causal LM in eval mode, with or without a method attached.
        windows: LongTensor of token ids, for example from `data.windows.evaluation_windows`.
        batch_size: windows per forward pass; dynamic methods choose units for each pass.
        averaging: `token` weighs every predicted token equally. `published` follows the research code: the
            mean of the batches' means, without an incomplete last batch. Use it with `sampling="published"`
            to compare with published tables.
        see: called with the logits (tokens, vocabulary) of all predicted tokens, some at a time, and with the
            number of the first of them: window w of length l begins with number w (l - 1). Where work is
            shared out over processes, each sees those of its own windows.
        progress: called with (`perplexity`, windows done, windows in all).

    Where work is shared out over processes, each takes some of the windows, and all of them under a method
    that follows the batches. `tokens_per_second` is then that of one process, `seconds` of the slowest.

    Raises:
        UsageError: windows too short or longer than the model's positions, or too few for `published`.
        FloatingPointError: a loss that is not finite.
    """
    model, batch_size = unwrapped(model), plain("batch_size", batch_size)
    windows = scored_windows(model, windows, batch_size, averaging)
    divided = not is_followed(model)
    own = shares.own_rows(windows) if divided else windows
    parts = [*batches(own, batch_size)]
    losses: list[float] = []
    rates: list[float] = []
    seconds = 0.0
    flops_per_token = math.nan
    first = shares.own(len(windows)).start if divided else 0
    watched = None if see is None else _Numbered(see, first * (windows.shape[1] - 1))
    with shares.alike(), torch.inference_mode():
        for batch, found in zip(parts, decoded(model, parts, progress=progress), strict=True):
            if found.flops is not None:
                flops_per_token = found.flops / batch.numel()
            seconds += found.seconds
            rates.append(batch.numel() / found.seconds)
            ids = batch.to(found.hidden.device)
            losses += window_losses(model, found.hidden, ids, watched).tolist()
            if not math.isfinite(losses[-1]):
                raise FloatingPointError("the model's loss is NaN or infinite; try another dtype.")
            progress("perplexity", len(losses), len(own))
    if divided:
        losses, rates = shares.gathered(losses), shares.gathered(rates)
        seconds, flops_per_token = max(shares.gathered([seconds])), shares.agreed(flops_per_token)
    value = math.exp(statistics.fmean(losses))
    return Perplexity(
        value=value,
        standard_error=value * mean_error(losses),
        losses=tuple(losses),
        tokens=windows.numel(),
        seconds=seconds,
        tokens_per_second=statistics.median(rates),
        flops_per_token=flops_per_token,
    )


def mean_error(values: Sequence[float]) -> float:
    """The standard error of the mean of some values; NaN for a single one."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def scored_windows(
    model: nn.Module, windows: torch.Tensor, batch_size: int, averaging: Averaging = "token"
) -> torch.Tensor:
    """The windows that count under this averaging. Raises `UsageError` if there are none, or unfit ones."""
    windows = token_windows(model, windows)
    if windows.shape[1] < 2:
        raise UsageError("windows need at least 2 tokens: the first predicts the second; use longer windows.")
    if averaging == "published":
        windows = windows[: len(windows) // batch_size * batch_size]
    elif averaging != "token":
        raise UsageError(unknown("averaging", averaging, get_args(Averaging)))
    if not len(windows):
        raise UsageError(f"there is no full batch of {batch_size} windows; lower the batch size.")
    return windows


def window_losses(
    model: nn.Module,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    see: Callable[[torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Mean next-token loss of each window: (batch,), float64.

    Args:
        model: the causal LM, for its output head.
        hidden: its decoder's last hidden states (batch, length, hidden).
        ids: the windows (batch, length).
        see: as in `next_token_losses`.
    """
    return next_token_losses(model, hidden, ids, see).double().mean(1)


class _Numbered:
    """Calls `see` with the number of the first of some tokens that come in a row, and their logits."""

    def __init__(self, see: Callable[[int, torch.Tensor], None], first: int) -> None:
        self.see, self.next = see, first

    def __call__(self, logits: torch.Tensor) -> None:
        self.see(self.next, logits)
        self.next += len(logits)
