"""Find the attention and MLP blocks of a model that can be pruned, from its family's record.

A `Family` (families.py) is a description; a `Block` is resolved and points to the modules of one model. Knows
nothing of scores, ratios or forward passes.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from probeprune.errors import UsageError, unknown
from probeprune.model.families import AttentionRecord, MlpRecord, find_family
from probeprune.model.narrow_linear import NarrowLinear
from probeprune.model.wrappers import unwrapped

UnitKind = Literal["group", "balanced", "query"]
"""What one attention unit is. In a model with one key-value head per query head, all three are one head.

- `group`: a key-value head with all its query heads; the KV cache shrinks too.
- `balanced`: a query head, with the same number kept in every group; keys and values stay.
- `query`: a query head, any number kept in each group; keys and values stay (as in the research code).
"""


@dataclass(frozen=True)
class Member:
    """The part of one linear map that belongs to a block's units.

    Unit `u` owns `width` consecutive rows (`axis` 0, a producer) or columns (`axis` 1, the consumer),
    starting at `start + u * width`.
    """

    name: str
    """Path of the linear map in the model."""
    linear: nn.Linear
    axis: int
    width: int
    start: int = 0

    def part(self, tensor: torch.Tensor, units: int) -> torch.Tensor:
        """View of the first `units` units in a tensor shaped like the map's weight or bias."""
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
    """Number of channels of `z` that belong to one unit."""
    members: tuple[Member, ...]
    """The parts that a cut makes smaller: rows of producers, then the consumer's columns."""
    producers: tuple[nn.Linear, ...]
    """All linear maps in front of `z`, including those without units (key and value if only query heads are
    removed)."""
    consumer: nn.Linear
    entry: nn.Module
    """The module whose input is the block's normalised input `X`."""
    run: Callable[..., object]
    """The block's own forward from `X` on; its result passes through the consumer."""
    activation: nn.Module | None
    """The activation of an MLP that is no module of its own; else None."""
    norm: nn.Module | None
    """The norm in front of the block, whose input is the residual stream `R`; None if `X` is `R`."""
    head_dim: int = 0
    query_heads: int = 0
    kv_heads: int = 0
    unit_kind: UnitKind = "group"
    query_count: str | None = None
    kv_count: str | None = None
    """`query_count` and `kv_count` of the family's `AttentionRecord`."""
    whole: str | None = None
    """Why no unit of the block can go, in words that follow the model's name; None where units can go."""

    @property
    def width(self) -> int:
        """Width of the coupled activation, in channels."""
        return self.units * self.unit_width

    @property
    def group_size(self) -> int:
        """Query heads per key-value head (1 for an MLP)."""
        return self.query_heads // self.kv_heads if self.kv_heads else 1

    # Sizes come from in_features and out_features: a view may show narrower weights.

    @property
    def unit_parameters(self) -> int:
        """Parameters removed with one unit, including the producers' biases."""
        total = 0
        for m in self.members:
            total += m.width * (m.linear.in_features if m.axis == 0 else m.linear.out_features)
            if m.axis == 0 and m.linear.bias is not None:
                total += m.width
        return total

    @property
    def parameters(self) -> int:
        """Parameters of the whole block, including those that belong to no unit."""
        return sum(
            linear.in_features * linear.out_features + (linear.out_features if linear.bias is not None else 0)
            for linear in (*self.producers, self.consumer)
        )


def uncalled_consumer(block: Block) -> UsageError:
    """The error for a block whose consumer is never called, though its weights may be used."""
    return UsageError(
        f"{block.name} does not call the module {block.members[-1].name}; switch off the fused kernel or "
        "compiled block that takes its place."
    )


def kept_whole(block: Block) -> UsageError:
    """The error for taking units from a block that can lose none."""
    return UsageError(f"no head of this model can go, because it {block.whole}; prune MLPs alone.")


