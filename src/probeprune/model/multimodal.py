"""The classes that read images beside text, one record each: where the language model inside them is.

Only that is pruned, as the family of its own config says (`families.py`); what makes embeddings of an image
stays as it is. Knows no model.
"""

import copy
from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig

from probeprune.model.family_records import PRUNED_PREFIX
from probeprune.model.modeling_pruned import has_own_layers


@dataclass(frozen=True)
class Multimodal:
    """One class of multimodal models, as data.

    Its config holds that of the language model as `text_config`; the output head is that of the whole, which
    may have it inside the language model.
    """

    name: str
    """Name for readers."""
    model_types: tuple[str, ...]
    """`model_type` of the configs it covers."""
    text_types: tuple[str, ...]
    """`model_type` of the language models that it is known to hold."""
    text: str = "model.language_model"
    """Path of the language model, without a head."""


_OF_LLAVA = ("llama", "mistral", "qwen2")

MULTIMODAL: tuple[Multimodal, ...] = (
    Multimodal("Gemma 3", ("gemma3",), ("gemma3_text",)),
    Multimodal("Gemma 4", ("gemma4",), ("gemma4_text",)),
    Multimodal("Mistral Small 3, Ministral 3", ("mistral3",), ("mistral", "ministral3")),
    Multimodal("Qwen2-VL", ("qwen2_vl",), ("qwen2_vl_text",)),
    Multimodal("Qwen2.5-VL", ("qwen2_5_vl",), ("qwen2_5_vl_text",)),
    Multimodal("Qwen3-VL", ("qwen3_vl",), ("qwen3_vl_text",)),
    Multimodal("Qwen3.5", ("qwen3_5",), ("qwen3_5_text",)),
    Multimodal("Qwen3-VL MoE", ("qwen3_vl_moe",), ("qwen3_vl_moe_text",)),
    Multimodal("Qwen3.5 MoE", ("qwen3_5_moe",), ("qwen3_5_moe_text",)),
    Multimodal("GLM-4.5V", ("glm4v_moe",), ("glm4v_moe_text",)),
    Multimodal("LLaMA 4", ("llama4",), ("llama4_text",), text="language_model.model"),
    Multimodal("LLaVA 1.5, 1.6 (LLaVA-NeXT)", ("llava", "llava_next"), _OF_LLAVA),
    Multimodal("InternVL 3", ("internvl",), ("qwen2", "qwen3")),
    Multimodal("Idefics 3, SmolVLM", ("idefics3", "smolvlm"), ("llama", "mistral"), text="model.text_model"),
)
"""In the order of the table."""


def multimodal_of(model_type: object) -> Multimodal | None:
    """The record of the class whose configs have this `model_type`; None for a model of text alone."""
    plain = str(model_type).removeprefix(PRUNED_PREFIX)
    return next((m for m in MULTIMODAL if plain in m.model_types), None)


def text_config(config: Any) -> Any:
    """The config of the language model: of a multimodal class the one inside, else the config itself."""
    return config if multimodal_of(config.model_type) is None else config.text_config


def with_text_config(config: Any, text: Any) -> Any:
    """A plain config that describes the same model with another language model.

    Args:
        config: that of the whole model.
        text: a plain config of its language model.
    """
    if multimodal_of(config.model_type) is None:
        return text
    fields = plain_fields(config)
    whole = AutoConfig.for_model(config.model_type.removeprefix(PRUNED_PREFIX), **fields)
    whole.text_config = copy.deepcopy(text)
    return whole


def plain_fields(config: Any) -> dict[str, Any]:
    """The fields of a config that another of its kind may take over: not those of one checkpoint."""
    fields: dict[str, Any] = config.to_dict()
    own = ("per_layer_config",) if has_own_layers(type(config)) else ()
    for name in {"model_type", "per_layer_config", "pruned", "auto_map", "architectures"} - {*own}:
        fields.pop(name, None)
    return fields


def nested_configs(config: Any) -> dict[str, Any]:
    """A config and those inside it, by the name of the field; the config itself under an empty name."""
    inside = {name: getattr(config, name, None) for name in getattr(config, "sub_configs", {})}
    return {"": config, **{name: own for name, own in inside.items() if own is not None}}
