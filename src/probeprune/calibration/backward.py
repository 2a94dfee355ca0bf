"""Backward passes through a model, a layer at a time.

Forwards, the input of every layer is kept for every window; backwards, each layer runs again from there, with
gradients. Only one layer need be in memory, with the activations of one window in it. The gradients are those
of one backward pass through the whole model.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from probeprune.calibration.unfinished import Unfinished, states_bytes
from probeprune.data.windows import batches
from probeprune.model.blocks import find_layers
from probeprune.model.decoding import HEAD_TOKENS, next_token_logits
from probeprune.model.hidden_states import HiddenStates
from probeprune.model.layers import LayerRunner
from probeprune.model.offloading import widened
from probeprune.processes import shares
from probeprune.progress import Progress, silent

Loss = Callable[[int, int, torch.Tensor], torch.Tensor]
"""The loss, a scalar, of some tokens in a row of a window: (window, place of the first token, logits (tokens,
vocabulary) in float32). The loss of a window is the sum over all its tokens."""

Visit = Callable[[int], AbstractContextManager[Callable[[int], None]]]
"""Entered for each layer, given by index, while its weights are in place; what it gives is called with each
window, by index, when the gradients of that window have passed through the layer."""


def backward_by_layer(
    model: nn.Module,
    windows: torch.Tensor,
    loss: Loss,
    visit: Visit,
    what: str,
    progress: Progress = silent,
    *,
    kept: Unfinished | None = None,
    wide: bool = False,
) -> None:
    """One backward pass for each window, through all layers, last layer first.

    Where work is shared out, for each window that is this process's. What `visit` does when it is left is
    done by all processes together.

    Memory: the inputs of all layers, layers x windows x length x hidden numbers in the model's dtype, and the
    gradient of one.

    Args:
        model: a supported causal LM in eval mode, nothing attached; its layers may be offloaded.
        windows: LongTensor (count, length) of token ids.
        loss: of the logits of one window.
        visit: what is done in each layer.
        what: name of the work, for `progress`, which is called with (what, windows done over all layers,
            windows times layers).
        kept: where the pass begins, and takes down how far it has come; None for the beginning.
        wide: differentiate each layer in float32 where the model's dtype is narrower: its weights, and its
            arguments, are float32 copies while it is open. The inputs of layers stay those of the model's
            own forward pass.

    Raises:
        FloatingPointError: a NaN or infinite loss.
        UsageError: no room for the inputs of all layers in memory or on disk.
    """
    kept = Unfinished(model) if kept is None else kept
    layers = len(find_layers(model))
    with torch.inference_mode(False), weights_at_rest(model):
        mine = shares.own(len(windows))
        count = len(mine)
        with shares.alike():
            # The output of the last layer is the last part, the input of the head.
            inputs, gradients = kept.stream("inputs", (layers + 1) * count), kept.stream("gradients", count)
            parts = [*batches(shares.own_rows(windows).clone(), 1)]
            runner = LayerRunner(model, parts, hidden=inputs)
            if not kept.done:
                inputs.check_disk(layers * inputs.nbytes)
        for layer in range(kept.done, layers):
            with shares.alike():
                _forwards(runner, layer, inputs)
            kept.step(layer + 1)
        if kept.done == layers:
            with shares.alike():
                for i in range(count):
                    gradients[i] = _from_head(model, runner, i, mine[i], inputs[layers * count + i], loss)
                    del inputs[layers * count + i]
            kept.step(layers + 1)
        for behind in range(kept.done - layers - 1, layers):
            layer = layers - 1 - behind
            with runner.opened(layer, wide), visit(layer) as after, shares.alike():
                for i in range(count):
                    progress(what, behind * count + i, layers * count)
                    hidden = inputs[layer * count + i].detach()
                    hidden = (widened(hidden) if wide else hidden).requires_grad_(True)
                    with torch.enable_grad():
                        out = runner.run(layer, i, hidden)
                        out.backward(gradients[i].to(out.device, out.dtype))
                    assert hidden.grad is not None
                    gradients[i] = hidden.grad
                    del inputs[layer * count + i]
                    after(mine[i])
            kept.step(layers + 2 + behind)
        progress(what, layers * count, layers * count)


@torch.no_grad()
def _forwards(runner: LayerRunner, layer: int, inputs: HiddenStates) -> None:
    """Run all windows through a layer; its outputs are the inputs of the next."""
    count = len(runner.batches)
    with runner.opened(layer):
        for i in range(count):
            inputs[(layer + 1) * count + i] = runner.run(layer, i, inputs[layer * count + i])


def _from_head(
    model: nn.Module, runner: LayerRunner, batch: int, window: int, output: torch.Tensor, loss: Loss
) -> torch.Tensor:
    """The gradient of the last layer's output. The logits of a few tokens are in memory at a time."""
    hidden = output.detach().requires_grad_(True)
    with torch.enable_grad():
        states = runner.finish(batch, hidden)
        top = states.detach().requires_grad_(True)
        for first in range(0, top.shape[1], HEAD_TOKENS):
            few = top[0, first : first + HEAD_TOKENS]
            part = loss(window, first, next_token_logits(model, few))
            if not torch.isfinite(part):
                raise FloatingPointError(
                    f"the loss of calibration window {window} is NaN or infinite; use float32 or bfloat16."
                )
            part.backward()
        states.backward(top.grad)
    assert hidden.grad is not None
    return hidden.grad


def backward_bytes(model: nn.Module, windows: torch.Tensor) -> int:
    """Bytes of the hidden states and gradients that a backward pass keeps between two layers."""
    return (len(find_layers(model)) + 3) * states_bytes(model, windows)


@contextmanager
def weights_at_rest(model: nn.Module) -> Iterator[None]:
    """Switch off gradients of all weights inside the context, and restore the settings afterwards."""
    asked: dict[Any, bool] = {p: p.requires_grad for p in model.parameters()}
    try:
        for p in asked:
            p.requires_grad_(False)
        yield
    finally:
        for p, wanted in asked.items():
            p.requires_grad_(wanted)
