"""How much memory work on a model takes, found without its numbers.

The work itself runs, on tensors that have shapes and no numbers, and what it holds at its peak is counted: so
the figures are those of the code that will run, whatever the family, the dtype and the kernel of attention.
Knows nothing of pruning.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import masking_utils
from transformers.integrations import moe

from probeprune.errors import UsageError
from probeprune.model.blocks import Block, UnitKind, find_blocks, find_layers
from probeprune.model.decoding import next_token_losses
from probeprune.model.described import empty_like
from probeprune.model.experts import Stack, find_stacks
from probeprune.model.forwards import replace_method
from probeprune.model.layers import LayerRunner
from probeprune.model.shared_kv import Carried


@dataclass(frozen=True)
class Batch:
    """The windows of one forward pass."""

    size: int = 16
    """Windows."""
    length: int = 512
    """Tokens per window."""

    @property
    def tokens(self) -> int:
        """Tokens in all."""
        return self.size * self.length


@dataclass(frozen=True)
class Phase:
    """What one part of the work holds in memory at its peak, in bytes, beside the weights of the model."""

    name: str
    work: int
    """Activations, logits, gradients, moments."""
    states: int = 0
    """Hidden states of all windows between two layers, but for those in `work`: they may go to files where
    layers are on disk."""
    sets: int = 1
    """Number of sets of hidden states that are there at once."""
    kept: int = 0
    """What other parts of the work left that is still needed."""
    layers: int = 1
    """Number of layers whose weights are in memory where layers are on disk."""
    cut: int = 0
    """Weights that a cut has made so far, of all layers."""
    copies: int = 0
    """What an attached method holds of experts beside their whole tensors, of all layers; a layer at a time,
    of the layer at work."""
    whole: bool = False
    """Whether it runs through all layers with gradients, which must then be in memory at once."""

    @property
    def bytes(self) -> int:
        """What is in memory in any case: everything but hidden states and weights."""
        return self.work + self.kept


@dataclass(frozen=True)
class Weights:
    """Bytes of a model's weights."""

    layers: int
    """All decoder layers."""
    largest: int
    """The largest layer."""
    rest: int
    """Everything else: embeddings, the last norm, the output head; tied weights once."""
    tensor: int
    """The largest tensor of a layer."""

    @property
    def all(self) -> int:
        """Of the whole model."""
        return self.layers + self.rest


