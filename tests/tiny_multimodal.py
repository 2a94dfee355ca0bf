"""Tiny random models that read images beside text, one row each, and a batch with an image in each text."""

from collections.abc import Callable
from typing import Any

import torch
from tiny import SHAPE, noisy, token_ids
from tiny_families import GEMMA4, GEMMA4_E, HYBRIDS
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, PreTrainedModel

IMAGE = 120
"""The id of an image token; `token_ids` has none."""
_TEXT = {**SHAPE, "num_hidden_layers": 3, "intermediate_size": 60, "pad_token_id": 0}
_TEXT |= {"bos_token_id": 1, "eos_token_id": 2}
_SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
_SQUARE = {**_SIZES, "image_size": 24, "patch_size": 6}
_QWEN = {"depth": 2, "num_heads": 2, "patch_size": 4, "hidden_act": "gelu"}
_QWEN_TEXT = {
    **_TEXT,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
}
_EXPERTS = {"moe_intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 2}
_LLAVA = {"vision_config": {"model_type": "clip_vision_model", **_SQUARE, "image_size": 12}}

_GEMMA4_VISION = {
    "model_type": "gemma4_vision",
    **_SIZES,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "patch_size": 4,
    "pooling_kernel_size": 2,
    "position_embedding_size": 16,
}

ROWS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {
            **_TEXT,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", *["full_attention"] * 2],
        },
        "vision_config": {"model_type": "siglip_vision_model", **_SQUARE},
        "mm_tokens_per_image": 4,
        "boi_token_index": 121,
        "eoi_token_index": 122,
    },
    "gemma4": {
        "text_config": {**_TEXT, **GEMMA4, "use_bidirectional_attention": "vision"},
        "vision_config": _GEMMA4_VISION,
        "audio_token_id": 124,
        "video_token_id": 123,
    },
    "gemma4 e4b": {
        "text_config": {**_TEXT, **GEMMA4_E},
        "vision_config": _GEMMA4_VISION,
        "audio_token_id": 124,
        "video_token_id": 123,
    },
    "mistral3": {
        "text_config": {**_TEXT, "model_type": "mistral", "sliding_window": None},
        "vision_config": {"model_type": "pixtral", **_SQUARE},
    },
    "qwen2_vl": {
        "text_config": _QWEN_TEXT,
        "vision_config": {**_QWEN, "embed_dim": 16, "hidden_size": 48, "mlp_ratio": 2},
    },
    "qwen2_5_vl": {
        "text_config": _QWEN_TEXT,
        "vision_config": {
            **_QWEN,
            "hidden_size": 16,
            "intermediate_size": 24,
            "out_hidden_size": 48,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
    },
    "qwen3_vl": {
        "text_config": _QWEN_TEXT,
        "vision_config": {
            **_QWEN,
            "hidden_size": 16,
            "intermediate_size": 24,
            "out_hidden_size": 48,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
    },
    "qwen3_5": {
        "text_config": {
            **_QWEN_TEXT,
            **HYBRIDS["qwen3_5_text"],
            "rope_parameters": _QWEN_TEXT["rope_parameters"] | {"partial_rotary_factor": 1.0},
        },
        "vision_config": {
            **_QWEN,
            "hidden_size": 16,
            "intermediate_size": 24,
            "out_hidden_size": 48,
            "num_position_embeddings": 16,
        },
    },
    "llava": {"text_config": {**_TEXT, "model_type": "llama"}, **_LLAVA},
    "llava qwen2": {"text_config": {**_TEXT, "model_type": "qwen2"}, **_LLAVA, "tie_word_embeddings": True},
    "llava_next": {
        "text_config": {**_TEXT, "model_type": "mistral", "sliding_window": 8},
        **_LLAVA,
        "image_grid_pinpoints": [[12, 12]],
    },
    "internvl": {
        "text_config": {**_TEXT, "model_type": "qwen3"},
        "vision_config": {**_SQUARE, "image_size": [24, 24], "patch_size": [6, 6]},
    },
    "idefics3": {"text_config": {**_TEXT, "model_type": "llama"}, "vision_config": _SQUARE},
    "smolvlm": {"text_config": {**_TEXT, "model_type": "llama"}, "vision_config": _SQUARE},
}
"""Fields of the config beside that of the image token, by name: a `model_type`, and what is on."""

_QWEN_VISION = {
    **_QWEN,
    "hidden_size": 16,
    "intermediate_size": 24,
    "out_hidden_size": 48,
    "num_position_embeddings": 16,
}

SPARSE: dict[str, dict[str, Any]] = {
    "qwen3_vl_moe": {
        "text_config": {**_QWEN_TEXT, **_EXPERTS, "decoder_sparse_step": 1, "mlp_only_layers": [1]},
        "vision_config": {**_QWEN_VISION, "deepstack_visual_indexes": [0]},
    },
    "qwen3_5_moe": {
        "text_config": {
            **ROWS["qwen3_5"]["text_config"],
            **_EXPERTS,
            "shared_expert_intermediate_size": 28,
        },
        "vision_config": _QWEN_VISION,
    },
    "glm4v_moe": {
        "text_config": {
            **_QWEN_TEXT,
            **{k: v for k, v in _EXPERTS.items() if k != "num_experts"},
            "n_routed_experts": 8,
            "n_shared_experts": 2,
            "first_k_dense_replace": 1,
            "attention_bias": True,
            "rope_parameters": _QWEN_TEXT["rope_parameters"] | {"partial_rotary_factor": 1.0},
        },
        "vision_config": {
            **_QWEN,
            "hidden_act": "silu",
            "hidden_size": 16,
            "intermediate_size": 24,
            "out_hidden_size": 48,
            "image_size": 16,
        },
    },
    "llama4": {
        "text_config": {
            **_TEXT,
            "intermediate_size": 24,
            "intermediate_size_mlp": 40,
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "interleave_moe_layer_step": 2,
            "num_hidden_layers": 4,
            "attention_chunk_size": 16,
        },
        "vision_config": {
            **_SQUARE,
            "intermediate_size": 64,
            "projector_input_dim": 24,
            "projector_output_dim": 24,
            "vision_output_dim": 24,
        },
    },
}
"""The same for language models with experts (`test_multimodal_experts.py`)."""


def config_of(name: str) -> Any:
    """The config of a row."""
    image = {"image_token_id": IMAGE}
    if name.split()[0] in ("gemma3", "mistral3", "llava", "llava_next", "llama4"):
        image = {"image_token_index": IMAGE}
    if name.startswith("glm"):
        image |= {"video_token_id": 123, "image_start_token_id": 121, "image_end_token_id": 122}
    if name.startswith("qwen"):
        image |= {"video_token_id": 123, "vision_start_token_id": 121, "vision_end_token_id": 122}
    return CONFIG_MAPPING[name.split()[0]](**image, **{**ROWS, **SPARSE}[name])


def build(name: str) -> Callable[[], PreTrainedModel]:
    """Makes the model of a row, in eval mode, the same each time."""
    return noisy(lambda: AutoModelForImageTextToText.from_config(config_of(name), dtype=torch.float32))


def batch_of(name: str, count: int = 3) -> dict[str, torch.Tensor]:
    """Texts of 20 tokens with an image each, padded on the left."""
    kind = name.split()[0]
    tokens = 10 if kind == "llava_next" else 4
    ids, mask = token_ids(count, 20), torch.ones(count, 20, dtype=torch.long)
    ids[:, 5 : 5 + tokens] = IMAGE
    mask[1, :3] = 0
    ids *= mask
    pixels = torch.randn(count, 3, 24, 24, generator=torch.Generator().manual_seed(5))
    image_tokens = (ids == IMAGE).long()
    batch = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
    if kind in ("llava", "llava_next"):
        batch["pixel_values"] = pixels[..., :12, :12]
    if kind == "llava_next":
        batch["pixel_values"] = torch.stack([batch["pixel_values"]] * 2, 1)
        batch["image_sizes"] = torch.tensor([[12, 12]] * count)
    if kind == "mistral3":
        batch["image_sizes"] = torch.tensor([[24, 24]] * count)
    if kind == "gemma3":
        batch["token_type_ids"] = image_tokens
    if kind == "gemma4":
        batch["pixel_values"] = pixels[..., :16, :16].reshape(count, 16, 48)
        places = torch.tensor([[x, y] for y in range(4) for x in range(4)])
        batch["image_position_ids"] = places.expand(count, 16, 2)
        batch["mm_token_type_ids"] = image_tokens
    if kind in ("idefics3", "smolvlm"):
        batch["pixel_values"] = pixels[:, None]
    if kind.startswith(("qwen", "glm")):
        batch["pixel_values"] = pixels[..., :16, :16].reshape(count * 16, 48).repeat(1, 2)
        batch["image_grid_thw"] = torch.tensor([[1, 4, 4]] * count)
        batch["mm_token_type_ids"] = image_tokens
    return batch
