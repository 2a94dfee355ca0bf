"""A model's own decoder layers, run one at a time on kept hidden states.

What the decoder tells its layers (positions, rotary angles, masks) is noted from its own calls. Nothing here
knows what is done between two layers.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, cast

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from probeprune.model.blocks import Block
from probeprune.model.families import find_family
from probeprune.model.passes import find_decoder

_ABSENT = object()


class LayerRunner:
    """The decoder layers of a model, for batches of whole windows (no padding, no cache).

    Attributes:
        hidden: what the first layer is given, one tensor (batch, length, hidden) a batch of windows, in the
            model's dtype: windows x length x hidden numbers.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, batches: Sequence[torch.Tensor]) -> None:
        self._layers = cast(nn.ModuleList, model.get_submodule(find_family(model).layers))
        self._sizes = [len(b) for b in batches]
        self._calls: dict[int, list[dict[str, Any]]] = {}
        self.hidden: list[torch.Tensor] = []
        decoder = find_decoder(model)
        device = next(model.parameters()).device
        own = [layer.__dict__.get("forward", _ABSENT) for layer in self._layers]
        heard: list[tuple[torch.Tensor, dict[str, Any]]] = []

        def listen(hidden_states: torch.Tensor, **call: Any) -> torch.Tensor:
            heard.append((hidden_states, call))
            return hidden_states

        try:
            for layer in self._layers:
                layer.forward = listen
            for batch in batches:
                heard.clear()
                decoder(input_ids=batch.to(device), use_cache=False)
                self.hidden.append(heard[0][0])
                # Windows are whole, so batches of one size are told the same.
                self._calls.setdefault(len(batch), [call for _, call in heard])
        finally:
            for layer, forward in zip(self._layers, own, strict=True):
                if forward is _ABSENT:
                    del layer.forward
                else:
                    layer.forward = forward

    def __len__(self) -> int:
        return len(self._layers)

    def run(self, layer: int, batch: int, hidden: torch.Tensor) -> torch.Tensor:
        """The output of one layer for hidden states of one batch."""
        out: torch.Tensor = self._layers[layer](hidden, **self._calls[self._sizes[batch]][layer])
        return out


class Captured:
    """What a forward pass of a layer shows of one block."""

    residual: torch.Tensor
    z: torch.Tensor
    output: torch.Tensor


class _Enough(Exception):
    """What was to be seen has been seen."""


@contextmanager
def capture(blocks: Sequence[Block], until: Block | None = None) -> Iterator[dict[str, Captured]]:
    """Note, by block kind, the residual in front of a layer's blocks and what passes their consumers.

    With `until` the pass, and the context with it, ends behind that block's consumer: what would come later
    is not looked at.
    """
    seen: dict[str, Captured] = {b.kind: Captured() for b in blocks}
    hooks: list[RemovableHandle] = []
    try:
        for block in blocks:
            hooks += _watch(block, seen[block.kind])
        if until is not None:
            hooks.append(until.consumer.register_forward_hook(_stop))
        with suppress(_Enough):
            yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _stop(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
    raise _Enough


def _watch(block: Block, seen: Captured) -> list[RemovableHandle]:
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.residual = args[0] if args else kwargs["hidden_states"]

    def after(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        seen.z, seen.output = args[0], output

    front = block.entry if block.norm is None else block.norm
    return [
        front.register_forward_pre_hook(before, with_kwargs=True),
        block.consumer.register_forward_hook(after),
    ]
