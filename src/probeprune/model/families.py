"""The architecture families that can be pruned, one record each.

A `Family` is a description: attribute paths and names of config fields, no modules. To support another
architecture, add a record to `FAMILIES`. `blocks.py` resolves a record to the modules of one model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import nn

from probeprune.errors import UsageError


@dataclass(frozen=True)
class AttentionRecord:
    """Where a decoder layer has its attention block. The paths of `module` and `norm` are relative to the
    layer, those of the linear maps to the module."""

    module: str = "self_attn"
    norm: str | tuple[str, ...] = "input_layernorm"
    """Of several paths, the first that a layer has."""
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    """Query, key and value may all name the same linear map, see `fused`."""
    output: str = "o_proj"
    fused: Literal["stacked", "by group"] | None = None
    """Order of the rows of a map that makes queries, keys and values together: all queries, then all keys,
    then all values (`stacked`), or key-value head by key-value head its queries, its key and its value
    (`by group`)."""
    head_dim: str = "head_dim"
    """The module's attribute that holds its head size."""
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


@dataclass(frozen=True)
class MlpRecord:
    """Where a decoder layer has its MLP block; all paths are relative to the layer."""

    module: str | None = "mlp"
    """None if the layer's own forward computes the MLP."""
    norm: str | tuple[str, ...] = "post_attention_layernorm"
    producers: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    """A map named twice makes both: the rows of the first, then those of the second."""
    consumer: str = "mlp.down_proj"
    activation: str | None = None
    """Path of the activation function; needed only if `module` is None."""
    width_field: str | None = "intermediate_size"
    """Config field with the width of all MLPs; None where the modelling code has it fixed."""
    bias_field: str = "mlp_bias"
    """Config field that gives the block's linear maps biases; configs without the field have none to give."""


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
    attention: AttentionRecord | str = AttentionRecord()
    """A text says why heads have to stay; it stands behind a colon."""
    alibi: str | None = None
    """Config flag under which heads have to stay, because of ALiBi."""
    mlp: MlpRecord = MlpRecord()
    norm_first: str | None = None
    """Config flag that, when false, puts each norm after its block, so that the block's input is the residual
    stream itself. None for a family whose norms always come first."""
    norm_last: bool = False
    """Whether a norm follows the block's output before it is added to the residual stream."""
    layers_give_tuples: bool = False
    """Whether a layer's forward returns a tuple, with the hidden states in front."""
    twin: Twin | None = None
    """Family to save a pruned model as where this family's own config cannot hold its number of heads."""


_SANDWICH_MLP = replace(MlpRecord(), norm="pre_feedforward_layernorm")

_ALIBI = (
    "ALiBi gives every head a slope by its place among all heads, and the model's code works the slopes out "
    "for all layers at once, so the heads left would get others"
)

# Of the OPT kind: the layer itself computes the MLP.
_OPT_ATTENTION = AttentionRecord(norm="self_attn_layer_norm", output="out_proj", query_count="num_heads")
_OPT_MLP = MlpRecord(
    module=None,
    norm="final_layer_norm",
    producers=("fc1",),
    consumer="fc2",
    activation="activation_fn",
    width_field="ffn_dim",
)
# Of the GPT-NeoX kind: one map makes queries, keys and values.
_NEOX_ATTENTION = AttentionRecord(
    module="attention",
    query="query_key_value",
    key="query_key_value",
    value="query_key_value",
    output="dense",
    fused="by group",
    head_dim="head_size",
)
_NEOX_MLP = MlpRecord(producers=("mlp.dense_h_to_4h",), consumer="mlp.dense_4h_to_h")
# Of the GPT-2 kind, and of the GPT-J kind, where both blocks read one norm.
_GPT2_ATTENTION = AttentionRecord(
    module="attn",
    norm="ln_1",
    query="c_attn",
    key="c_attn",
    value="c_attn",
    output="c_proj",
    fused="stacked",
    query_width="split_size",
)
_GPT2_MLP = MlpRecord(norm="ln_2", producers=("mlp.c_fc",), consumer="mlp.c_proj", width_field="n_inner")
_GPTJ_MLP = MlpRecord(norm="ln_1", producers=("mlp.fc_in",), consumer="mlp.fc_out", width_field="n_inner")


