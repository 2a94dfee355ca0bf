"""The architecture families that can be pruned, one record each, and which of them a model is of.

A `Family` (family_records.py) is a description: attribute paths and names of config fields, no modules. To
support another architecture, add a record to `FAMILIES`. `blocks.py` resolves a record to the modules of one
model.
"""

from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from torch import nn

from probeprune.errors import UsageError
from probeprune.model.family_records import (
    PRUNED_PREFIX,
    AttentionRecord,
    ExpertsRecord,
    Family,
    MlpRecord,
    Twin,
)
from probeprune.model.hybrid_families import HYBRID
from probeprune.model.latent_families import LATENT
from probeprune.model.multimodal import MULTIMODAL, Multimodal, multimodal_of
from probeprune.model.older_families import NEOX_MLP, OLDER, ONE_MAP
from probeprune.model.sparse_families import NORMS_OVER_HEADS, ROUTED_BY_GROUP, SINKS, SPARSE

_SANDWICH_MLP = replace(MlpRecord(), norm="pre_feedforward_layernorm")
_ONE_NORM_MLP = MlpRecord(norm="input_layernorm")
_UP_DOWN_MLP = MlpRecord(producers=("mlp.up_proj",))
_GATE_UP_MLP = MlpRecord(producers=("mlp.gate_up_proj", "mlp.gate_up_proj"))
_NORMS_BY_HEAD = "has weights for each head in the norms of queries and keys"


FAMILIES: tuple[Family, ...] = (
    Family("LLaMA 1, 2, 3, SmolLM2", ("llama",), twin=Twin("mistral", {"sliding_window": None})),
    Family("Mistral", ("mistral",)),
    Family("Qwen2, Qwen2.5", ("qwen2",)),
    Family("Qwen3", ("qwen3",)),
    Family("Gemma 2", ("gemma2",), mlp=_SANDWICH_MLP, norm_last=True),
    Family("Gemma 3 (text)", ("gemma3_text",), mlp=_SANDWICH_MLP, norm_last=True),
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
        mlp=_GATE_UP_MLP,
    ),
    Family("Gemma 1", ("gemma",)),
    Family("SmolLM3", ("smollm3",)),
    Family("OLMo 1", ("olmo",)),
    Family(
        "OLMo 2, OLMo 3",
        ("olmo2", "olmo3"),
        attention=AttentionRecord(norm=None, whole=NORMS_OVER_HEADS),
        mlp=MlpRecord(norm=None),
        norm_last=True,
    ),
    Family("Granite", ("granite",), norm_last=True, logits_over="logits_scaling"),
    Family(
        "Command R",
        ("cohere",),
        attention=AttentionRecord(whole=_NORMS_BY_HEAD, whole_if="use_qk_norm"),
        mlp=_ONE_NORM_MLP,
        logits_times="logit_scale",
    ),
    Family("Command R7B, Command A", ("cohere2",), mlp=_ONE_NORM_MLP, logits_times="logit_scale"),
    Family("StarCoder2", ("starcoder2",), mlp=MlpRecord(producers=("mlp.c_fc",), consumer="mlp.c_proj")),
    Family(
        "Phi-1, Phi-1.5, Phi-2",
        ("phi",),
        attention=AttentionRecord(output="dense"),
        mlp=MlpRecord(norm="input_layernorm", producers=("mlp.fc1",), consumer="mlp.fc2"),
    ),
    Family("GLM-4-9B", ("glm",), mlp=_GATE_UP_MLP),
    Family("GLM-4-0414", ("glm4",), mlp=_GATE_UP_MLP, norm_last=True),
    Family("Nemotron-4, Minitron", ("nemotron",), mlp=_UP_DOWN_MLP),
    Family(
        "StableLM",
        ("stablelm",),
        attention=AttentionRecord(
            query_count="num_heads",
            kv_count="num_key_value_heads",
            plain_heads=False,
            whole=_NORMS_BY_HEAD,
            whole_if="qk_layernorm",
        ),
        mlp=MlpRecord(norm=("post_attention_layernorm", "input_layernorm")),
    ),
    Family(
        "EXAONE 4",
        ("exaone4",),
        attention=AttentionRecord(norm=None),
        mlp=MlpRecord(norm=None),
        norm_last=True,
    ),
    Family("Arcee AFM", ("arcee",), attention=AttentionRecord(plain_heads=False), mlp=_UP_DOWN_MLP),
    Family(
        "Apertus",
        ("apertus",),
        attention=AttentionRecord(norm="attention_layernorm"),
        mlp=replace(_UP_DOWN_MLP, norm="feedforward_layernorm"),
    ),
    Family("Seed-OSS", ("seed_oss",)),
    Family("CWM", ("cwm",), attention=AttentionRecord(plain_heads=False)),
    Family("VaultGemma", ("vaultgemma",), attention=AttentionRecord(plain_heads=False), mlp=_SANDWICH_MLP),
    Family(
        "HyperCLOVA X",
        ("hyperclovax",),
        attention=AttentionRecord(plain_heads=False),
        norm_last=True,
        logits_times="logits_scaling",
    ),
    Family("ERNIE 4.5", ("ernie4_5",)),
    Family("nanochat", ("nanochat",), mlp=MlpRecord(producers=("mlp.fc1",), consumer="mlp.fc2")),
    Family(
        "Granite with sliding windows",
        ("granite_swa",),
        attention=AttentionRecord(whole=SINKS),
        norm_last=True,
        logits_over="logits_scaling",
    ),
    Family("Hunyuan (dense)", ("hunyuan_v1_dense",)),
    Family("Helium", ("helium",), attention=AttentionRecord(plain_heads=False)),
    Family("Ministral, Ministral 3", ("ministral", "ministral3")),
    Family(
        "Persimmon",
        ("persimmon",),
        attention=replace(ONE_MAP, query_count="num_heads"),
        mlp=NEOX_MLP,
    ),
    *HYBRID,
    *OLDER,
    *SPARSE,
    *LATENT,
)


