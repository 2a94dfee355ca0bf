"""What can be pruned in a model: its attention and MLP blocks, found from one record per family.

A `Family` is a description (attribute paths, no modules); a `Block` is resolved (it points to the
modules of one model). Nothing here knows about scores, ratios or forward passes. To support another
architecture, add a record to `FAMILIES`.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import nn

from probeprune.errors import UsageError

UnitKind = Literal["group", "balanced", "query"]
"""What one attention unit is. With as many key-value heads as query heads all three are one head.

- `group`: a key-value head with all its query heads; the KV cache shrinks with it.
- `balanced`: one query head, the same number from every group; keys and values stay.
- `query`: any query head; keys and values stay (what the research code does).
"""


@dataclass(frozen=True)
class AttentionRecord:
    """Where a decoder layer keeps its attention block; paths are relative to the layer."""

    module: str = "self_attn"
    norm: str = "input_layernorm"
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "o_proj"
    heads_attribute: str | None = None
    """The module's attribute with its number of query heads, where its forward reads one."""


@dataclass(frozen=True)
class MlpRecord:
    """Where a decoder layer keeps its MLP block; paths are relative to the layer."""

    module: str | None = "mlp"
    """None where the layer's own forward computes the MLP."""
    norm: str = "post_attention_layernorm"
    producers: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    consumer: str = "mlp.down_proj"
    activation: str | None = None
    """Path of the activation; needed only where there is no module."""


@dataclass(frozen=True)
class Family:
    """One architecture family, as data.

    `norm_first` names the config flag that, when false, puts the norms behind the blocks (the
    residual stream is then a block's own input).
    """

    name: str
    model_types: tuple[str, ...]
    layers: str = "model.layers"
    attention: AttentionRecord = AttentionRecord()
    mlp: MlpRecord = MlpRecord()
    norm_first: str | None = None


_SANDWICH_MLP = replace(MlpRecord(), norm="pre_feedforward_layernorm")

FAMILIES: tuple[Family, ...] = (
    Family("LLaMA 1, 2, 3, SmolLM2", ("llama",)),
    Family("Mistral", ("mistral",)),
    Family("Qwen2, Qwen2.5", ("qwen2",)),
    Family("Qwen3", ("qwen3",)),
    Family("Gemma 2", ("gemma2",), mlp=_SANDWICH_MLP),
    Family("Gemma 3 (text)", ("gemma3_text",), mlp=_SANDWICH_MLP),
    Family(
        "OPT",
        ("opt",),
        layers="model.decoder.layers",
        attention=AttentionRecord(
            norm="self_attn_layer_norm", output="out_proj", heads_attribute="num_heads"
        ),
        mlp=MlpRecord(
            module=None,
            norm="final_layer_norm",
            producers=("fc1",),
            consumer="fc2",
            activation="activation_fn",
        ),
        norm_first="do_layer_norm_before",
    ),
)


@dataclass(frozen=True)
class Member:
    """The part of one linear map that belongs to a block's units.

    Unit `u` owns `width` consecutive rows (`axis` 0, a producer) or columns (`axis` 1, the consumer),
    from `u * width` on.
    """

    linear: nn.Linear
    axis: int
    width: int


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
    norm: nn.Module | None
    """Its input is the residual stream `R`; None where that is the block's own input."""
    head_dim: int = 0
    query_heads: int = 0
    kv_heads: int = 0
    unit_kind: UnitKind = "group"
    heads_attribute: str | None = None

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


def supported_models() -> str:
    """One line that lists the supported families with their `model_type`s."""
    return "; ".join(f"{f.name} ({', '.join(f.model_types)})" for f in FAMILIES)


def find_family(model: nn.Module) -> Family:
    """The record of `model`'s architecture family, by its config's `model_type`.

    Raises `UsageError` for a model of no known family.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    raise UsageError(
        f"model type {model_type!r} ({type(model).__name__}) is not supported; supported are: "
        f"{supported_models()}. To add it, write one Family record in probeprune/blocks.py "
        "(see CONTRIBUTING.md, 'Add a model family')."
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
    head_dim = int(module.head_dim)  # type: ignore[arg-type]
    query_heads, kv_heads = o.in_features // head_dim, k.out_features // head_dim
    group = query_heads // kv_heads
    if units == "group" or group == 1:
        units, count, width = "group", kv_heads, group * head_dim
        members: tuple[Member, ...] = (
            Member(q, 0, width),
            Member(k, 0, head_dim),
            Member(v, 0, head_dim),
            Member(o, 1, width),
        )
    else:
        count, width = query_heads, head_dim
        members = (Member(q, 0, width), Member(o, 1, width))
    return Block(
        name=name,
        layer=index,
        kind="attention",
        units=count,
        unit_width=width,
        members=members,
        producers=(q, k, v),
        consumer=o,
        entry=module,
        run=module,
        norm=layer.get_submodule(record.norm) if norm_first else None,
        head_dim=head_dim,
        query_heads=query_heads,
        kv_heads=kv_heads,
        unit_kind=units,
        heads_attribute=record.heads_attribute,
    )


def _mlp_block(prefix: str, index: int, layer: nn.Module, record: MlpRecord, norm_first: bool) -> Block:
    name = f"{prefix}.{record.module or 'mlp'}"
    producers = tuple(_linear(layer, path, prefix) for path in record.producers)
    consumer = _linear(layer, record.consumer, prefix)
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
        members=(*(Member(p, 0, 1) for p in producers), Member(consumer, 1, 1)),
        producers=producers,
        consumer=consumer,
        entry=entry,
        run=run,
        norm=layer.get_submodule(record.norm) if norm_first else None,
    )


def _linear(root: nn.Module, path: str, name: str) -> nn.Linear:
    """The linear map at `path`, refused unless its weight is a plain tensor that can be permuted."""
    module = root.get_submodule(path)
    where = f"{name}.{path}"
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
