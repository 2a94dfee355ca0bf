"""Training losses from the decoder's hidden states, by parts of some tokens.

While a model trains, its own forward computes the loss without ever holding the logits of all tokens: PEFT,
data parallelism and the Trainer call it as they always do. Losses and gradients are, up to rounding, those of
all logits at once. Knows nothing of what a loss compares the logits with.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import update_wrapper
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from probeprune.model.decoding import next_token_logits, vocabulary
from probeprune.model.forwards import replace_forward
from probeprune.model.passes import find_decoder

LOGITS = 1 << 26
"""Numbers in the logits of one part: 256 MiB in float32."""

PartLoss = Callable[[torch.Tensor], torch.Tensor]
"""From the logits (tokens, vocabulary) of a part, in float32, the sum of its tokens' losses, a scalar."""

TokenLoss = Callable[[torch.Tensor], Callable[[slice], PartLoss]]
"""A loss that is a mean over tokens. It is given the ids of a batch, LongTensor (batch, length), and returns
what gives the loss of some of the tokens: these are, sequence after sequence, all that follow another."""


def text_loss(ids: torch.Tensor) -> Callable[[slice], PartLoss]:
    """The cross-entropy of each next token, in nats; a `TokenLoss`."""
    targets = ids[:, 1:].flatten()

    def part(tokens: slice) -> PartLoss:
        few = targets[tokens]
        return lambda logits: nn.functional.cross_entropy(logits, few, reduction="sum")

    return part


def loss_by_parts(
    model: PreTrainedModel, hidden: torch.Tensor, loss: Callable[[slice], PartLoss]
) -> torch.Tensor:
    """The sum of all tokens' losses, a scalar.

    In the backward pass logits are computed again, but for those of the last part, which are needed first.

    Args:
        model: the causal LM, for its output head.
        hidden: last hidden states of its decoder (tokens, hidden).
        loss: the loss of some of the tokens.
    """
    size = tokens_in_part(model)
    total = hidden.new_zeros((), dtype=torch.float32)
    for first in range(0, len(hidden), size):
        few, part = hidden[first : first + size], loss(slice(first, first + size))
        if first + size < len(hidden) and torch.is_grad_enabled():
            total = total + checkpoint(
                _from_head, model, few, part, use_reentrant=False, preserve_rng_state=False
            )
        else:
            total = total + _from_head(model, few, part)
    return total


def tokens_in_part(model: PreTrainedModel) -> int:
    """Number of tokens whose logits are in memory at once."""
    return max(LOGITS // vocabulary(model), 1)


def _from_head(model: PreTrainedModel, hidden: torch.Tensor, part: PartLoss) -> torch.Tensor:
    return part(next_token_logits(model, hidden))


@contextmanager
def training_loss(model: PreTrainedModel, loss: TokenLoss) -> Iterator[None]:
    """Let a model's forward compute `loss`, by parts, while the context lasts.

    Only calls with ids and labels alone are changed, as the Trainer makes them; they return the loss without
    logits. Labels are taken to be the ids.
    """
    routed = _WithLoss(model, loss)
    restore = replace_forward(model, routed)
    try:
        yield
    finally:
        restore()
        routed.loss = None  # where the Trainer has wrapped it meanwhile, it stays in the chain


class _WithLoss:
    """A causal LM's forward that computes a loss by parts, or runs straight on once that is None."""

    def __init__(self, model: PreTrainedModel, loss: TokenLoss | None) -> None:
        update_wrapper(self, model.forward)  # the Trainer reads its signature
        self.forward, self.model, self.loss = model.forward, model, loss

    def __call__(self, *args: Any, **given: Any) -> Any:
        filled = {name: value for name, value in given.items() if value is not None}
        labelled = {"input_ids", "labels"} <= filled.keys() <= {"input_ids", "labels", "num_items_in_batch"}
        if self.loss is None or args or not labelled:
            return self.forward(*args, **given)
        ids = filled["input_ids"]
        hidden = find_decoder(self.model)(input_ids=ids, use_cache=False)[0][:, :-1].flatten(0, 1)
        total = loss_by_parts(self.model, hidden, self.loss(ids))
        # The Trainer counts the tokens of a whole step, over micro-batches and processes.
        return CausalLMOutput(loss=total / filled.get("num_items_in_batch", len(hidden)))
