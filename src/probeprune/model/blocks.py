"""Find the attention and MLP blocks of a model that can be pruned, from its family's record.

A `Family` (families.py) is a description; a `Block` is resolved and points to the modules of one model. Knows
nothing of scores, ratios or forward passes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

from probeprune.errors import UsageError, unknown
from probeprune.model.attention_maps import attention_maps
from probeprune.model.families import find_family
from probeprune.model.family_records import AttentionRecord, MixerRecord, MlpRecord
from probeprune.model.layer_records import (
    attribute,
    has_block,
    mlp_record,
    norm_at,
    shares_kv,
    times_wider,
    whole_heads,
)
from probeprune.model.linear_maps import LinearMap, matrix, oriented, sizes
from probeprune.model.multimodal import text_config
from probeprune.model.permutable import permutable, refuse_shared
from probeprune.model.wrappers import unwrapped

UnitKind = Literal["group", "balanced", "query"]
"""What one attention unit is. In a model with one key-value head per query head, all three are one head; in a
model made with a single key-value head (GPT-BigCode, Falcon), which has to stay, all three are a query head.

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
    linear: LinearMap
    axis: int
    width: int
    start: int = 0

    def part(self, tensor: torch.Tensor, units: int) -> torch.Tensor:
        """View of the first `units` units in a weight (out, in) or a bias."""
        return tensor.narrow(self.axis if tensor.ndim > 1 else 0, self.start, units * self.width)

    @property
    def weight(self) -> torch.Tensor:
        """The map's weight (out, in), without gradients: a view."""
        return matrix(self.linear)

    def oriented(self, tensor: torch.Tensor) -> torch.Tensor:
        """View (out, in) of a tensor that lies as the map's weight does."""
        return oriented(self.linear, tensor)