def weights_of(model: nn.Module, dtype: torch.dtype) -> Weights:
    """The sizes of a model's weights in a dtype; of a model without numbers too.

    A family that is not supported has no layers to tell apart.
    """

    def size(parameters: Iterable[nn.Parameter]) -> int:
        return sum(p.numel() * dtype.itemsize for p in parameters)

    whole = size(model.parameters())
    try:
        layers = list(find_layers(model))
    except UsageError:
        return Weights(0, 0, whole, 0)
    sizes = [size(layer.parameters()) for layer in layers]
    tensor = max(p.numel() * dtype.itemsize for layer in layers for p in layer.parameters())
    return Weights(sum(sizes), max(sizes), whole - sum(sizes), tensor)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are made inside the context while somebody holds them.

    Args:
        others: tensors that were there before, which do not count.

    Attributes:
        peak: the most at once.
    """

    def __init__(self, others: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        for tensor in others:
            self._seen[tensor.untyped_storage()] = 0

    def count(self, tensor: torch.Tensor) -> None:
        """Count a tensor from here on, as long as anybody holds it."""
        storage = tensor.untyped_storage()
        if storage in self._seen:
            return
        size = storage.nbytes()
        self._seen[storage] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, size)

    def _gone(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, torch.Tensor):
                self.count(leaf)
        return made


class Rehearsal:
    """A model whose tensors have shapes and no numbers, on the device where the real one will run.

    Attributes:
        model: its copy, of which the largest layer alone can run, and what is around the layers.
        dtype, device: what it computes in, and where.
        blocks: its blocks.
        stacks: its stacks of experts.
        layer: the index of its largest layer.
    """

    def __init__(
        self, shape: Any, dtype: torch.dtype, device: torch.device, units: UnitKind = "group"
    ) -> None:
        """Copy a supported causal LM, which may itself have no numbers; `units` are those of its blocks."""
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.dtype, self.device = dtype, device
        self.model = empty_like(shape).eval().requires_grad_(False)
        self.blocks = find_blocks(self.model, units)
        self.stacks = find_stacks(self.model)
        if self.stacks:  # a loop over the experts that have tokens would read numbers
            self.model.config._experts_implementation = "grouped_mm"
        layers = list(find_layers(self.model))
        sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers]
        self.layer = sizes.index(max(sizes))
        idle = {m for i, layer in enumerate(layers) if i != self.layer for m in layer.modules()}
        with self._mode:
            for module in self.model.modules():
                if module not in idle:
                    self._fill(module)
            self.model.tie_weights()

    @property
    def here(self) -> list[Block]:
        """The blocks of its largest layer."""
        return [b for b in self.blocks if b.layer == self.layer]

    @property
    def stacks_here(self) -> list[Stack]:
        """The experts of its largest layer, if it has some."""
        return [s for s in self.stacks if s.layer == self.layer]

    @property
    def parts(self) -> list[Block | Stack]:
        """Its blocks and stacks of experts, in the order of `experts.find_parts`."""
        return sorted([*self.blocks, *self.stacks], key=lambda part: part.layer)

    def _fill(self, module: nn.Module) -> None:
        for name, own in module._parameters.items():
            if own is not None:
                made = torch.empty(own.shape, dtype=self.dtype, device=self.device)
                module._parameters[name] = nn.Parameter(made, requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=self.device)

    @contextmanager
    def running(self) -> Iterator[LiveBytes]:
        """Run work on the copy inside the context, and count what it makes."""
        own = (t for t in (*self.model.parameters(), *self.model.buffers()) if not t.is_meta)
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            _unpacked(),
            _looped(),
            self._mode,
            LiveBytes(own) as live,
        ):
            yield live

    def runner(self, batch: Batch) -> LayerRunner:
        """A runner of one batch, in front of the largest layer; to be called inside `running`."""
        ids = torch.zeros(batch.size, batch.length, dtype=torch.long, device="cpu")
        made = LayerRunner(self.model, [ids])
        made.hidden[0] = made.entering(self.layer, made.hidden[0])
        return made

    def layer_pass(self, batch: Batch) -> int:
        """Bytes of one forward pass through the largest layer, its input and output among them."""
        with self.running() as live:
            runner = self.runner(batch)
            runner.hidden[0] = runner.run(self.layer, 0, runner.hidden[0])
        return live.peak

    def head_pass(self, batch: Batch) -> int:
        """Bytes of the losses of a batch from its last hidden states, these among them."""
        with self.running() as live:
            runner = self.runner(batch)
            next_token_losses(self.model, runner.finish(0, runner.hidden[0]), runner.batches[0])
        return live.peak


@contextmanager
def _unpacked() -> Iterator[None]:
    """Several sequences are never packed into one window here. Transformers cannot see that in positions
    without numbers, and would make a mask that it leaves out otherwise."""
    undo = replace_method(
        cast(Any, masking_utils), "find_packed_sequence_indices", lambda *args, **kwargs: None
    )
    try:
        yield
    finally:
        undo()


@contextmanager
def _looped() -> Iterator[None]:
    """The products of all experts are taken one after the other: torch knows the shape of what its own kernel
    makes in bfloat16 alone."""
    undo = replace_method(cast(Any, moe), "_can_use_grouped_mm", lambda *args, **kwargs: False)
    try:
        yield
    finally:
        undo()


def states_of(model: Any, dtype: torch.dtype, windows: int, length: int) -> int:
    """Bytes of the states of some windows between two layers, and of what all layers are given by token."""
    carried = Carried(model)
    return max(windows, 0) * length * (carried.width + carried.by_token) * dtype.itemsize


def measuring(rehearsal: Rehearsal, batch: Batch, windows: int) -> list[Phase]:
    """The parts of the work that measures perplexity on some windows: the layers, then the output head."""
    batch = Batch(min(batch.size, windows), batch.length)
    states = states_of(rehearsal.model, rehearsal.dtype, windows - batch.size, batch.length)
    return [
        Phase("the layers' activations", rehearsal.layer_pass(batch), states),
        Phase("logits", rehearsal.head_pass(batch), states, layers=0),
    ]
