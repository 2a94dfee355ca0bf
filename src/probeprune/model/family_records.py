"""What the records of model families are made of: where a decoder layer has its attention and its MLP.

A record says where the linear maps of each block are; what it leaves out is as in LLaMA. Knows no model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

PRUNED_PREFIX = "pruned_"
"""Prefix of the `model_type` of checkpoints whose layers differ in width (see `modeling_pruned.py`)."""


@dataclass(frozen=True)
class SharedKV:
    """How later layers get the keys and values of earlier ones: in an argument of every layer, a dictionary
    of (keys, values) that the last layer with keys and values of its own fills in for those of its type."""

    layers: str = "num_kv_shared_layers"
    """Config field with the number of layers that read those of others."""
    argument: str = "shared_kv_states"
    stores: str = "store_full_length_kv"
    """The attention module's flag for keys and values that later layers read."""
    reads: str = "is_kv_shared_layer"
    """Its flag for those of an earlier layer."""
    key: str = "layer_type"
    """Its attribute under which both find them."""


@dataclass(frozen=True)
class AttentionRecord:
    """Where a decoder layer has its attention block. The paths of `module` and `norm` are relative to the
    layer, those of the linear maps to the module."""

    module: str = "self_attn"
    norm: str | tuple[str, ...] | None = "input_layernorm"
    """Of several paths, the first that a layer has; None for a block that reads the residual stream."""
    query: str | tuple[str, ...] = "q_proj"
    key: str = "k_proj"
    value: str | tuple[str, ...] = "v_proj"
    """Query, key and value may all name the same linear map, see `fused`. Of several paths, the first that a
    module has: values may be what the map of keys makes."""
    output: str = "o_proj"
    fused: Literal["stacked", "by group", "by head"] | None = None
    """Order of the rows of a map that makes queries, keys and values together: all queries, then all keys,
    then all values (`stacked`), or key-value head by key-value head its queries, its key and its value
    (`by group`). Of one that makes keys and values alone, for every query head its own: head by head its key
    and its value (`by head`)."""
    latents: tuple[str, ...] = ()
    """Linear maps in front of those that all heads read, which stay: a module need not have all of them. The
    last makes all that a KV cache holds where the module has `expands`."""
    expands: str | None = None
    """The method by which a module makes keys and values from what a KV cache holds; where it lacks that, the
    cache holds keys and values (`transformers` before 5.15)."""
    head_dim: str = "head_dim"
    """The module's attribute that holds its head size."""
    value_dim: str | None = None
    """The same of values alone, where that of queries and keys is another."""
    query_count: str | None = None
    """Where the module's forward reads its number of query heads: an attribute of the module or of its config
    (`config.num_attention_heads`). None if it does not read one."""
    kv_count: str | None = None
    """The same for the number of key-value heads."""
    query_width: str | None = None
    """The same for the width of all queries together: the number of heads times their size."""
    multi_query: str | None = None
    """The module's flag for a single key-value head, which all query heads read."""
    repeats_kv: str | None = None
    """The module's flag for keys and values that are repeated for every query head before they are cached."""
    bias_field: str = "attention_bias"
    """Config field that gives the block's linear maps biases; configs without the field have none to give."""
    plain_heads: bool = True
    """Whether a plain config of the family, or of its `Twin`, holds fewer heads of the same size. It cannot
    where the number of heads sets their size or must divide the hidden size, or where the hidden size sets
    the width of the output map."""
    gated: bool = False
    """Whether the query map makes a gate of the same width too, head by head its queries and its gate."""
    gate: str | None = None
    """A map of its own for such a gate of each head."""
    input_factor: str | None = None
    """The layer's attribute by which the norm's output is multiplied before the module reads it."""
    only_in: str | None = None
    """Of a hybrid family: the `block_type` of the layers that have this block; None if the module says so."""
    shared_kv: SharedKV | None = None
    """How layers share keys and values; None in a family whose layers have their own."""
    whole: str | None = None
    """Why no head can go, to follow a model's name; None where heads can go."""
    whole_if: str | None = None
    """Config flag that must be true for `whole` to hold; None where it always does."""


@dataclass(frozen=True)
class MlpRecord:
    """Where a decoder layer has its MLP block; all paths are relative to the layer."""

    module: str | None = "mlp"
    """None if the layer's own forward computes the MLP."""
    norm: str | tuple[str, ...] | None = "post_attention_layernorm"
    """Of several paths, the first that a layer has: it may have one norm for both blocks. None for a block
    that reads the residual stream."""
    producers: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    """A map named twice makes both: the rows of the first, then those of the second."""
    consumer: str = "mlp.down_proj"
    activation: str | None = None
    """Path of the activation function; needed only if `module` is None."""
    width_field: str | None = "intermediate_size"
    """Config field with the width of all MLPs; None where the modelling code has it fixed."""
    said_with: Mapping[str, Any] = field(default_factory=dict)
    """Config fields under whose values that field is the width itself."""
    twice_if: tuple[str, str] | None = None
    """A config flag and a flag of the layer; where both are true, the MLP is twice as wide as that field
    says."""
    bias_field: str = "mlp_bias"
    """Config field that gives the block's linear maps biases; configs without the field have none to give."""
    only_in: str | None = None
    """As in `AttentionRecord`."""