@dataclass(frozen=True, eq=False)
class Block:
    """One attention or MLP block of a model, or one of the kind `mixer`: neither of both, which stays whole.

    The coupled activation `z`, the consumer's input, has shape (batch, sequence, units * unit_width).
    """

    name: str
    layer: int
    kind: Literal["attention", "mlp", "mixer"]
    units: int
    unit_width: int
    """Number of channels of `z` that belong to one unit."""
    members: tuple[Member, ...]
    """The parts that a cut makes smaller: rows of producers, then the consumer's columns."""
    producers: tuple[LinearMap, ...]
    """All linear maps in front of `z`, including those without units (key and value if only query heads are
    removed)."""
    consumer: LinearMap
    entry: nn.Module
    """The module whose input is the block's normalised input `X`."""
    run: Callable[..., object]
    """The block's own forward from `X` on; its result passes through the consumer."""
    activation: nn.Module | None
    """The activation of an MLP that is no module of its own; else None."""
    norm: nn.Module | None
    """The norm in front of the block, whose input is the residual stream `R`; None if `X` is `R`."""
    head_dim: int = 0
    """Size of a head's queries and keys."""
    value_dim: int = 0
    """Size of its values."""
    query_heads: int = 0
    kv_heads: int = 0
    cached: int | None = None
    """Numbers that a token leaves in the KV cache whatever heads stay: its latents, or none where the block
    reads keys and values of another. None where they are keys and values of the heads that stay."""
    unit_kind: UnitKind = "group"
    query_count: str | None = None
    kv_count: str | None = None
    query_width: str | None = None
    """`query_count`, `kv_count` and `query_width` of the family's `AttentionRecord`."""
    repeats_kv: bool = False
    """Whether the KV cache holds keys and values once for every query head."""
    whole: str | None = None
    """Why no unit of the block can go, in words that follow the model's name; None where units can go."""
    input_factor: float = 1.0
    """What the norm's output is multiplied by before the block reads it."""
    follows: int = 0
    """For an MLP that a plain config gives this many channels for each channel of an expert, beside it or in
    other layers; 0 for one of its own width."""
    times: int = 1
    """For an MLP that a plain config makes this many times as wide as it says of all MLPs."""

    @property
    def width(self) -> int:
        """Width of the coupled activation, in channels."""
        return self.units * self.unit_width

    @property
    def fine(self) -> bool:
        """Whether units are channels."""
        return self.kind == "mlp"

    @property
    def parts(self) -> int:
        """Number of parts that keep the same number of units each."""
        return self.kv_heads if self.kind == "attention" and self.unit_kind == "balanced" else 1

    @property
    def least(self) -> int:
        """The smallest number of units that may stay."""
        return 1

    @property
    def group_size(self) -> int:
        """Query heads per key-value head (1 for an MLP)."""
        return self.query_heads // self.kv_heads if self.kv_heads else 1

    def counts(self, query_heads: int, kv_heads: int) -> dict[str, int]:
        """What the attention module's forward reads of its heads: an attribute, or one of its config
        (`config.x`)."""
        values = {
            self.query_count: query_heads,
            self.kv_count: kv_heads,
            self.query_width: query_heads * self.head_dim,
        }
        return {name: value for name, value in values.items() if name is not None}

    def cached_numbers(self, units: int) -> int:
        """Numbers that a token leaves in the KV cache with `units` units in view."""
        own = self.cached_heads(units) * (self.head_dim + self.value_dim)
        return own if self.cached is None else self.cached

    def cached_heads(self, units: int) -> int:
        """Heads of the keys in a KV cache that this block fills with `units` units in view."""
        if self.cached is not None:
            return 1
        grouped = self.unit_kind == "group"
        if self.repeats_kv:
            return units * self.group_size if grouped else units
        return units if grouped else self.kv_heads

    @property
    def consumer_weight(self) -> torch.Tensor:
        """The weight (d, n) that the consumer's forward reads, without gradients: a view."""
        return matrix(self.consumer)

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream, which the consumer writes to."""
        return sizes(self.consumer)[0]

    # Sizes are what the maps say: a view may show narrower weights.

    @property
    def unit_parameters(self) -> int:
        """Parameters removed with one unit, including the producers' biases."""
        total = 0
        for m in self.members:
            total += m.width * sizes(m.linear)[1 - m.axis]
            if m.axis == 0 and m.linear.bias is not None:
                total += m.width
        return total

    @property
    def parameters(self) -> int:
        """Parameters of the whole block, including those that belong to no unit."""
        total = 0
        for linear in (*self.producers, self.consumer):
            rows, columns = sizes(linear)
            total += rows * columns + (rows if linear.bias is not None else 0)
        return total


def uncalled_consumer(block: Block) -> UsageError:
    """The error for a block whose consumer is never called, though its weights may be used."""
    return UsageError(
        f"{block.name} does not call the module {block.members[-1].name}; switch off the fused kernel or "
        "compiled block that takes its place."
    )


