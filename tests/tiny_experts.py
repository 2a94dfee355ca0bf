"""Tiny random mixtures of experts, one or more rows for each family, with what its config can switch on."""

from collections.abc import Callable
from typing import Any

import torch
from tiny import LATENT
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXTRAL = {"intermediate_size": 24, "num_local_experts": 6, "num_experts_per_tok": 2}
SHARED = {
    "intermediate_size": 40,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
}
"""Groups of experts, and shared ones beside them."""
_SHARED_BY_COUNT = {
    **{k: v for k, v in SHARED.items() if k not in ("n_routed_experts", "n_shared_experts")},
    "num_experts": 8,
    "num_shared_experts": 2,
}
_LATENT = {**LATENT, "num_key_value_heads": 4}

_QWEN = {
    "intermediate_size": 40,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 28,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "mlp_only_layers": [1],
}
_MAMBA = {
    "mamba_n_heads": 4,
    "mamba_n_groups": 2,
    "mamba_d_state": 8,
    "mamba_d_head": 16,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
}
_MAMBA_H = {
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "ssm_state_size": 8,
    "chunk_size": 8,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2_moe": _QWEN,
    "qwen3_moe": {
        "intermediate_size": 40,
        "moe_intermediate_size": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "attention_bias": True,
    },
    "mixtral": {**MIXTRAL, "sliding_window": 8},
    "olmoe": {
        "intermediate_size": 24,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "clip_qkv": 4.0,
        "num_key_value_heads": 4,
    },
    "phimoe": {**MIXTRAL, "attention_bias": True, "lm_head_bias": True, "router_jitter_noise": 0.1},
    "gpt_oss": {**MIXTRAL, "sliding_window": 8},
    "granitemoe": {
        **MIXTRAL,
        "residual_multiplier": 0.5,
        "embedding_multiplier": 2.0,
        "logits_scaling": 3.0,
        "attention_multiplier": 0.4,
        "attention_bias": True,
    },
    "glm4_moe": {**SHARED, "use_qk_norm": True, "attention_bias": True, "partial_rotary_factor": 0.5},
    "ernie4_5_moe": {
        "intermediate_size": 40,
        "moe_intermediate_size": 16,
        "moe_num_experts": 8,
        "moe_num_shared_experts": 2,
        "moe_k": 2,
        "moe_layer_start_index": 1,
        "num_hidden_layers": 3,
        "use_bias": True,
    },
    "granitemoeshared": {**MIXTRAL, "shared_intermediate_size": 40, "residual_multiplier": 0.5},
    "dots1": {**SHARED, "attention_bias": True, "sliding_window": 8},
    "solar_open": SHARED,
    "exaone_moe": {**_SHARED_BY_COUNT, "sliding_window": 8},
    "minimax_m2": MIXTRAL,
    "hy_v3": {
        **_SHARED_BY_COUNT,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
    },
    "mellum": {
        "intermediate_size": 40,
        "moe_intermediate_size": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 3,
        "mlp_layer_types": ["sparse", "dense", "sparse"],
    },
    "flex_olmo": {"intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2},
    "lfm2_moe": {
        "intermediate_size": 40,
        "moe_intermediate_size": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_dense_layers": 1,
        "num_hidden_layers": 3,
        "use_expert_bias": True,
        "layer_types": ["conv", "full_attention", "conv"],
    },
    "hunyuan_v1_moe": {"intermediate_size": 24, "num_experts": 6, "moe_topk": 2},
    "llama4_text": {
        "intermediate_size": 24,
        "intermediate_size_mlp": 40,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "interleave_moe_layer_step": 2,
        "num_hidden_layers": 4,
        "attention_chunk_size": 8,
        "use_qk_norm": True,
    },
    "gemma4_text": {
        "intermediate_size": 40,
        "moe_intermediate_size": 16,
        "enable_moe_block": True,
        "num_experts": 6,
        "top_k_experts": 2,
        "hidden_size_per_layer_input": 0,
        "global_head_dim": 8,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "deepseek_v2": {
        **SHARED,
        **_LATENT,
        "q_lora_rank": None,
        "topk_method": "group_limited_greedy",
        "mlp_bias": True,
    },
    "deepseek_v3": {**SHARED, **_LATENT, "q_lora_rank": 10, "attention_bias": True},
    "glm4_moe_lite": {**SHARED, **_LATENT, "q_lora_rank": 10, "attention_bias": True},
    "qwen3_next": {
        **_QWEN,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 0.5},
    },
    "granitemoehybrid": {
        **MIXTRAL,
        **_MAMBA,
        "num_hidden_layers": 3,
        "shared_intermediate_size": 40,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "logits_scaling": 4.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
    },
    "nemotron_h": {
        **_MAMBA_H,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "moe"],
        "num_hidden_layers": 5,
        "intermediate_size": 40,
        "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 28,
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "routed_scaling_factor": 1.5,
    },
    "nemotron_h latent": {
        **_MAMBA_H,
        "layers_block_type": ["moe", "full_attention", "linear_attention", "moe"],
        "num_hidden_layers": 4,
        "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 28,
        "moe_latent_size": 16,
        "n_routed_experts": 12,
        "num_experts_per_tok": 2,
        "mlp_bias": True,
    },
    "afmoe": {
        **_SHARED_BY_COUNT,
        "num_dense_layers": 1,
        "attention_bias": True,
        "sliding_window": 8,
        "global_attn_every_n_layers": 2,
        "route_scale": 1.5,
        "mup_enabled": True,
    },
    "cohere2_moe": {
        **MIXTRAL,
        "num_experts": 6,
        "num_shared_experts": 2,
        "num_hidden_layers": 3,
        "prefix_dense_intermediate_size": 40,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "expert_selection_fn": "sigmoid",
        "attention_bias": True,
        "sliding_window": 8,
    },
    "aria_text": {
        "intermediate_size": 24,
        "moe_num_experts": 6,
        "moe_topk": 2,
        "moe_num_shared_experts": 2,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "granitemoe_swa": {
        **MIXTRAL,
        "shared_intermediate_size": 40,
        "residual_multiplier": 0.5,
        "sliding_window": 8,
    },
    "jamba": {
        "intermediate_size": 24,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 4,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 8,
    },
}
"""Config fields of each row, by name: a `model_type`, and what is on."""
CONFIGS["qwen3_5_moe_text"] = {
    **CONFIGS["qwen3_next"],
    "layer_types": ["full_attention", "linear_attention", "full_attention"],
}


def build(name: str) -> Callable[[], PreTrainedModel]:
    """A function that makes the tiny model of a row, always the same."""

    def make() -> PreTrainedModel:
        torch.manual_seed(0)
        config = CONFIG_MAPPING[name.split()[0]](**{**SHAPE, **CONFIGS[name]})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
        with torch.no_grad():
            for path, p in model.named_parameters():
                # The usual initialisation is so small that an expert can go without changing a logit.
                std = (
                    1.0
                    if "embed" in path or path.endswith(("gate.weight", "router.weight", "wg.weight"))
                    else 0.2
                )
                if p.ndim > 1 or "bias" in path or path.endswith("sinks"):
                    p.normal_(std=std)
            for path, b in model.named_buffers():
                if path.endswith(("e_score_correction_bias", "expert_bias")):
                    b.normal_(std=0.3)
        return model.eval()

    return make
