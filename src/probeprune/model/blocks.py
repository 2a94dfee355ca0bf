"""What can be pruned in a model: its attention and MLP blocks, found from one record per family.

A `Family` is a description (attribute paths, no modules); a `Block` is resolved (it points to the
modules of one model). Nothing here knows about scores, ratios or forward passes. To support another
architecture, add a record to `FAMILIES`.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

from probeprune.errors import UsageError
from probeprune.model.families import AttentionRecord, MlpRecord, find_family
from probeprune.model.narrow_linear import NarrowLinear

UnitKind = Literal["group", "balanced", "query"]
"""What one attention unit is. With as many key-value heads as query heads all three are one head.

- `group`: a key-value head with all its query heads; the KV cache shrinks with it.
- `balanced`: one query head, the same number from every group; keys and values stay.
- `query`: any query head; keys and values stay (what the research code does).
"""


@dataclass(frozen=True)
class Member:
    """The part of one linear map that belongs to a block's units.

    Unit `u` owns `width` consecutive rows (`axis` 0, a producer) or columns (`axis` 1, the consumer),
    from `start + u * width` on.
    """

    name: str
    """Of the linear map: its path in the model."""
    linear: nn.Linear
    axis: int
    width: int
    start: int = 0

    def part(self, tensor: torch.Tensor, units: int) -> torch.Tensor:
        """The view of a tensor shaped like the map's weight or bias that belongs to the first units."""
        return tensor.narrow(self.axis if tensor.ndim > 1 else 0, self.start, units * self.width)


@dataclass(frozen=True, eq=False)
class Block:
    """One prunable attention or MLP block of a model.

    The coupled activation `z`, the consumer's input, has shape (batch, sequence, units * unit_width).
    """

    name: str
    layer: int
    kind: Literal["attention", "mlp"]
    units: int
    unit_width: int
    """Channels of `z` a unit owns."""
    members: tuple[Member, ...]
    """What a cut removes: rows of producers, then the consumer's columns."""
    producers: tuple[nn.Linear, ...]
    """All linear maps in front of `z`, also those no unit owns a part of (k, v when queries alone go)."""
    consumer: nn.Linear
    entry: nn.Module
    """The module whose input is the block's normalised input `X`."""
    run: Callable[..., object]
    """The block's own forward from `X` on; its result passes through the consumer."""
    activation: nn.Module | None
    """The activation of an MLP that is no module of its own; else None."""
    norm: nn.Module | None
    """Its input is the residual stream `R`; None where that is the block's own input."""
    head_dim: int = 0
    query_heads: int = 0
    kv_heads: int = 0
    unit_kind: UnitKind = "group"
    query_count: str | None = None
    kv_count: str | None = None
    """As in `AttentionRecord`."""

    @property
    def width(self) -> int:
        """Width of the coupled activation, in channels."""
        return self.units * self.unit_width

    @property
    def group_size(self) -> int:
        """Query heads per key-value head (1 for an MLP)."""
        return self.query_heads // self.kv_heads if self.kv_heads else 1

    # Sizes come from in_features and out_features: weights may be seen through a window.

    @property
    def unit_parameters(self) -> int:
        """Parameters that leave with one unit, the producers' biases included."""
        total = 0
        for m in self.members:
            total += m.width * (m.linear.in_features if m.axis == 0 else m.linear.out_features)
            if m.axis == 0 and m.linear.bias is not None:
                total += m.width
        return total

    @property
    def parameters(self) -> int:
        """Parameters of the whole block, the part no unit owns included."""
        return sum(
            linear.in_features * linear.out_features + (linear.out_features if linear.bias is not None else 0)
            for linear in (*self.producers, self.consumer)
        )


