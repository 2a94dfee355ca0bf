"""Routed moments: run windows of text through the dense model and see what its experts do with their tokens.

An expert's inputs are read where the model gives them to it; what it makes of them is computed once more,
which takes about the FLOPs of the experts. Results are cached by content, and a run that was killed goes on
at its layer. Knows nothing of methods.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from probeprune.algebra.precision import exact
from probeprune.algebra.routed_moments import RoutedMoments
from probeprune.calibration.collecting import by_layer
from probeprune.calibration.leaving import exchange_moment
from probeprune.calibration.routing import routed_tokens, uncalled_experts
from probeprune.data.windows import BATCH_SIZE
from probeprune.model.experts import Stack, find_stacks
from probeprune.model.forwards import temporary_hooks
from probeprune.model.identity import content_file
from probeprune.model.layers import LayerRunner
from probeprune.model.passes import check_eval, token_windows
from probeprune.model.wrappers import unwrapped
from probeprune.progress import Progress, silent

_FORMAT = 2


@exact()
def routed_moments(
    model: nn.Module,
    windows: torch.Tensor,
    *,
    batch_size: int = BATCH_SIZE,
    exchange: bool = False,
    cache: Path | None = None,
    progress: Progress = silent,
) -> dict[str, RoutedMoments]:
    """Moments of the experts of every sparse layer, by the stack's name, on `windows` (count, length).

    All windows run through one layer, then through the next, as in `collecting.calibrate`.

    Args:
        model: a supported causal LM, in eval mode, nothing attached.
        windows: LongTensor of token ids.
        batch_size: windows per forward pass.
        exchange: see what the output of the experts changes by when one leaves too (`leaving.py`).
        cache: folder for results, stored by content; None stores nothing.
        progress: called with ("experts", windows done over all layers, windows times layers).

    Raises `UsageError` for windows longer than the model's positions, a model in training mode, or experts
    that the model does not call.
    """
    model = unwrapped(model)
    windows = token_windows(model, windows)
    check_eval(model, "calibration needs")
    stacks = {s.layer: s for s in find_stacks(model)}
    path = content_file(cache, model, windows, "routed", _FORMAT, exchange)

    def of_layer(runner: LayerRunner, layer: int) -> dict[str, RoutedMoments]:
        return _collect(runner, layer, stacks.get(layer), exchange, progress, layers)

    layers = max(stacks, default=-1) + 1
    made = by_layer(model, windows, path, "routed", layers, of_layer, batch_size, "experts", progress)
    return {s.name: made[s.name] for s in stacks.values()}


def _collect(
    runner: LayerRunner, layer: int, stack: Stack | None, exchange: bool, progress: Progress, layers: int
) -> dict[str, RoutedMoments]:
    """Advance the hidden states through one layer; returns the moments of its experts, none of a dense
    one."""
    moments = None
    if stack is not None:
        moments = RoutedMoments(stack.experts, stack.width, stack.device, exchange)
    windows = sum(len(batch) for batch in runner.batches)
    done = layer * windows
    for i, hidden in enumerate(runner.hidden):
        with nullcontext() if stack is None or moments is None else observed(stack, moments):
            runner.hidden[i] = runner.run(layer, i, hidden)
        if moments is not None:
            moments.see(len(hidden), hidden.shape[0] * hidden.shape[1])
        done += len(runner.batches[i])
        progress("experts", done, layers * windows)
    return {} if stack is None or moments is None else {stack.name: moments}


@contextmanager
def observed(stack: Stack, moments: RoutedMoments) -> Iterator[None]:
    """Add to `moments` what the experts of a stack do in the passes inside the context, padding included.

    Raises `UsageError` where the model does not call the module that holds them.
    """
    called: list[bool] = []
    inputs: list[torch.Tensor] = []

    def enter(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        inputs.append(args[0] if args else kwargs["hidden_states"])

    def see(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        called.append(True)
        for expert, _, x, weights in routed_tokens(stack, (*args, *kwargs.values())):
            z = stack.coupled(expert, x)
            norms = torch.linalg.vector_norm(stack.output(expert, z).float(), dim=-1)
            moments.update(expert, z, norms if weights is None else norms * weights.float())

    def register() -> Iterator[RemovableHandle]:
        yield stack.module.register_forward_pre_hook(see, with_kwargs=True)
        if len(moments.exchange):
            yield stack.entry.register_forward_pre_hook(enter, with_kwargs=True)

    with temporary_hooks(register()):
        yield
    if not called:
        raise uncalled_experts(stack)
    for x in inputs:
        moments.exchange += exchange_moment(stack, x.flatten(0, -2))
