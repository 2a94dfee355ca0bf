"""A model's config and widths as the keys of a GGUF file, and back.

Keys are written without the architecture's name in front. Widths come from the modules, so it does not matter
how a config describes layers that differ.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PretrainedConfig

from probeprune.model import gguf_rope
from probeprune.model.blocks import Block
from probeprune.model.families import FAMILIES
from probeprune.model.gguf_architectures import Architecture

Value = bool | int | float | str | list[int]


def window(config: Any) -> int | None:
    """How many tokens back layers with a sliding window see; None for a model without such layers."""
    types = getattr(config, "layer_types", None)
    if types is not None and "sliding_attention" not in types:
        return None
    return getattr(config, "sliding_window", None)


def activation(config: Any) -> str:
    """The name of a config's activation function."""
    return str(getattr(config, "hidden_activation", None) or config.hidden_act)


def unfit(architecture: Architecture, config: Any, blocks: Sequence[Block]) -> str | None:
    """Why an architecture cannot hold a config and these widths; None if it can."""
    attention = [b for b in blocks if b.kind == "attention"]
    mlps = [b for b in blocks if b.kind == "mlp"]
    widths = {(b.query_heads, b.kv_heads) for b in attention}
    if not architecture.per_layer and len(widths) + len({b.units for b in mlps}) > 2:
        return "all its layers have the same widths"
    head_dim = attention[0].head_dim
    if architecture.full_heads and any(b.query_heads * head_dim != config.hidden_size for b in attention):
        return f"its heads are together as wide as the hidden states, {config.hidden_size} numbers"
    tied = bool(config.tie_word_embeddings)
    if architecture.head != "tied or not" and tied != (architecture.head == "tied"):
        return f"its output matrix is {architecture.head} to the embeddings".replace(
            "untied to", "not tied to"
        )
    if activation(config) not in architecture.activations:
        return f"its activation function is {architecture.activations[0]}, not {activation(config)}"
    if reason := gguf_rope.unfit(
        config.rope_parameters, architecture.scalings, partial=architecture.partial_rotary
    ):
        return reason
    for field in architecture.numbers.values():
        if getattr(config, field) is None:
            return f"it needs a value of {field}"
    if architecture.window is not None:
        return _unfit_window(architecture, config, attention)
    return None


def _unfit_window(architecture: Architecture, config: Any, attention: Sequence[Block]) -> str | None:
    assert architecture.window is not None
    layers = len(attention)
    if list(config.layer_types) != architecture.window.types(layers):
        return "its layers with and without a sliding window take other turns"
    scale = _scale(architecture, config.hidden_size, layers, attention[0].query_heads, attention[0].head_dim)
    if config.query_pre_attn_scalar != scale:
        return f"it divides attention by the root of {scale}, not of {config.query_pre_attn_scalar}"
    if "final_logit_softcapping" not in architecture.numbers.values() and config.final_logit_softcapping:
        return "it has no soft cap of logits"
    if getattr(config, "use_bidirectional_attention", None):
        return "it is causal"
    return None


def _scale(architecture: Architecture, hidden: int, layers: int, heads: int, head_dim: int) -> int:
    """The `query_pre_attn_scalar` that the engine computes with."""
    return hidden // heads if layers == architecture.scaled_layers else head_dim


def rotated(config: Any, head_dim: int) -> int:
    """How many numbers of each head RoPE turns."""
    full, _ = gguf_rope.parts(config.rope_parameters)
    return int(full.get("partial_rotary_factor", 1.0) * head_dim)


def keys(architecture: Architecture, config: Any, blocks: Sequence[Block]) -> dict[str, Value]:
    """The keys of a model that `unfit` has nothing against."""
    attention = [b for b in blocks if b.kind == "attention"]
    head_dim = attention[0].head_dim
    context, back = config.max_position_embeddings, window(config)
    found: dict[str, Value] = {
        "block_count": len(attention),
        # Up to its window, a model with one computes the same as a model without.
        "context_length": context if back is None or architecture.window else min(context, back),
        "embedding_length": config.hidden_size,
        "feed_forward_length": _widths(architecture, [b.units for b in blocks if b.kind == "mlp"]),
        "attention.head_count": _widths(architecture, [b.query_heads for b in attention]),
        "attention.head_count_kv": _widths(architecture, [b.kv_heads for b in attention]),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": rotated(config, head_dim),
        "vocab_size": config.vocab_size,
        **gguf_rope.keys(config.rope_parameters, context),
    }
    for key, field in architecture.numbers.items():
        value = getattr(config, field)
        found[key] = value if isinstance(value, bool) else float(value)
    if architecture.window is not None and back is not None:
        found["attention.sliding_window"] = back
    return found


