"""Tiny random models of the families that the test of all methods leaves out, one row each.

Every feature of a family that a released model has is on in some row: biases, norms, windows, layers without
RoPE, ties. All parameters are random, those of norms too.
"""

from collections.abc import Callable
from typing import Any

import torch
from tiny import LATENT, LLAMA3, SHAPE, noisy
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

LAYERS = 3
WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_SHAPE = {**SHAPE, "num_hidden_layers": LAYERS, "intermediate_size": 60, "pad_token_id": None}
_SHAPE |= {"bos_token_id": 1, "eos_token_id": 2}
_SIZED_BY_COUNT = {k: v for k, v in _SHAPE.items() if k != "head_dim"}
_ONE_EACH = {"num_key_value_heads": 6}
_PLAIN = {"rope_theta": 10000.0, "rope_type": "default"}
_PARTLY = {**_PLAIN, "partial_rotary_factor": 0.5}
_DYNAMIC = {"rope_theta": 10000.0, "rope_type": "dynamic", "factor": 2.0, "alpha": 8.0}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
GEMMA4 = {
    **WINDOWS,
    "attention_k_eq_v": True,
    "intermediate_size": 160,
    "global_head_dim": 16,
    "num_global_key_value_heads": 2,
    "hidden_size_per_layer_input": 0,
    "final_logit_softcapping": 30.0,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
}
"""Gemma 4 with two sizes of heads, and no map for values in layers of global attention."""
GEMMA4_E = {
    **GEMMA4,
    "attention_k_eq_v": False,
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
    "intermediate_size": 80,
    "hidden_size_per_layer_input": 12,
    "vocab_size_per_layer_input": 128,
    "pad_token_id": 0,
}
"""Gemma 4 E4B: an input for each layer, and two layers that read keys and values of two others."""

ROWS: dict[str, dict[str, Any]] = {
    "gemma": {},
    "smollm3": {"no_rope_layers": [1, 0, 1], "use_sliding_window": True, **WINDOWS},
    "smollm3 biases": {"no_rope_layers": [0, 1, 1], "attention_bias": True, "mlp_bias": True},
    "olmo": {"clip_qkv": 0.9, "tie_word_embeddings": True},
    "olmo2": {"attention_bias": True},
    "olmo3": {**WINDOWS, "rope_parameters": {"sliding_attention": _PLAIN, "full_attention": _YARN}},
    "granite": {
        "attention_bias": True,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.5,
        "embedding_multiplier": 2.0,
        "logits_scaling": 4.0,
    },
    "cohere": {"attention_bias": True},
    "cohere norms": {"use_qk_norm": True},
    "cohere2": {"attention_bias": True, **WINDOWS},
    "starcoder2": {"sliding_window": 8},
    "starcoder2 plain": {"use_bias": False, "tie_word_embeddings": False},
    "phi": {"rope_parameters": _PARTLY, "hidden_act": "gelu_new", **_ONE_EACH},
    "phi norms": {"rope_parameters": _PARTLY, "qk_layernorm": True, **_SIZED_BY_COUNT},
    "glm": {"rope_parameters": _PARTLY},
    "glm4": {"rope_parameters": _PARTLY, "attention_bias": True},
    "nemotron": {"rope_parameters": _PARTLY},
    "nemotron biases": {"rope_parameters": _PARTLY, "attention_bias": True, "mlp_bias": True},
    "stablelm": {"rope_parameters": _PARTLY, "use_qkv_bias": True},
    "stablelm parallel": {"rope_parameters": _PARTLY, "use_parallel_residual": True},
    "stablelm norms": {"rope_parameters": _PARTLY, "use_parallel_residual": True, "qk_layernorm": True},
    "exaone4": WINDOWS,
    "arcee": {"attention_bias": True, "mlp_bias": True},
    "apertus": {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 16}},
    "seed_oss": {"attention_bias": True, "attention_out_bias": True, "mlp_bias": True},
    "cwm": WINDOWS,
    "vaultgemma": {**WINDOWS, "attention_bias": True, "attn_logit_softcapping": 20.0},
    "hyperclovax": {
        "attention_bias": True,
        "mlp_bias": True,
        "use_post_norm": True,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.5,
        "embedding_multiplier": 2.0,
        "logits_scaling": 0.25,
    },
    "ernie4_5": {"use_bias": True},
    "nanochat": {"attention_bias": True, "final_logit_softcapping": 5.0},
    "granite_swa": {**WINDOWS, "attention_bias": True, "mlp_bias": True, "residual_multiplier": 0.5},
    "hunyuan_v1_dense": {"attention_bias": True, "rope_parameters": _DYNAMIC},
    "helium": {},
    "ministral": WINDOWS,
    "ministral3": {"rope_parameters": {**_YARN, "llama_4_scaling_beta": 0.1}, "sliding_window": 8},
    "gemma4_text": GEMMA4,
    "gemma4_text bias": {**GEMMA4, "attention_k_eq_v": False, "attention_bias": True},
    "minicpm3": {**_ONE_EACH, **LATENT, "q_lora_rank": 20, "attention_bias": True, "dim_model_base": 16},
    "minicpm3 plain": {
        **_ONE_EACH,
        **LATENT,
        "q_lora_rank": None,
        "mlp_bias": True,
        "rope_parameters": _YARN,
    },
    "youtu": {**_ONE_EACH, **LATENT, "q_lora_rank": 20, "attention_bias": True, "rope_parameters": _YARN},
    "youtu plain": {**_ONE_EACH, **LATENT, "q_lora_rank": None, "rope_interleave": False},
    "persimmon": {"rope_parameters": _PARTLY, "qk_layernorm": True},
    "persimmon plain": {"rope_parameters": _PARTLY, "qk_layernorm": False},
}
"""Fields of the config beside those of the common shape, by name: a `model_type`, and what is on."""