INSIDE: tuple[Family, ...] = (
    Family(
        "Qwen2-VL, Qwen2.5-VL (text)",
        ("qwen2_vl_text", "qwen2_5_vl_text"),
        attention=AttentionRecord(plain_heads=False),
    ),
    Family("Qwen3-VL (text)", ("qwen3_vl_text",)),
    Family("Qwen3-VL MoE (text)", ("qwen3_vl_moe_text",), experts=ExpertsRecord()),
    Family("GLM-4.5V (text)", ("glm4v_moe_text",), experts=ROUTED_BY_GROUP),
)
"""The families of language models that exist inside multimodal ones alone (`multimodal.py`)."""


def is_supported(model_type: object) -> bool:
    """Whether configs of this `model_type` belong to a supported family, or hold one that may."""
    return multimodal_of(model_type) is not None or family_of(str(model_type)) is not None


def family_of(model_type: str) -> Family | None:
    """The record of the family that configs of this `model_type` belong to; None for an unsupported one."""
    plain = str(model_type).removeprefix(PRUNED_PREFIX)
    return next((family for family in (*FAMILIES, *INSIDE) if plain in family.model_types), None)


def find_family(model: nn.Module) -> Family:
    """The record of a model's architecture family, by its config's `model_type`.

    Of a multimodal model it is that of the language model inside, with its layers where they are there.

    Raises `UsageError` for a model of an unsupported family.
    """
    config: Any = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    multimodal = multimodal_of(model_type)
    family = family_of(str(model_type)) if multimodal is None else _inside(model, multimodal)
    if family is not None:
        _check_layers(model, family)
        return family
    if _experts(model):
        raise UsageError(
            f"{type(model).__name__} is a mixture of experts of a family that cannot be pruned"
            f"{_nearest(str(model_type))}; choose another model: `probeprune models` lists all families."
        )
    raise UsageError(
        f"model type {model_type!r} ({type(model).__name__}) is not one of the {len(FAMILIES)} supported "
        f"families{_nearest(str(model_type))}; `probeprune models` lists them. To add one, write one Family "
        "record in probeprune/model/families.py (see CONTRIBUTING.md, 'Add a model family')."
    )


def _inside(model: nn.Module, multimodal: Multimodal) -> Family:
    """The family of a multimodal model's language model, as it is found in the whole."""
    config: Any = model.config
    model_type = config.text_config.model_type
    family = family_of(model_type)
    if family is None or model_type not in multimodal.text_types:
        raise UsageError(
            f"the language model inside {type(model).__name__} is of type {model_type!r}, and it is "
            f"supported with {', '.join(multimodal.text_types)} alone; `probeprune models` lists all."
        )
    layers = f"{multimodal.text}.{family.layers.partition('.')[2]}"
    twin = family.twin if family.twin and family.twin.model_type in multimodal.text_types else None
    # The head stands on the whole model, whose code knows no factor of logits.
    return replace(family, layers=layers, twin=twin, logits_times=None, logits_over=None)


def _nearest(model_type: str) -> str:
    """The supported `model_type` most like this one, to put into a sentence; empty if none is like it."""
    known = [t for f in FAMILIES for t in f.model_types] + [t for m in MULTIMODAL for t in m.model_types]
    near = get_close_matches(model_type, known, n=1)
    return f" (nearest: {near[0]})" if near else ""


def _check_layers(model: nn.Module, family: Family) -> None:
    """Raise `UsageError` for a model without the list of layers where its family has it."""
    try:
        model.get_submodule(family.layers)
    except AttributeError:
        raise UsageError(
            f"{type(model).__name__} has no {family.layers}; give the whole model with its head, as "
            "AutoModelForCausalLM or, for a multimodal one, AutoModelForImageTextToText opens it."
        ) from None


def _experts(model: nn.Module) -> bool:
    config = getattr(model, "config", None)
    return any(
        getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")
    )
