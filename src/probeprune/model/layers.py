"""A model's own decoder layers, run one at a time on stored hidden states.

The other arguments of a layer (positions, rotary angles, masks) are recorded from the decoder's own calls:
once for batches of one shape, and those that differ by the tokens of a batch for each of them. Knows nothing
of the work done between two layers.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from probeprune.algebra.moments import Tokens
from probeprune.model.blocks import Block, find_layers, uncalled_consumer
from probeprune.model.families import find_family
from probeprune.model.forwards import replace_method, temporary_hooks
from probeprune.model.hidden_states import HiddenStates, Room
from probeprune.model.offloading import device_of, in_memory, is_offloaded, room_of, widened
from probeprune.model.passes import Pass, find_decoder
from probeprune.model.shared_kv import Carried


def opened(
    model: nn.Module, layer: int, changes: Path | None = None, *, wide: bool = False
) -> AbstractContextManager[None]:
    """Keep the weights of one decoder layer in place inside the context; see `offloading.in_memory`."""
    path = f"{find_family(model).layers}.{layer}"
    return in_memory(model.get_submodule(path), path, changes, wide=wide)


RunPass = Callable[[Pass, Callable[[], Any]], Any]
"""Runs one pass, whose forward it is given, and returns the forward's output."""

_Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""What a decoder gives a layer besides the hidden states: by position and by name."""

_ON_LAYERS = "_probeprune_on_layers"
"""Attribute of a model: gives, for a layer that has been opened, what its passes go through."""


def on_layers(
    model: nn.Module, visit: Callable[[int], AbstractContextManager[RunPass]]
) -> Callable[[], None]:
    """Route the passes of every layer, in `LayerRunner.visited`, until the returned function is called.

    Args:
        model: a model whose layers are offloaded.
        visit: entered for each layer, by index, while it is in memory.
    """
    return replace_method(model, _ON_LAYERS, visit)


class LayerRunner:
    """The decoder layers of a model, for batches of whole sequences (no cache).

    Attributes:
        hidden: the first layer's input, one tensor (batch, length, hidden) for each batch, in the model's
            dtype. In total tokens x hidden numbers. Behind layers that leave keys and values for later ones,
            these come behind the hidden states, along the last axis (`shared_kv.py`).
        batches: the token ids, as given.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[torch.Tensor],
        masks: Sequence[torch.Tensor | None] | None = None,
        hidden: HiddenStates | None = None,
    ) -> None:
        """Run everything in front of the first layer.

        Args:
            model: a supported causal LM; its layers may be offloaded.
            batches: token ids, LongTensor (batch, length) each.
            masks: attention mask (batch, length) of each batch; None for no padding.
            hidden: where hidden states go; those that it holds already stay.

        Raises `UsageError` where the hidden states find no room on the disk.
        """
        self._model, self._layers = model, find_layers(model)
        self._decoder, self._device = find_decoder(model), device_of(model)
        self.batches, self._masks = batches, masks or [None] * len(batches)
        self._run_pass: RunPass = _straight
        self._arguments: dict[object, list[_Arguments]] = {}
        family, count = find_family(model), len(self._layers) * len(batches)
        self._in_tuples, self._carried = family.layers_give_tuples, Carried(model)
        # Beside hidden states for which memory was set aside, these go to files.
        room = Room(0) if is_offloaded(model) else room_of(model)
        self._by_token = {name: HiddenStates(room, count) for name in family.by_token}
        self._wide = False
        self.hidden = HiddenStates(room_of(model), len(batches)) if hidden is None else hidden
        for i in range(len(batches)):
            calls: list[tuple[torch.Tensor, _Arguments]] = []

            def record(hidden_states: torch.Tensor, *more: Any, calls: Any = calls, **arguments: Any) -> Any:
                calls.append((hidden_states, (more, arguments)))
                return self._given(hidden_states)

            self._decode(i, [record] * len(self._layers))
            arguments = [self._without_tokens(i, n, own) for n, (_, own) in enumerate(calls)]
            if i == 0 and not self.hidden.holds(i):
                width = self._carried.width * calls[0][0].element_size()
                width += sum(s.nbytes for s in self._by_token.values()) // batches[0].numel()
                self.hidden.check_disk(width * sum(ids.numel() for ids in batches))
            if not self.hidden.holds(i):
                self.hidden[i] = calls[0][0]
            self._arguments.setdefault(self._like(i), arguments)

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def given_flops(self) -> int:
        """As `Carried.given_flops`."""
        return self._carried.given_flops

    def _like(self, batch: int) -> object:
        """A key that batches share whose layers get the same arguments: without padding, of one shape."""
        return tuple(self.batches[batch].shape) if self._masks[batch] is None else batch

    def _without_tokens(self, batch: int, layer: int, given: _Arguments) -> _Arguments:
        """A layer's arguments without those that differ by token, which are kept apart for each batch."""
        if not self._by_token:
            return given
        names = [*inspect.signature(type(self._layers[layer]).forward).parameters][2:]  # not self, the states
        arguments = {**dict(zip(names, given[0], strict=False)), **given[1]}
        for name, kept in self._by_token.items():
            if isinstance(arguments.get(name), torch.Tensor):
                kept[layer * len(self.batches) + batch] = arguments.pop(name)
        return (), arguments

    def _decode(self, batch: int, forwards: Sequence[Callable[..., Any]]) -> torch.Tensor:
        """The decoder's output with these forwards in place of its layers'."""
        ids, mask = self.batches[batch].to(self._device), self._masks[batch]
        padding = {} if mask is None else {"attention_mask": mask.to(self._device)}
        own = dict(self._layers._modules)
        try:
            # Not their forwards: hooks that others have put on the layers would see passes that are none.
            for key, forward in zip(own, forwards, strict=True):
                self._layers._modules[key] = _StandIn(own[key], forward)
            out: torch.Tensor = self._decoder(input_ids=ids, use_cache=False, **padding)[0]
        finally:
            self._layers._modules.update(own)
        return out

    def tokens(self, batch: int) -> Tokens:
        """Which tokens of a batch are real."""
        mask = self._masks[batch]
        valid = None if mask is None or bool(mask.all()) else mask.bool()
        count, length = self.batches[batch].shape
        return Tokens(count, length, valid)

    @contextmanager
    def opened(self, layer: int, wide: bool = False) -> Iterator[None]:
        """Keep one layer's weights in place inside the context; with `wide`, it computes in float32."""
        with opened(self._model, layer, wide=wide):
            self._wide = wide
            try:
                yield
            finally:
                self._wide = False

    @contextmanager
    def visited(self, layer: int) -> Iterator[None]:
        """As `opened`, with what `on_layers` put there: `run` goes through it inside the context."""
        visit = self._model.__dict__.get(_ON_LAYERS)
        with self.opened(layer):
            if visit is None:
                yield
                return
            with visit(layer) as self._run_pass:
                yield
            self._run_pass = _straight

    def run(
        self, layer: int, batch: int, hidden: torch.Tensor, module: nn.Module | None = None
    ) -> torch.Tensor:
        """The output of one layer for the hidden states of one batch, both by index, each with what layers
        leave for later ones.

        `module` takes the layer's place, where there is one.
        """
        more, arguments = self._arguments[self._like(batch)][layer]
        for name, kept in self._by_token.items():
            if kept.holds(place := layer * len(self.batches) + batch):
                arguments = {**arguments, name: kept[place]}
        if self._wide:
            hidden, more, arguments = widened(hidden), widened(more), widened(arguments)
        carried, own, shared = self._carried, self._carried.hidden(hidden), {}
        if carried.argument is not None:
            shared = type(arguments[carried.argument])(carried.given(layer, hidden))
            arguments = {**arguments, carried.argument: shared}
        started = Pass(self.tokens(batch), continues=False, cache=None)
        called = self._layers[layer] if module is None else module
        out: Any = self._run_pass(started, lambda: called(own, *more, **arguments))
        found: torch.Tensor = out[0] if self._in_tuples else out
        return found if carried.argument is None else carried.behind(layer, found, hidden, shared)

    def entering(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states of some layer as the input of this later one, with zeros for what those in between
        would leave for it: for work that asks for no figures of the model."""
        return self._carried.before(layer, hidden)

    def finish(self, batch: int, hidden: torch.Tensor) -> torch.Tensor:
        """What the decoder makes of the last layer's output, behind its norm: (batch, length, hidden)."""
        own = self._carried.hidden(hidden)
        return self._decode(batch, [lambda *args, **kwargs: self._given(own)] * len(self._layers))

    def _given(self, hidden: torch.Tensor) -> Any:
        """Hidden states as the model's layers return them."""
        return (hidden, None) if self._in_tuples else hidden


class _StandIn(nn.Module):
    """In the place of a layer: has its attributes, and another forward."""

    def __init__(self, layer: nn.Module | None, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.__dict__.update(layer=layer, forward=forward)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)


def _straight(started: Pass, forward: Callable[[], Any]) -> Any:
    return forward()


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

    With `until`, the pass stops in front of that block's consumer, whose output nobody captures, and leaves
    the context; later blocks do not run. Raises `UsageError` for a block whose consumer is not called.
    """
    captured: dict[str, Captured] = {b.kind: Captured() for b in blocks}

    def stop(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        assert until is not None
        captured[until.kind].z = args[0]
        raise _AllCaptured

    def register() -> Iterator[RemovableHandle]:
        for block in blocks:
            yield from _hooks(block, captured[block.kind])
        if until is not None:
            yield until.consumer.register_forward_pre_hook(stop)

    with temporary_hooks(register()), suppress(_AllCaptured):
        yield captured
    for block in blocks if until is None else [until]:
        if not hasattr(captured[block.kind], "z"):
            raise uncalled_consumer(block)


def _hooks(block: Block, captured: Captured) -> Iterator[RemovableHandle]:
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        captured.residual = args[0] if args else kwargs["hidden_states"]

    def after(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        # A copy: layers with parallel blocks add to an output in place.
        captured.z, captured.output = args[0], output.clone()

    front = block.entry if block.norm is None else block.norm
    yield front.register_forward_pre_hook(before, with_kwargs=True)
    yield block.consumer.register_forward_hook(after)