_MAMBA = {
    "mamba_n_heads": 6,
    "mamba_n_groups": 2,
    "mamba_d_state": 8,
    "mamba_d_head": 16,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
}
_DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}

HYBRIDS: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {**_DELTA, "rope_parameters": _PARTLY},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "block_multiple_of": 4},
    "lfm2 plain": {
        "layer_types": ["full_attention", "conv", "full_attention"],
        "block_auto_adjust_ff_dim": False,
        "conv_bias": True,
    },
    "falcon_h1": {
        **_MAMBA,
        "mamba_d_ssm": 96,
        "attention_in_multiplier": 0.7,
        "attention_out_multiplier": 1.3,
        "mlp_multipliers": [0.8, 1.2],
        "key_multiplier": 0.5,
        "ssm_out_multiplier": 0.9,
        "lm_head_multiplier": 0.4,
        "embedding_multiplier": 1.5,
    },
    "bamba": {**_MAMBA, "attn_layer_indices": [1], "attention_bias": True, "mlp_bias": True},
    "granitemoehybrid": {
        **_MAMBA,
        "num_local_experts": 0,
        "shared_intermediate_size": 60,
        "layer_types": ["linear_attention", "full_attention", "full_attention"],
        "logits_scaling": 4.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
    },
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp", "linear_attention"],
        "num_hidden_layers": 5,
        "mamba_num_heads": 6,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "ssm_state_size": 8,
        "chunk_size": 8,
        "mlp_bias": True,
    },
    "gemma4_text e4b": GEMMA4_E,
    "gemma4_text e2b": {**GEMMA4_E, "num_key_value_heads": 1, "num_kv_shared_layers": 3},
    "jamba": {"num_experts": 1, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8},
}
"""The same for hybrids."""


def config_of(name: str, **changes: Any) -> Any:
    """The config of a row, with some fields changed."""
    model_type = name.split()[0]
    sized_by_count = model_type in ("stablelm", "persimmon") or name == "phi norms"
    return CONFIG_MAPPING[model_type](
        **{**(_SIZED_BY_COUNT if sized_by_count else _SHAPE), **{**ROWS, **HYBRIDS}[name], **changes}
    )


def build(name: str) -> Callable[[], PreTrainedModel]:
    """Makes the model of a row, in eval mode, the same each time."""
    return noisy(lambda: AutoModelForCausalLM.from_config(config_of(name), dtype=torch.float32))
