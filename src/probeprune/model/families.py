"""The architecture families that can be pruned, one record each.

A `Family` is a description: attribute paths, no modules. To support another architecture, add a record to
`FAMILIES`. `blocks.py` resolves a record to the modules of one model.
"""

from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from probeprune.errors import UsageError


@dataclass(frozen=True)
class AttentionRecord:
    """Where a decoder layer keeps its attention block; paths are relative to the layer."""

    module: str = "self_attn"
    norm: str = "input_layernorm"
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    """Query, key and value may name one linear map: see `fused`."""
    output: str = "o_proj"
    fused: Literal["stacked", "by head"] | None = None
    """Rows of a map that makes queries, keys and values together: all queries, then all keys, then all
    values (`stacked`), or the three of one head after the other (`by head`)."""
    head_dim: str = "head_dim"
    """The module's attribute with its head size."""
    query_count: str | None = None
    """Where the module's forward reads its number of query heads, if it does: an attribute, or one of its
    config (`config.num_attention_heads`)."""
    kv_count: str | None = None
    """Likewise for key-value heads."""


@dataclass(frozen=True)
class MlpRecord:
    """Where a decoder layer keeps its MLP block; paths are relative to the layer."""

    module: str | None = "mlp"
    """None where the layer's own forward computes the MLP."""
    norm: str = "post_attention_layernorm"
    producers: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    """One map named twice makes both, the first one's rows stacked on the second's."""
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
    norm_last: bool = False
    """Whether a norm stands between a block's output and the residual stream it is added to."""


_SANDWICH_MLP = replace(MlpRecord(), norm="pre_feedforward_layernorm")


FAMILIES: tuple[Family, ...] = (
    Family("LLaMA 1, 2, 3, SmolLM2", ("llama",)),
    Family("Mistral", ("mistral",)),
    Family("Qwen2, Qwen2.5", ("qwen2",)),
    Family("Qwen3", ("qwen3",)),
    Family("Gemma 2", ("gemma2",), mlp=_SANDWICH_MLP, norm_last=True),
    Family("Gemma 3 (text)", ("gemma3_text",), mlp=_SANDWICH_MLP, norm_last=True),
    Family(
        "OPT",
        ("opt",),
        layers="model.decoder.layers",
        attention=AttentionRecord(norm="self_attn_layer_norm", output="out_proj", query_count="num_heads"),
        mlp=MlpRecord(
            module=None,
            norm="final_layer_norm",
            producers=("fc1",),
            consumer="fc2",
            activation="activation_fn",
        ),
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
        attention=AttentionRecord(
            module="attention",
            query="query_key_value",
            key="query_key_value",
            value="query_key_value",
            output="dense",
            fused="by head",
            head_dim="head_size",
        ),
        mlp=MlpRecord(producers=("mlp.dense_h_to_4h",), consumer="mlp.dense_4h_to_h"),
    ),
)


PRUNED_PREFIX = "pruned_"
"""In front of a family's `model_type` where layers have widths of their own (`modeling_pruned.py`)."""


def supported_models() -> str:
    """One line that lists the supported families with their `model_type`s."""
    return "; ".join(f"{f.name} ({', '.join(f.model_types)})" for f in FAMILIES)


def find_family(model: nn.Module) -> Family:
    """The record of `model`'s architecture family, by its config's `model_type`.

    Raises `UsageError` for a model of no known family.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    for family in FAMILIES:
        if str(model_type).removeprefix(PRUNED_PREFIX) in family.model_types:
            return family
    if _experts(model):
        raise UsageError(
            f"{type(model).__name__} is a mixture-of-experts model; its experts cannot be pruned: choose a "
            f"dense model of one of these families: {supported_models()}."
        )
    raise UsageError(
        f"model type {model_type!r} ({type(model).__name__}) is not supported; supported are: "
        f"{supported_models()}. To add it, write one Family record in probeprune/blocks.py "
        "(see CONTRIBUTING.md, 'Add a model family')."
    )


def _experts(model: nn.Module) -> bool:
    config = getattr(model, "config", None)
    return any(
        getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")
    )