FAMILIES: tuple[Family, ...] = (
    Family("LLaMA 1, 2, 3, SmolLM2", ("llama",), twin=Twin("mistral", {"sliding_window": None})),
    Family("Mistral", ("mistral",)),
    Family("Qwen2, Qwen2.5", ("qwen2",)),
    Family("Qwen3", ("qwen3",)),
    Family("Gemma 2", ("gemma2",), mlp=_SANDWICH_MLP, norm_last=True),
    Family("Gemma 3 (text)", ("gemma3_text",), mlp=_SANDWICH_MLP, norm_last=True),
    Family(
        "OPT",
        ("opt",),
        layers="model.decoder.layers",
        attention=_OPT_ATTENTION,
        mlp=_OPT_MLP,
        norm_first="do_layer_norm_before",
    ),
    Family(
        "Phi-3, Phi-3.5, Phi-4",
        ("phi3",),
        attention=AttentionRecord(
            query="qkv_proj",
            key="qkv_proj",
            value="qkv_proj",
            fused="stacked",
            query_count="config.num_attention_heads",
            kv_count="num_key_value_heads",
        ),
        mlp=MlpRecord(producers=("mlp.gate_up_proj", "mlp.gate_up_proj")),
    ),
    Family(
        "GPT-NeoX, Pythia",
        ("gpt_neox",),
        layers="gpt_neox.layers",
        attention=_NEOX_ATTENTION,
        mlp=_NEOX_MLP,
    ),
    Family("GPT-2", ("gpt2",), layers="transformer.h", attention=_GPT2_ATTENTION, mlp=_GPT2_MLP),
    Family(
        "GPT-BigCode (StarCoder 1)",
        ("gpt_bigcode",),
        layers="transformer.h",
        # With `multi_query`, one group of all heads; without, one of each head.
        attention=replace(
            _GPT2_ATTENTION,
            fused="by group",
            query_count="num_heads",
            query_width="embed_dim",
            multi_query="multi_query",
        ),
        mlp=_GPT2_MLP,
    ),
    Family(
        "GPT-Neo",
        ("gpt_neo",),
        layers="transformer.h",
        attention=AttentionRecord(
            module="attn.attention", norm="ln_1", output="out_proj", query_count="num_heads"
        ),
        mlp=replace(_GPT2_MLP, width_field="intermediate_size"),
        layers_give_tuples=True,
    ),
    Family(
        "GPT-J",
        ("gptj",),
        layers="transformer.h",
        attention=AttentionRecord(
            module="attn", norm="ln_1", output="out_proj", query_count="num_attention_heads"
        ),
        mlp=_GPTJ_MLP,
        layers_give_tuples=True,
    ),
    Family(
        "CodeGen",
        ("codegen",),
        layers="transformer.h",
        attention="the model's code deals them out to four parts of equal size",
        mlp=_GPTJ_MLP,
        layers_give_tuples=True,
    ),
    Family(
        "BLOOM",
        ("bloom",),
        layers="transformer.h",
        attention=_ALIBI,
        # The module's forward takes the residual stream too.
        mlp=replace(_NEOX_MLP, module=None, activation="mlp.gelu_impl", width_field=None),
        layers_give_tuples=True,
    ),
    Family(
        "Falcon",
        ("falcon",),
        layers="transformer.h",
        attention=replace(
            _NEOX_ATTENTION,
            module="self_attention",
            norm=("ln_attn", "input_layernorm"),
            head_dim="head_dim",
            query_count="num_heads",
            kv_count="num_kv_heads",
            multi_query="multi_query",
            repeats_kv="new_decoder_architecture",
        ),
        alibi="alibi",
        mlp=replace(
            _NEOX_MLP,
            norm=("ln_mlp", "post_attention_layernorm", "input_layernorm"),
            width_field="ffn_hidden_size",
        ),
        layers_give_tuples=True,
    ),
    Family(
        "MPT",
        ("mpt",),
        layers="transformer.blocks",
        attention=_ALIBI,
        mlp=MlpRecord(
            module=None,  # as in BLOOM
            norm="norm_2",
            producers=("ffn.up_proj",),
            consumer="ffn.down_proj",
            activation="ffn.act",
            width_field=None,
        ),
        layers_give_tuples=True,
    ),
    Family(
        "XGLM",
        ("xglm",),
        attention=replace(_OPT_ATTENTION, query_width="embed_dim"),
        mlp=_OPT_MLP,
    ),
    Family(
        "BioGPT",
        ("biogpt",),
        layers="biogpt.layers",
        attention=replace(_OPT_ATTENTION, query_count=None),
        mlp=replace(_OPT_MLP, width_field="intermediate_size"),
    ),
)


PRUNED_PREFIX = "pruned_"
"""Prefix of the `model_type` of checkpoints whose layers differ in width (see `modeling_pruned.py`)."""


def supported_models() -> str:
    """One line that lists the supported families with their `model_type`s."""
    return "; ".join(f"{f.name} ({', '.join(f.model_types)})" for f in FAMILIES)


def is_supported(model_type: object) -> bool:
    """Whether configs of this `model_type` belong to a supported family."""
    return any(model_type in family.model_types for family in FAMILIES)


def find_family(model: nn.Module) -> Family:
    """The record of a model's architecture family, by its config's `model_type`.

    Raises `UsageError` for a model of an unsupported family.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    for family in FAMILIES:
        if str(model_type).removeprefix(PRUNED_PREFIX) in family.model_types:
            _check_layers(model, family)
            return family
    if _experts(model):
        raise UsageError(
            f"{type(model).__name__} is a mixture-of-experts model, whose experts cannot be pruned; choose a "
            f"dense model of one of these families: {supported_models()}."
        )
    raise UsageError(
        f"model type {model_type!r} ({type(model).__name__}) is not supported; supported are: "
        f"{supported_models()}. To add it, write one Family record in probeprune/model/families.py "
        "(see CONTRIBUTING.md, 'Add a model family')."
    )


def attention_of(model: Any) -> AttentionRecord | str:
    """The record of a model's attention, or the reason why its heads have to stay."""
    family = find_family(model)
    if family.alibi is not None and getattr(model.config, family.alibi):
        return _ALIBI
    return family.attention


def _check_layers(model: nn.Module, family: Family) -> None:
    """Raise `UsageError` for a model without the list of layers where its family has it."""
    try:
        model.get_submodule(family.layers)
    except AttributeError:
        raise UsageError(
            f"{type(model).__name__} has no {family.layers}; give the whole model with its head, as "
            "AutoModelForCausalLM opens it."
        ) from None


def _experts(model: nn.Module) -> bool:
    config = getattr(model, "config", None)
    return any(
        getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")
    )
