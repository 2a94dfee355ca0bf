"""A model's own decoder layers, run one at a time on stored hidden states.

The other arguments of a layer (positions, rotary angles, masks) are recorded from the decoder's own calls.
Knows nothing of the work done between two layers.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, cast

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from probeprune.model.blocks import Block, uncalled_consumer
from probeprune.model.families import find_family
from probeprune.model.forwards import replaced_forward, temporary_hooks
from probeprune.model.passes import find_decoder


class LayerRunner:
    """The decoder layers of a model, for batches of whole windows (no padding, no cache).

    Attributes:
        hidden: the first layer's input, one tensor (batch, length, hidden) for each batch of windows, in the
            model's dtype. In total windows x length x hidden numbers.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, batches: Sequence[torch.Tensor]) -> None:
        self._layers = cast(nn.ModuleList, model.get_submodule(find_family(model).layers))
        self._sizes = [len(b) for b in batches]
        self._arguments: dict[int, list[dict[str, Any]]] = {}
        self.hidden: list[torch.Tensor] = []
        decoder = find_decoder(model)
        device = next(model.parameters()).device
        calls: list[tuple[torch.Tensor, dict[str, Any]]] = []

        def record(hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
            calls.append((hidden_states, arguments))
            return hidden_states

        with ExitStack() as stack:
            for layer in self._layers:
                stack.enter_context(replaced_forward(layer, record))
            for batch in batches:
                calls.clear()
                decoder(input_ids=batch.to(device), use_cache=False)
                self.hidden.append(calls[0][0])
                # Windows have no padding, so batches of one size get the same arguments.
                self._arguments.setdefault(len(batch), [arguments for _, arguments in calls])

    def __len__(self) -> int:
        return len(self._layers)

    def run(self, layer: int, batch: int, hidden: torch.Tensor) -> torch.Tensor:
        """The output of one layer for the hidden states of one batch, both by index."""
        arguments = self._arguments[self._sizes[batch]][layer]
        out: torch.Tensor = self._layers[layer](hidden, **arguments)
        return out


class Captured:
    """Tensors of one block, filled in by a forward pass of its layer.

    Attributes:
        residual: the residual stream in front of the block (batch, length, hidden).
        z: the coupled activation, the consumer's input (batch, length, width).
        output: the consumer's output (batch, length, hidden).
    """

    residual: torch.Tensor
    z: torch.Tensor
    output: torch.Tensor


class _AllCaptured(Exception):
    """Stops a forward pass once everything needed has been captured."""


@contextmanager
def capture(blocks: Sequence[Block], until: Block | None = None) -> Iterator[dict[str, Captured]]:
    """Capture, by block kind, the tensors of one layer's blocks in the passes inside the context.

    With `until`, the pass stops right after that block's consumer and leaves the context; later blocks do not
    run. Raises `UsageError` for a block whose consumer is not called.
    """
    captured: dict[str, Captured] = {b.kind: Captured() for b in blocks}

    def register() -> Iterator[RemovableHandle]:
        for block in blocks:
            yield from _hooks(block, captured[block.kind])
        if until is not None:
            yield until.consumer.register_forward_hook(_stop)

    with temporary_hooks(register()), suppress(_AllCaptured):
        yield captured
    for block in blocks if until is None else [until]:
        if not hasattr(captured[block.kind], "z"):
            raise uncalled_consumer(block)


def _stop(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
    raise _AllCaptured


def _hooks(block: Block, captured: Captured) -> Iterator[RemovableHandle]:
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        captured.residual = args[0] if args else kwargs["hidden_states"]

    def after(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        captured.z, captured.output = args[0], output

    front = block.entry if block.norm is None else block.norm
    yield front.register_forward_pre_hook(before, with_kwargs=True)
    yield block.consumer.register_forward_hook(after)