@dataclass(frozen=True)
class MixerRecord:
    """Where some decoder layers have linear maps that are neither attention nor MLP, which stay whole: a
    block that mixes tokens in another way, or one that adds what the layer alone is given.

    The paths of `module` and `norm` are relative to the layer, those of the linear maps to the module.
    """

    module: str | None
    """None if the layer's own forward computes it, behind its other blocks: all paths are relative to the
    layer then."""
    norm: str | None = "input_layernorm"
    """None for a block that reads the residual stream."""
    maps: tuple[str, ...] = ()
    """All linear maps but the last."""
    output: str = "out_proj"
    """The map that writes to the residual stream."""
    only_in: str | None = None
    """As in `AttentionRecord`."""


@dataclass(frozen=True)
class ExpertsRecord:
    """Where a sparse decoder layer has its experts: tensors with one entry per expert in front,
    `gate_up_proj` (without a gate `up_proj`) and `down_proj`. All paths are relative to the layer."""

    module: str = "mlp.experts"
    """Module that holds the tensors; a layer without it is dense."""
    entry: str = "mlp"
    """Module whose input goes to the router, the experts and the shared MLP."""
    gated: bool = True
    """Whether an expert has a gate."""
    transposed: bool = False
    """Whether an expert's matrices lie as (in, out)."""
    interleaved: bool = False
    """Whether the rows of gate and up alternate; otherwise all of the gate come first."""
    biases: bool = False
    """Whether there are `gate_up_proj_bias` and `down_proj_bias`."""
    router: tuple[str, ...] = ("mlp.gate.weight",)
    """Parameters and buffers of the router with one entry per expert: on their first axis, or on their second
    where the first has a single entry; of some, those that a layer has."""
    beside: tuple[str, ...] = ()
    """Weights around the experts that no expert owns, such as the gate of the shared MLP, or a map of what
    all experts read; those of them that a layer has count."""
    counts: tuple[str, ...] = ("mlp.experts.num_experts", "mlp.gate.num_experts")
    """Attributes with the number of experts that forward passes read."""
    widths: tuple[str, ...] = ("mlp.experts.intermediate_dim",)
    """Attributes with the width of an expert."""
    count_field: str = "num_experts"
    """Config field with the number of experts."""
    width_field: str = "moe_intermediate_size"
    """Config field with the width of an expert."""
    per_token_field: str = "num_experts_per_tok"
    """Config field with the number of experts that the router takes for a token."""
    group_fields: tuple[str, str] | None = None
    """Config fields with the number of groups of experts and the number of groups taken for a token."""
    shared: MlpRecord | None = None
    """The MLP beside the experts that sees every token; its `width_field` is None where `shared_times` says
    its width."""
    shared_times: str | int = 0
    """How many experts wide a plain config has the shared MLP: a number, or a config field with it; 0 where
    its width has a field of its own."""
    everywhere: bool = False
    """Whether every layer of the family that has an MLP or experts is sparse."""
    scales_input: bool = False
    """Whether the router's weight multiplies an expert's input, and every expert sees every token, those that
    are not its own as zeros. Otherwise the weight multiplies the output of the experts that were taken."""

    @property
    def producer(self) -> str:
        """The tensor whose rows make an expert's channels."""
        return "gate_up_proj" if self.gated else "up_proj"


@dataclass(frozen=True)
class Twin:
    """Another family that computes the same function and whose config ties the head size to nothing."""

    model_type: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Values of config fields that make it the same function."""


@dataclass(frozen=True)
class Family:
    """One architecture family, as data."""

    name: str
    """Name for readers."""
    model_types: tuple[str, ...]
    """`model_type` of the configs it covers."""
    layers: str = "model.layers"
    """Path of the list of decoder layers in the causal LM."""
    attention: AttentionRecord = AttentionRecord()
    mlp: MlpRecord = MlpRecord()
    """In a mixture of experts, that of its dense layers."""
    mixers: tuple[MixerRecord, ...] = ()
    """Of a hybrid family: blocks that some layers have in place of attention or beside it. Its layers need
    not have all blocks."""
    by_token: tuple[str, ...] = ()
    """Arguments of a layer, beside the hidden states, that differ by the tokens of a batch."""
    experts: ExpertsRecord | None = None
    """None for a family without experts."""
    norm_first: str | None = None
    """Config flag that, when false, puts each norm after its block, so that the block's input is the residual
    stream itself. None for a family whose norms always come first."""
    norm_last: bool = False
    """Whether a norm or a factor follows the block's output before it is added to the residual stream."""
    layers_give_tuples: bool = False
    """Whether a layer's forward returns a tuple, with the hidden states in front."""
    logits_times: str | None = None
    """Config field with a factor of all logits."""
    logits_over: str | None = None
    """Config field with a divisor of all logits."""
    twin: Twin | None = None
    """Family to save a pruned model as where this family's own config cannot hold its number of heads."""