def find_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a supported causal LM, in order."""
    layers = model.get_submodule(find_family(model).layers)
    assert isinstance(layers, nn.ModuleList)
    return layers


def find_blocks(model: nn.Module, units: UnitKind = "group") -> list[Block]:
    """All prunable blocks of a transformers causal LM, in the order they run.

    Args:
        model: a causal LM of a supported family.
        units: what an attention unit is (see `UnitKind`).

    Raises:
        UsageError: unsupported family; or weights that cannot be permuted in place (quantised,
            offloaded, or shared between modules).
    """
    if units not in get_args(UnitKind):
        raise UsageError(f"unknown unit kind {units!r}; choose one of {', '.join(get_args(UnitKind))}.")
    family = find_family(model)
    norm_first = family.norm_first is None or bool(getattr(model.config, family.norm_first))
    blocks = []
    for index, layer in enumerate(find_layers(model)):
        prefix = f"{family.layers}.{index}"
        blocks.append(_attention_block(prefix, index, layer, family.attention, units, norm_first))
        blocks.append(_mlp_block(prefix, index, layer, family.mlp, norm_first))
    _refuse_shared_weights(model, blocks)
    return blocks


def _attention_block(
    prefix: str, index: int, layer: nn.Module, record: AttentionRecord, units: UnitKind, norm_first: bool
) -> Block:
    module = layer.get_submodule(record.module)
    name = f"{prefix}.{record.module}"
    q, k, v, o = (
        _linear(module, path, name) for path in (record.query, record.key, record.value, record.output)
    )
    head_dim = int(getattr(module, record.head_dim))
    query_heads = o.in_features // head_dim
    if record.fused is None:
        kv_heads = k.out_features // head_dim
    elif record.fused == "by head":
        kv_heads = query_heads
    else:
        kv_heads = (q.out_features // head_dim - query_heads) // 2
    group = query_heads // kv_heads
    by_group = units == "group" or group == 1
    if by_group:
        units, count, width = "group", kv_heads, group * head_dim
    else:
        count, width = query_heads, head_dim
    if record.fused == "by head":
        members: tuple[Member, ...] = (Member(f"{name}.{record.query}", q, 0, 3 * head_dim),)
    else:
        members = (Member(f"{name}.{record.query}", q, 0, width),)
        if by_group:
            first = query_heads * head_dim if record.fused else 0
            second = first + kv_heads * head_dim if record.fused else 0
            members += (
                Member(f"{name}.{record.key}", k, 0, head_dim, first),
                Member(f"{name}.{record.value}", v, 0, head_dim, second),
            )
    members += (Member(f"{name}.{record.output}", o, 1, width),)
    return Block(
        name=name,
        layer=index,
        kind="attention",
        units=count,
        unit_width=width,
        members=members,
        producers=tuple(dict.fromkeys((q, k, v))),
        consumer=o,
        entry=module,
        run=module,
        activation=None,
        norm=layer.get_submodule(record.norm) if norm_first else None,
        head_dim=head_dim,
        query_heads=query_heads,
        kv_heads=kv_heads,
        unit_kind=units,
        query_count=record.query_count,
        kv_count=record.kv_count,
    )


def _mlp_block(prefix: str, index: int, layer: nn.Module, record: MlpRecord, norm_first: bool) -> Block:
    name = f"{prefix}.{record.module or 'mlp'}"
    producers = tuple(_linear(layer, path, prefix) for path in record.producers)
    consumer = _linear(layer, record.consumer, prefix)
    activation: nn.Module | None = None
    if record.module is not None:
        entry: nn.Module = layer.get_submodule(record.module)
        run: Callable[..., object] = entry
    else:
        assert record.activation is not None and len(producers) == 1
        entry = producers[0]
        activation = layer.get_submodule(record.activation)

        def run(x: torch.Tensor) -> torch.Tensor:
            return consumer(activation(producers[0](x)))

    return Block(
        name=name,
        layer=index,
        kind="mlp",
        units=consumer.in_features,
        unit_width=1,
        members=(
            # A map that comes twice holds the two parts one above the other.
            *(
                Member(f"{prefix}.{path}", p, 0, 1, consumer.in_features * record.producers[:i].count(path))
                for i, (path, p) in enumerate(zip(record.producers, producers, strict=True))
            ),
            Member(f"{prefix}.{record.consumer}", consumer, 1, 1),
        ),
        producers=tuple(dict.fromkeys(producers)),
        consumer=consumer,
        entry=entry,
        run=run,
        activation=activation,
        norm=layer.get_submodule(record.norm) if norm_first else None,
    )


def _linear(root: nn.Module, path: str, name: str) -> nn.Linear:
    """The linear map at `path`, refused unless its weight is a plain tensor that can be permuted."""
    module = root.get_submodule(path)
    where = f"{name}.{path}"
    if isinstance(module, NarrowLinear):
        raise UsageError(f"a method is attached to this model ({where} shows a part only); detach it first.")
    # Exactly nn.Linear: quantised and adapter-wrapped layers subclass or replace it.
    if type(module) is not nn.Linear or not module.weight.is_floating_point():
        raise UsageError(
            f"{where} is a {type(module).__name__}, not a plain floating-point linear layer; quantised or "
            "wrapped weights cannot be permuted: load the model unquantised (and merge adapters) first."
        )
    hook = getattr(module, "_hf_hook", None)
    if hook is not None and getattr(hook, "offload", False):
        raise UsageError(
            f"{where} is offloaded; pruning needs its weight in place: load the model without offloading."
        )
    return module


def _refuse_shared_weights(model: nn.Module, blocks: list[Block]) -> None:
    """Permuting a weight that two modules use would change the other one too."""
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    spans = sorted(
        (p.data_ptr(), p.data_ptr() + p.numel() * p.element_size(), id(p))
        for p in model.parameters()
        if not p.is_meta and p.numel()
    )
    overlapping: set[int] = set()
    end, reaching = 0, 0  # how far the spans so far reach, and which one
    for first, last, owner in spans:
        if first < end:
            overlapping |= {reaching, owner}
        if last > end:
            end, reaching = last, owner
    for block in blocks:
        for linear in (*block.producers, block.consumer):
            if any(owners[id(p)] > 1 or id(p) in overlapping for p in linear.parameters()):
                raise UsageError(
                    f"a weight of {block.name} is tied to or shares memory with another module; "
                    "give each module its own copy before pruning."
                )