def _widths(architecture: Architecture, widths: list[int]) -> Value:
    return widths if architecture.per_layer else widths[0]


def widths(fields: Mapping[str, Any], key: str) -> list[int]:
    """The value of a key in each layer. Raises `ValueError` for a list of another length."""
    value, layers = fields[key], int(fields["block_count"])
    found = [int(v) for v in value] if isinstance(value, list) else [int(value)] * layers
    if len(found) != layers:
        raise ValueError(f"it says {key} for {len(found)} of {layers} layers")
    return found


def groups_of(fields: Mapping[str, Any]) -> list[int]:
    """Key-value heads of each layer; files without grouped queries do not say."""
    given = "attention.head_count_kv" in fields
    return widths(fields, "attention.head_count_kv" if given else "attention.head_count")


def head_size(fields: Mapping[str, Any]) -> int:
    """The size of a head."""
    given = fields.get("attention.key_length")
    return int(given or fields["embedding_length"] // max(widths(fields, "attention.head_count")))


def make_config(
    architecture: Architecture,
    fields: Mapping[str, Any],
    factors: Mapping[str, torch.Tensor],
    vocabulary: int,
    tied: bool,
) -> PretrainedConfig:
    """A config of the family of a file, for a plain model about as wide as the file's widest layer.

    Args:
        architecture: the file's.
        fields: its keys, without the architecture's name.
        factors: its tensors of RoPE factors.
        vocabulary: rows of its embeddings.
        tied: whether it has no output matrix of its own.

    Raises `KeyError` or `ValueError` for keys that are missing or contradict each other.
    """
    model_type = architecture.model_types[0]
    made: Any = CONFIG_MAPPING[model_type]
    family = next(f for f in FAMILIES if model_type in f.model_types)
    hidden, layers, head_dim = fields["embedding_length"], fields["block_count"], head_size(fields)
    heads = widths(fields, "attention.head_count")
    groups = groups_of(fields)
    if min(heads) < 1 or min(groups) < 1:
        raise ValueError("it has layers without attention")
    if any(q % g for q, g in zip(heads, groups, strict=True)):
        raise ValueError("it has heads that its key-value heads do not divide")
    query_heads, kv_heads = _nominal(hidden, max(heads), max(groups))
    dims = int(fields.get("rope.dimension_count", head_dim))
    rope = gguf_rope.parameters(fields, factors, dims, head_dim)
    values: dict[str, Any] = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": query_heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        str(family.mlp.width_field): max(widths(fields, "feed_forward_length")),
        "vocab_size": vocabulary,
        "max_position_embeddings": fields["context_length"],
        "rope_parameters": rope,
        "original_max_position_embeddings": rope.get(
            "original_max_position_embeddings", fields["context_length"]
        ),
        "tie_word_embeddings": tied,
        "hidden_act": architecture.activations[0],
        "hidden_activation": architecture.activations[0],
        # The defaults are those of one model; the file's own come with its tokenizer.
        **{f"{role}_token_id": None for role in ("bos", "eos", "pad")},
        **{field: fields[key] for key, field in architecture.numbers.items() if key in fields},
    }
    if architecture.window is not None:
        scale = _scale(architecture, hidden, layers, heads[0], head_dim)
        values |= {
            "sliding_window": fields["attention.sliding_window"],
            "layer_types": architecture.window.types(layers),
            "query_pre_attn_scalar": scale,
        }
        if model_type == "gemma3_text":
            local = {"rope_type": "default", "rope_theta": fields.get("rope.freq_base_swa", 10000.0)}
            values["rope_parameters"] = {"full_attention": rope, "sliding_attention": local}
    known = set(made().to_dict())
    config: PretrainedConfig = made(**{k: v for k, v in values.items() if k in known})
    return config


def _nominal(hidden: int, heads: int, groups: int) -> tuple[int, int]:
    """Numbers of heads that every config accepts, as near above those given as can be."""
    for count in range(heads, hidden + 1):
        if hidden % count == 0 and count % groups == 0:
            return count, groups
    return hidden, 1
