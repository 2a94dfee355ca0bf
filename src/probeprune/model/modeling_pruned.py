"""Models whose layers have widths of their own, as checkpoints open them.

Self-contained: this file is copied beside the weights of such a checkpoint, so that transformers opens it
where probeprune is not installed (`trust_remote_code=True`). Each class is the model of its family,
its linear maps made as narrow as `config.pruned` says; the forward pass is the family's own.

`config.pruned` maps a module's path to what differs from the plain model: for a linear map `in_features`,
`out_features` or `bias`; for any other module attributes that its forward reads (`config.x` for one of its
config's).
"""

from copy import copy
from typing import Any

from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)


def narrow(model: nn.Module, pruned: dict[str, dict[str, Any]]) -> None:
    """Give the modules of a plain model the sizes and attributes that `pruned` says, by path."""
    for path, changes in pruned.items():
        module = model.get_submodule(path)
        if isinstance(module, nn.Linear):
            sizes = {
                "in_features": module.in_features,
                "out_features": module.out_features,
                "bias": module.bias is not None,
                **changes,
            }
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, nn.Linear(**sizes))
            continue
        for name, value in changes.items():
            owner, _, attribute = name.rpartition(".")
            if owner == "config":
                if module.config is model.config:  # shared by all layers
                    module.config = copy(model.config)
                setattr(module.config, attribute, value)
            else:
                setattr(module, name, value)


class _Pruned(PreTrainedModel):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        narrow(self, config.pruned)


class PrunedLlamaConfig(LlamaConfig):
    model_type = "pruned_llama"


class PrunedLlamaForCausalLM(_Pruned, LlamaForCausalLM):
    config_class = PrunedLlamaConfig


class PrunedMistralConfig(MistralConfig):
    model_type = "pruned_mistral"


class PrunedMistralForCausalLM(_Pruned, MistralForCausalLM):
    config_class = PrunedMistralConfig


class PrunedQwen2Config(Qwen2Config):
    model_type = "pruned_qwen2"


class PrunedQwen2ForCausalLM(_Pruned, Qwen2ForCausalLM):
    config_class = PrunedQwen2Config


class PrunedQwen3Config(Qwen3Config):
    model_type = "pruned_qwen3"


class PrunedQwen3ForCausalLM(_Pruned, Qwen3ForCausalLM):
    config_class = PrunedQwen3Config


class PrunedGemma2Config(Gemma2Config):
    model_type = "pruned_gemma2"


class PrunedGemma2ForCausalLM(_Pruned, Gemma2ForCausalLM):
    config_class = PrunedGemma2Config


class PrunedGemma3TextConfig(Gemma3TextConfig):
    model_type = "pruned_gemma3_text"


class PrunedGemma3ForCausalLM(_Pruned, Gemma3ForCausalLM):
    config_class = PrunedGemma3TextConfig


class PrunedOPTConfig(OPTConfig):
    model_type = "pruned_opt"


class PrunedOPTForCausalLM(_Pruned, OPTForCausalLM):
    config_class = PrunedOPTConfig


class PrunedPhi3Config(Phi3Config):
    model_type = "pruned_phi3"


class PrunedPhi3ForCausalLM(_Pruned, Phi3ForCausalLM):
    config_class = PrunedPhi3Config


class PrunedGPTNeoXConfig(GPTNeoXConfig):
    model_type = "pruned_gpt_neox"


class PrunedGPTNeoXForCausalLM(_Pruned, GPTNeoXForCausalLM):
    config_class = PrunedGPTNeoXConfig


MODELS = (
    PrunedLlamaForCausalLM,
    PrunedMistralForCausalLM,
    PrunedQwen2ForCausalLM,
    PrunedQwen3ForCausalLM,
    PrunedGemma2ForCausalLM,
    PrunedGemma3ForCausalLM,
    PrunedOPTForCausalLM,
    PrunedPhi3ForCausalLM,
    PrunedGPTNeoXForCausalLM,
)

# Saving one of these then copies this file and names its classes in config.json.
for _model in MODELS:
    _model.register_for_auto_class("AutoModelForCausalLM")
    _model.config_class.register_for_auto_class()
