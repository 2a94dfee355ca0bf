"""How long two models write the same: their greedy texts on the same prompts. Knows nothing of pruning."""

import statistics
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from probeprune.data.windows import batches
from probeprune.errors import UsageError
from probeprune.evaluation.perplexity import mean_error
from probeprune.model.offloading import device_of
from probeprune.model.passes import check_eval, position_limit, token_windows
from probeprune.model.wrappers import unwrapped
from probeprune.progress import Progress, silent
from probeprune.ranges import plain


@dataclass(frozen=True)
class GreedyAgreement:
    """How far a model's greedy texts are those of a reference.

    Attributes:
        same: mean share of a text's tokens before the first one that differs.
        exact: share of texts that are the same to the end.
        same_error, exact_error: standard errors of both, over prompts; NaN for a single prompt.
        shares: for each prompt, its share in `same`.
        prompts, new_tokens: number of prompts, and of new tokens of each.
    """

    same: float
    exact: float
    same_error: float
    exact_error: float
    shares: tuple[float, ...]
    prompts: int
    new_tokens: int

    def record(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return {**asdict(self), "shares": [round(s, 6) for s in self.shares]}


def greedy_texts(
    model: nn.Module,
    prompts: torch.Tensor,
    *,
    new_tokens: int = 64,
    batch_size: int = 16,
    progress: Progress = silent,
) -> torch.Tensor:
    """The likeliest continuation of each prompt, token by token, past any end of text.

    Args:
        model: a causal LM in eval mode, with or without a method attached.
        prompts: LongTensor (count, length) of token ids, all of one length: nothing is padded.
        new_tokens: tokens to write behind each.
        batch_size: prompts per batch; dynamic methods choose units for each.
        progress: called with (`generating`, prompts done, prompts in all).

    Returns:
        LongTensor (count, new_tokens), on the CPU.

    Raises `UsageError` for a model in training mode, and texts longer than its positions.
    """
    live: Any = unwrapped(model)
    check_eval(live, "text is generated on")
    prompts = token_windows(live, prompts)
    new_tokens, batch_size = plain("max_new_tokens", new_tokens), plain("batch_size", batch_size)
    limit = position_limit(live.config)
    if limit is not None and prompts.shape[1] + new_tokens > limit:
        raise UsageError(
            f"prompts of {prompts.shape[1]} tokens and {new_tokens} new ones are more than the model's "
            f"{limit} positions; shorten one of them."
        )
    config = GenerationConfig(
        max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0
    )
    written = []
    with torch.inference_mode():
        for batch in batches(prompts, batch_size):
            ids = batch.to(device_of(live))
            made = live.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
            written.append(made[:, prompts.shape[1] :].cpu())
            progress("generating", sum(map(len, written)), len(prompts))
    return torch.cat(written)


def greedy_agreement(texts: torch.Tensor, reference: torch.Tensor) -> GreedyAgreement:
    """Compare texts with those of a reference on the same prompts; both LongTensors (count, new tokens)."""
    count, length = reference.shape
    differs = texts != reference
    first = torch.where(differs.any(1), differs.int().argmax(1), length)
    shares = (first.double() / length).tolist()
    exact = (~differs.any(1)).double().tolist()
    return GreedyAgreement(
        same=statistics.fmean(shares),
        exact=statistics.fmean(exact),
        same_error=mean_error(shares),
        exact_error=mean_error(exact),
        shares=tuple(shares),
        prompts=count,
        new_tokens=length,
    )
