"""How far a model predicts what another one predicts: the same likeliest token, and the KL divergence.

Both read the same windows. Each token of a window except the first is predicted, as for perplexity, and the
output heads run on some windows at a time. Knows nothing of pruning.
"""

import math
import statistics
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from probeprune.algebra.divergence import divergence, target
from probeprune.data.windows import batches
from probeprune.errors import UsageError
from probeprune.evaluation.perplexity import mean_error, scored_windows
from probeprune.model.decoding import HEAD_TOKENS, decoded, next_token_logits, vocabulary
from probeprune.model.passes import token_windows
from probeprune.model.wrappers import unwrapped
from probeprune.progress import Progress, silent
from probeprune.ranges import plain


@dataclass(frozen=True)
class Agreement:
    """How far a model agrees with a reference.

    Attributes:
        top1: share of tokens whose likeliest successor is the same under both.
        divergence: mean KL(reference || model), in nats a token.
        top1_error, divergence_error: standard errors of both, over windows; NaN for a single window.
        tokens: number of predicted tokens.
    """

    top1: float
    divergence: float
    top1_error: float
    divergence_error: float
    tokens: int

    def record(self) -> dict[str, Any]:
        """All fields as JSON values; an error that is not known is None."""
        return {k: None if math.isnan(v) else v for k, v in asdict(self).items()}


def agreement(
    model: nn.Module,
    reference: nn.Module,
    windows: torch.Tensor,
    *,
    batch_size: int = 16,
    progress: Progress = silent,
) -> Agreement:
    """Measure how far `model` predicts what `reference` predicts on `windows` (count, length >= 2).

    Memory: beside both models the logits of 2048 tokens, a few times. Layers of either may be offloaded.

    Args:
        model: a causal LM in eval mode, with or without a method attached.
        reference: another one with the same vocabulary.
        windows: LongTensor of token ids.
        batch_size: windows per forward pass; dynamic methods choose units for each pass.
        progress: called with (`agreement`, windows done, windows in all).

    Raises:
        UsageError: models of different vocabularies, windows too short or longer than the models' positions.
        FloatingPointError: predictions that are not finite.
    """
    model, reference, batch_size = unwrapped(model), unwrapped(reference), plain("batch_size", batch_size)
    windows = scored_windows(reference, token_windows(model, windows), batch_size)
    own, other = vocabulary(model), vocabulary(reference)
    if own != other:
        raise UsageError(
            f"the reference's vocabulary has {other} tokens and the model's {own}; compare models of one "
            "vocabulary."
        )
    parts = [*batches(windows, batch_size)]
    hits: list[float] = []
    divergences: list[float] = []
    with torch.inference_mode():
        for one, two in zip(decoded(model, parts), decoded(reference, parts), strict=True):
            same, apart = _compared(model, one.hidden, reference, two.hidden)
            hits += same.tolist()
            divergences += apart.tolist()
            if not all(map(math.isfinite, divergences)):
                raise FloatingPointError("a model's predictions are NaN or infinite; try another dtype.")
            progress("agreement", len(hits), len(windows))
    return Agreement(
        top1=statistics.fmean(hits),
        divergence=statistics.fmean(divergences),
        top1_error=mean_error(hits),
        divergence_error=mean_error(divergences),
        tokens=len(windows) * (windows.shape[1] - 1),
    )


def _compared(
    model: nn.Module, hidden: torch.Tensor, reference: nn.Module, wanted: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each window the share of equal likeliest tokens and the mean divergence; float64 (windows,) each.

    Args:
        model, reference: the models, for their output heads.
        hidden, wanted: their decoders' last hidden states (windows, length, hidden), in this order.
    """
    count, length = hidden.shape[0], hidden.shape[1] - 1
    same, apart = [], []
    mine, theirs = (h[:, :-1].flatten(0, 1).split(HEAD_TOKENS) for h in (hidden, wanted))
    for few, others in zip(mine, theirs, strict=True):
        logits, goal = next_token_logits(model, few), next_token_logits(reference, others.to(few.device))
        same.append((logits.argmax(-1) == goal.argmax(-1)).double())
        apart.append(divergence(logits, target(goal)).double())
    return tuple(torch.cat(x).view(count, length).mean(1) for x in (same, apart))  # type: ignore[return-value]
