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

from probeprune.data.windows import batches
from probeprune.model.decoding import HEAD_TOKENS, next_token_logits
from probeprune.model.hidden_states import HiddenStates
from probeprune.model.layers import LayerRunner
from probeprune.model.offloading import room_of
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
) -> None:
    """One backward pass for each window, through all layers, last layer first.

    Where work is shared out, for each window that is this process's. What `visit` does when it is left is
    done by all processes together.

    Memory: the inputs of all layers, layers x windows x length x hidden numbers in the model's dtype.

    Args:
        model: a supported causal LM in eval mode, nothing attached; its layers may be offloaded.
        windows: LongTensor (count, length) of token ids.
        loss: of the logits of one window.
        visit: what is done in each layer.
        what: name of the work, for `progress`, which is called with (what, windows done over all layers,
            windows times layers).

    Raises:
        FloatingPointError: a NaN or infinite loss.
    """
    with torch.inference_mode(False), weights_at_rest(model):
        mine = shares.own(len(windows))
        with shares.alike():
            runner = LayerRunner(model, [*batches(shares.own_rows(windows).clone(), 1)])
            layers, count = len(runner), len(mine)
            inputs = _inputs(model, runner)
            gradients = [_from_head(model, runner, i, mine[i], loss) for i in range(count)]
        for layer in reversed(range(layers)):
            with runner.opened(layer), visit(layer) as after, shares.alike():
                for i in range(count):
                    progress(what, (layers - 1 - layer) * count + i, layers * count)
                    hidden = inputs[layer * count + i].detach().requires_grad_(True)
                    with torch.enable_grad():
                        runner.run(layer, i, hidden).backward(gradients[i])
                    assert hidden.grad is not None
                    gradients[i] = hidden.grad
                    after(mine[i])
        progress(what, layers * count, layers * count)


@torch.no_grad()
def _inputs(model: nn.Module, runner: LayerRunner) -> HiddenStates:
    """The inputs of all layers, all windows of the first in front; leaves the last layer's output behind."""
    count = len(runner.batches)
    inputs = HiddenStates(room_of(model), len(runner) * count)
    for layer in range(len(runner)):
        with runner.opened(layer):
            for i, hidden in enumerate(runner.hidden):
                inputs[layer * count + i] = hidden
                runner.hidden[i] = runner.run(layer, i, hidden)
    return inputs


def _from_head(model: nn.Module, runner: LayerRunner, batch: int, window: int, loss: Loss) -> torch.Tensor:
    """The gradient of the last layer's output. The logits of a few tokens are in memory at a time."""
    hidden = runner.hidden[batch].detach().requires_grad_(True)
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
