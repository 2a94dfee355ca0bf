"""The decoder's output for many batches, whether the model is in memory or its layers are offloaded."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from probeprune.model.cost import counting_flops, synced_clock
from probeprune.model.families import find_family, is_supported
from probeprune.model.layers import LayerRunner
from probeprune.model.multimodal import text_config
from probeprune.model.offloading import device_of, is_offloaded
from probeprune.model.passes import find_decoder
from probeprune.progress import Progress, silent

HEAD_TOKENS = 2048
"""Number of tokens whose logits are in memory at once."""


@dataclass(frozen=True)
class Decoded:
    """What the decoder makes of one batch.

    Attributes:
        hidden: its last hidden states (batch, length, hidden).
        seconds: time of the pass, without the time that weights take to come.
        flops: matrix-product FLOPs of the pass; counted for the first batch alone, else None.
    """

    hidden: torch.Tensor
    seconds: float
    flops: int | None


def decoded(
    model: nn.Module,
    batches: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor | None] | None = None,
    progress: Progress = silent,
) -> Iterator[Decoded]:
    """Run batches through the decoder of a model, in order, with the method that is attached, if any.

    A model in memory runs batch by batch. Of a model whose layers are offloaded, each layer comes into memory
    once, for all batches, and the results come at the end.

    Args:
        model: a supported causal LM in eval mode.
        batches: token ids, LongTensor (batch, length) each.
        masks: attention mask (batch, length) of each batch; None for no padding.
        progress: called with ("layers", layers done, layers in total) where layers are offloaded.
    """
    masks = masks or [None] * len(batches)
    if is_offloaded(model):
        yield from _by_layer(model, batches, masks, progress)
        return
    decoder, device = find_decoder(model), device_of(model)
    for i, (batch, mask) in enumerate(zip(batches, masks, strict=True)):
        ids, padding = batch.to(device), {} if mask is None else {"attention_mask": mask.to(device)}
        with nullcontext() if i else counting_flops() as count:
            started = synced_clock(device)
            hidden = decoder(input_ids=ids, use_cache=False, **padding)[0]
            seconds = synced_clock(device) - started
        yield Decoded(hidden, seconds, None if count is None else count.flops)


def _by_layer(
    model: nn.Module,
    batches: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor | None],
    progress: Progress,
) -> Iterator[Decoded]:
    runner, device = LayerRunner(model, batches, masks), device_of(model)
    seconds, flops = [0.0] * len(batches), 0
    if batches:  # a process may have none of its own
        flops = runner.given_flops * batches[0].numel()
    for layer in range(len(runner)):
        progress("layers", layer, len(runner))
        with runner.visited(layer):
            for i, hidden in enumerate(runner.hidden):
                with nullcontext() if i else counting_flops() as count:
                    started = synced_clock(device)
                    out = runner.run(layer, i, hidden)
                    seconds[i] += synced_clock(device) - started
                runner.hidden[i] = out
                flops += 0 if count is None else count.flops
    progress("layers", len(runner), len(runner))
    for i, hidden in enumerate(runner.hidden):
        yield Decoded(runner.finish(i, hidden), seconds[i], None if i else flops)


def vocabulary(model: nn.Module) -> int:
    """Number of tokens that a model's output head tells apart."""
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    return int(head.weight.shape[0])


def next_token_logits(model: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Logits (..., vocabulary) in float32 from a decoder's last hidden states (..., hidden).

    Applies the model's output head, its family's factor of logits and, for Gemma, its soft cap on them.
    """
    config: Any = text_config(model.config)
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    logits: torch.Tensor = head(hidden).float()
    family = find_family(model) if is_supported(config.model_type) else None
    if family is not None and family.logits_times is not None:
        logits = logits * getattr(config, family.logits_times)
    if family is not None and family.logits_over is not None:
        logits = logits / getattr(config, family.logits_over)
    cap = getattr(config, "final_logit_softcapping", None)
    logits = logits if cap is None else torch.tanh(logits / cap) * cap
    return logits.to(hidden.device)  # a tied head may lie with the embeddings, on another device


def next_token_losses(
    model: nn.Module,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    see: Callable[[torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Loss of each token of each window but the first: (batch, length - 1), float32.

    The logits of `HEAD_TOKENS` tokens are in memory at a time, however long a window is.

    Args:
        model: the causal LM, for its output head.
        hidden: its decoder's last hidden states (batch, length, hidden).
        ids: the windows (batch, length).
        see: called with the logits (tokens, vocabulary) of all predicted tokens, some at a time, in order.
    """
    per_step = max(1, HEAD_TOKENS // ids.shape[1])
    losses = []
    for h, target in zip(hidden[:, :-1].split(per_step), ids[:, 1:].split(per_step), strict=True):
        parts = []
        for few, after in zip(h.split(HEAD_TOKENS, 1), target.split(HEAD_TOKENS, 1), strict=True):
            logits = next_token_logits(model, few).flatten(0, 1)
            loss = nn.functional.cross_entropy(logits, after.flatten(), reduction="none")
            parts.append(loss.view(len(few), -1))
            if see is not None:
                see(logits)
        losses.append(torch.cat(parts, 1))
    return torch.cat(losses)