def kept_whole(block: Block) -> UsageError:
    """The error for taking units from a block that can lose none."""
    return UsageError(
        f"no unit of {block.name} can go, because the model {block.whole}; keep it, or prune MLPs alone."
    )


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
    family, config = find_family(model), text_config(model.config)
    norm_first = family.norm_first is None or bool(getattr(config, family.norm_first))
    whole = whole_heads(family.attention, config)
    blocks = []
    for index, layer in enumerate(find_layers(model)):
        prefix = f"{family.layers}.{index}"
        mixers = [r for r in family.mixers if has_block(layer, family, r)]
        blocks += [_mixer_block(prefix, index, layer, r) for r in mixers if r.module is not None]
        if has_block(layer, family, family.attention):
            blocks.append(_attention_block(prefix, index, layer, family.attention, units, norm_first, whole))
        mlp, follows = mlp_record(family, layer, config)
        if mlp is not None and has_block(layer, family, mlp):
            times = times_wider(mlp, layer, config)
            blocks.append(_mlp_block(prefix, index, layer, mlp, norm_first, follows, times))
        blocks += [_mixer_block(prefix, index, layer, r) for r in mixers if r.module is None]
    refuse_shared(model, {b.name: (*b.producers, b.consumer) for b in blocks})
    return blocks


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
    maps = attention_maps(module, record, name)
    group = maps.group_size
    repeats_kv = record.repeats_kv is not None and bool(attribute(module, record.repeats_kv))
    multi_query = record.multi_query is not None and bool(attribute(module, record.multi_query))
    if group == 1:
        units = "group"
    elif maps.kv_heads == 1 and (units == "query" or (multi_query and not repeats_kv)):
        units = "balanced"
    elif maps.kv_heads > 1 and maps.by_group and units != "group":
        raise UsageError(
            f"{name} holds its heads group by group, so they leave in groups; use unit_kind='group'."
        )
    grouped = units == "group"
    width = maps.value_dim * (group if grouped else 1)
    if whole is None and grouped and shares_kv(record, module):
        whole = _SHARED
    return Block(
        name=name,
        layer=index,
        kind="attention",
        units=maps.kv_heads if grouped else maps.query_heads,
        unit_width=width,
        members=(
            *(Member(f"{name}.{r.path}", r.linear, 0, r.width, r.start) for r in maps.rows(grouped)),
            Member(f"{name}.{record.output}", maps.output, 1, width),
        ),
        producers=maps.producers,
        consumer=maps.output,
        entry=module,
        run=module,
        activation=None,
        norm=norm_at(layer, record.norm) if norm_first else None,
        head_dim=maps.head_dim,
        value_dim=maps.value_dim,
        query_heads=maps.query_heads,
        kv_heads=maps.kv_heads,
        cached=maps.cached,
        unit_kind=units,
        query_count=record.query_count,
        kv_count=record.kv_count,
        query_width=record.query_width,
        repeats_kv=repeats_kv,
        whole=whole,
        input_factor=1.0 if record.input_factor is None else float(getattr(layer, record.input_factor)),
    )


def _mlp_block(
    prefix: str, index: int, layer: nn.Module, record: MlpRecord, norm_first: bool, follows: int, times: int
) -> Block:
    name = f"{prefix}.{record.module or 'mlp'}"
    producers = tuple(permutable(layer, path, prefix) for path in record.producers)
    consumer = permutable(layer, record.consumer, prefix)
    width = sizes(consumer)[1]
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
        units=width,
        unit_width=1,
        members=(
            # A map named twice holds the rows of both, one after the other.
            *(
                Member(f"{prefix}.{path}", p, 0, 1, width * record.producers[:i].count(path))
                for i, (path, p) in enumerate(zip(record.producers, producers, strict=True))
            ),
            Member(f"{prefix}.{record.consumer}", consumer, 1, 1),
        ),
        producers=tuple(dict.fromkeys(producers)),
        consumer=consumer,
        entry=entry,
        run=run,
        activation=activation,
        norm=norm_at(layer, record.norm) if norm_first else None,
        follows=follows,
        times=times,
    )


_SHARED = (
    "has layers that read keys and values of others, and groups of heads stay in all of these (query heads "
    "can go: units 'balanced')"
)
_MIXES = "mixes tokens in it without heads that could go one by one"
_GIVEN = "adds what a layer alone is given through it"


def _mixer_block(prefix: str, index: int, layer: nn.Module, record: MixerRecord) -> Block:
    alone = record.module is None
    module = layer if record.module is None else layer.get_submodule(record.module)
    name = prefix if alone else f"{prefix}.{record.module}"
    producers = tuple(permutable(module, path, name) for path in record.maps)
    consumer = permutable(module, record.output, name)
    entry = producers[0] if alone else module
    width = sizes(consumer)[1]
    return Block(
        name=f"{name}.{record.output}" if alone else name,
        layer=index,
        kind="mixer",
        units=1,
        unit_width=width,
        members=(Member(f"{name}.{record.output}", consumer, 1, width),),
        producers=producers,
        consumer=consumer,
        entry=entry,
        run=entry,
        activation=None,
        norm=norm_at(layer, record.norm),
        whole=_GIVEN if alone else _MIXES,
    )
