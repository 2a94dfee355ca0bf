"""The layout `nemotron-nas`: LLaMA with a width for each MLP, as engines serve it without code of ours.

vLLM's `DeciLMForCausalLM` reads the width of every MLP from `block_configs`. All layers have the same number
of attention heads, and a kind of block has biases on all its linear maps or on none.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import CONFIG_MAPPING

from probeprune.errors import UsageError
from probeprune.model.blocks import Block, find_blocks
from probeprune.model.config_checks import COUNT
from probeprune.model.configuration_nemotron_nas import DeciLMConfig
from probeprune.model.modeling_pruned import pruned_config
from probeprune.model.pruned_configs import Unfit, make_config, own_fields, plain_config

MODEL_TYPE = DeciLMConfig.model_type

COMPUTE_LIKE_LLAMA = ("llama", "mistral", "qwen2")
"""Families whose layers are LLaMA's, biases aside, where no layer has a sliding window."""


def llama_config(model: Any) -> Any:
    """A per-layer config of LLaMA that describes a model with the same heads in all layers.

    Raises:
        Unfit: another kind of model, or layers with different numbers of heads.
    """
    base = plain_config(model.config)
    name = type(base).__name__
    if base.model_type not in COMPUTE_LIKE_LLAMA:
        raise Unfit(f"{name} does not compute what LLaMA does")
    if "sliding_attention" in (getattr(base, "layer_types", None) or ()) or _window(base):
        raise Unfit(f"{name} has a sliding window")
    blocks = find_blocks(model)
    heads = {(b.query_heads, b.kv_heads, b.head_dim) for b in blocks if b.kind == "attention"}
    if len(heads) > 1:
        raise Unfit("its layers have different numbers of heads")
    query_heads, kv_heads, head_dim = heads.pop()
    widths = {b.layer: {"intermediate_size": b.units} for b in blocks if b.kind == "mlp"}
    sizes = {"num_attention_heads": query_heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}
    biases = {"attention_bias": _has_bias(blocks, "attention"), "mlp_bias": _has_bias(blocks, "mlp")}
    return _first_that_fits(base.to_dict(), {**sizes, "per_layer_config": widths}, biases)


def _first_that_fits(fields: Mapping[str, Any], sizes: Mapping[str, Any], biases: Mapping[str, bool]) -> Any:
    """A per-layer config of LLaMA or Mistral. Raises `Unfit` if neither can have these sizes and biases.

    LLaMA's own config allows only heads that divide the hidden size; Mistral's has no biases.
    """
    choices: list[tuple[str, Mapping[str, Any]]] = [("llama", biases)]
    if not any(biases.values()):
        choices.append(("mistral", {"sliding_window": None}))
    failed = []
    for model_type, more in choices:
        config_class = CONFIG_MAPPING[model_type]
        described = {**own_fields(config_class, fields), **sizes, **more}
        try:
            return make_config(pruned_config(config_class, "PerLayer"), described)
        except Unfit as error:
            failed.append(str(error))
    raise Unfit("; ".join(failed))


def _window(config: Any) -> bool:
    return getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)


def _has_bias(blocks: Sequence[Block], kind: str) -> bool:
    return any(
        linear.bias is not None for b in blocks if b.kind == kind for linear in (*b.producers, b.consumer)
    )


def nemotron_config(config: Any) -> DeciLMConfig:
    """What `llama_config` gave, as the config that engines read."""
    fields = config.to_dict()
    for name in ("model_type", "per_layer_config", "auto_map", "intermediate_size"):
        fields.pop(name, None)
    group = config.num_attention_heads // config.num_key_value_heads
    blocks = [
        {
            "attention": {"n_heads_in_group": group, "no_op": False, "replace_with_linear": False},
            "ffn": {
                "intermediate_size": layer.intermediate_size,
                "no_op": False,
                "replace_with_linear": False,
            },
        }
        for layer in config.per_layer_config
    ]
    return DeciLMConfig(**{**fields, "architectures": ["DeciLMForCausalLM"], "block_configs": blocks})


def from_nemotron(file: Any, fields: Mapping[str, Any]) -> Any:
    """The per-layer config of LLaMA for the content of a config.json of this layout.

    Raises:
        UsageError: blocks that are missing, skipped or replaced, or sizes that are no counts.
    """
    blocks = fields.get("block_configs")
    count = fields.get("num_hidden_layers")
    if not isinstance(blocks, list) or not blocks or len(blocks) != count:
        raise UsageError(f"'{file}' has no block_configs of its {count} layers; get the checkpoint again.")
    widths, groups = {}, set()
    for index, block in enumerate(blocks):
        parts = [block.get(p) if isinstance(block, dict) else None for p in ("attention", "ffn")]
        attention, ffn = (part if isinstance(part, dict) else {} for part in parts)
        size, group = ffn.get("intermediate_size"), attention.get("n_heads_in_group")
        skipped = any(part.get(n) for part in (attention, ffn) for n in ("no_op", "replace_with_linear"))
        if skipped or not COUNT.holds(size) or not COUNT.holds(group):
            raise UsageError(
                f"'{file}' gives layer {index} no intermediate_size and n_heads_in_group, or replaces a "
                "block; only models with attention and an MLP in every layer can be opened."
            )
        widths[index] = {"intermediate_size": size}
        groups.add(group)
    if len(groups) > 1:
        raise UsageError(f"'{file}' gives its layers groups of different sizes, which cannot be opened.")
    heads: Any = fields.get("num_attention_heads")
    sizes: dict[str, Any] = {"per_layer_config": widths}
    if COUNT.holds(heads):
        sizes["num_key_value_heads"] = max(heads // groups.pop(), 1)
    biases = {name: bool(fields.get(name)) for name in ("attention_bias", "mlp_bias")}
    try:
        return _first_that_fits(fields, sizes, biases)
    except Unfit as error:
        raise UsageError(f"'{file}' describes no model ({error}); get the checkpoint again.") from error