def find_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a supported causal LM, in order."""
    layers = model.get_submodule(find_family(model).layers)
    assert isinstance(layers, nn.ModuleList)
    return layers


def find_blocks(model: nn.Module, units: UnitKind = "group") -> list[Block]:
    """All prunable blocks of a transformers causal LM, in the order in which they run.

    Args:
        model: a causal LM of a supported family.
        units: what an attention unit is (see `UnitKind`).

    Raises:
        UsageError: an unsupported family, an unknown unit kind, or weights that cannot be permuted in place
            (quantised, or shared between modules).
    """
    if units not in get_args(UnitKind):
        raise UsageError(unknown("unit kind", units, get_args(UnitKind)))
    model = unwrapped(model)
    family = find_family(model)
    norm_first = family.norm_first is None or bool(getattr(model.config, family.norm_first))
    whole = whole_heads(family.attention, model.config)
    blocks = []
    for index, layer in enumerate(find_layers(model)):
        prefix = f"{family.layers}.{index}"
        blocks.append(_attention_block(prefix, index, layer, family.attention, units, norm_first, whole))
        blocks.append(_mlp_block(prefix, index, layer, family.mlp, norm_first))
    _refuse_shared_weights(model, blocks)
    return blocks


def whole_heads(record: AttentionRecord, config: Any) -> str | None:
    """Why no head of a model with this config can go; None where heads can go."""
    return record.whole if record.whole_if is None or getattr(config, record.whole_if) else None


def attribute(module: Any, path: str) -> Any:
    """What a module has at a dotted path, such as `config.num_attention_heads`; None if there is none."""
    for part in path.split("."):
        module = getattr(module, part, None)
    return module


def _attention_block(
    prefix: str,
    index: int,
    layer: nn.Module,
    record: AttentionRecord,
    units: UnitKind,
    norm_first: bool,
    whole: str | None,
) -> Block:
    module = layer.get_submodule(record.module)
    name = f"{prefix}.{record.module}"
    paths = (record.query, record.key, record.value, record.output)
    q, k, v, o = (_linear(module, path, name) for path in paths)
    head_dim = int(getattr(module, record.head_dim))
    query_heads = o.in_features // head_dim
    key_rows, value_rows, kv_heads = _key_value_rows(record, query_heads, head_dim, q, k)
    group = query_heads // kv_heads
    if group == 1:
        units = "group"
    count, width = (kv_heads, group * head_dim) if units == "group" else (query_heads, head_dim)
    query, key, value, output = (f"{name}.{path}" for path in paths)
    if record.fused == "by head":
        rows: tuple[Member, ...] = (Member(query, q, 0, 3 * head_dim),)
    else:
        rows = (Member(query, q, 0, width),)
        if units == "group":
            rows += (Member(key, k, 0, head_dim, key_rows), Member(value, v, 0, head_dim, value_rows))
    return Block(
        name=name,
        layer=index,
        kind="attention",
        units=count,
        unit_width=width,
        members=(*rows, Member(output, o, 1, width)),
        producers=tuple(dict.fromkeys((q, k, v))),
        consumer=o,
        entry=module,
        run=module,
        activation=None,
        norm=_norm(layer, record.norm) if norm_first else None,
        head_dim=head_dim,
        query_heads=query_heads,
        kv_heads=kv_heads,
        unit_kind=units,
        query_count=record.query_count,
        kv_count=record.kv_count,
        whole=whole,
    )


def _norm(layer: nn.Module, path: str | None, instead: str | None = None) -> nn.Module | None:
    """The norm at a path of a layer; the one at `instead` where the layer has None there."""
    if path is None:
        return None
    found = attribute(layer, path) if instead is not None else None
    return found if isinstance(found, nn.Module) else layer.get_submodule(instead or path)


def _key_value_rows(
    record: AttentionRecord, query_heads: int, head_dim: int, query: nn.Linear, key: nn.Linear
) -> tuple[int, int, int]:
    """First row of the keys, first row of the values (in the maps that make them), and key-value heads."""
    if record.fused is None:
        return 0, 0, key.out_features // head_dim
    if record.fused == "stacked":
        kv_heads = (query.out_features // head_dim - query_heads) // 2
        return query_heads * head_dim, (query_heads + kv_heads) * head_dim, kv_heads
    return head_dim, 2 * head_dim, query_heads  # by head: within the rows of each head


def _mlp_block(prefix: str, index: int, layer: nn.Module, record: MlpRecord, norm_first: bool) -> Block:
    name = f"{prefix}.{record.module or 'mlp'}"
    producers = tuple(_linear(layer, path, prefix) for path in record.producers)
    consumer = _linear(layer, record.consumer, prefix)
    activation: nn.Module | None = None
    if record.module is not None:
        entry: nn.Module = layer.get_submodule(record.module)
        run: Callable[..., object] = entry
    else:
        if record.activation is None or len(producers) != 1:
            raise UsageError(
                f"the MlpRecord of {name} names no module, so it needs exactly one producer and an "
                "activation; complete it in probeprune/model/families.py."
            )
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
            # A map named twice holds the rows of both, one after the other.
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
        norm=_norm(layer, record.norm, record.shared_norm) if norm_first else None,
    )


def _linear(root: nn.Module, path: str, name: str) -> nn.Linear:
    """The linear map at `path`. Raises `UsageError` unless its weight can be permuted in place."""
    module = root.get_submodule(path)
    where = f"{name}.{path}"
    if isinstance(module, NarrowLinear):
        raise UsageError(f"a method is attached to this model ({where} shows a part only); detach it first.")
    # Exactly nn.Linear: quantised and adapter-wrapped layers subclass or replace it.
    weight = module._parameters.get("weight")
    plain = weight is None or (type(weight.data) is torch.Tensor and weight.is_floating_point())
    if type(module) is not nn.Linear or not plain:
        kind = f"{type(module).__module__}.{type(module).__name__}"
        made_of = "" if weight is None else f" with a weight of {type(weight.data).__name__} {weight.dtype}"
        raise UsageError(
            f"{where} is a {kind}{made_of}, not a plain floating-point linear layer; quantised and wrapped "
            "weights cannot be permuted: load the model unquantised and merge adapters first."
        )
    if weight is None:
        raise UsageError(
            f"the weight of {where} is computed at every pass (torch.nn.utils.prune, weight_norm); make it a "
            "parameter first, for example with torch.nn.utils.prune.remove."
        )
    if weight.is_inference():
        raise UsageError(
            f"{where} was made under torch.inference_mode(), and its weight cannot be permuted in place; "
            "load the model outside."
        )
    return module


def _refuse_shared_weights(model: nn.Module, blocks: list[Block]) -> None:
    """Raise `UsageError` for a weight used by two modules: permuting it would change both."""
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    spans = sorted(
        (p.data_ptr(), p.data_ptr() + p.numel() * p.element_size(), id(p))
        for p in model.parameters()
        if not p.is_meta and p.numel()
    )
    overlapping: set[int] = set()
    end, furthest = 0, 0  # the end of the spans so far, and the owner of the one that reaches it
    for first, last, owner in spans:
        if first < end:
            overlapping |= {furthest, owner}
        if last > end:
            end, furthest = last, owner
    for block in blocks:
        for linear in (*block.producers, block.consumer):
            if any(owners[id(p)] > 1 or id(p) in overlapping for p in linear.parameters()):
                raise UsageError(
                    f"a weight of {block.name} is tied to another module or shares its memory; "
                    "give each module its own copy before pruning."
                )
