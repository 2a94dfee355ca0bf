"""RoPE as GGUF files have it, in both directions: keys, and tensors of one factor per pair of numbers.

llama.cpp divides the frequency of a pair by its factor. Knows nothing of models but their `rope_parameters`.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch

FACTORS = "rope_freqs"
LONG, SHORT = "rope_factors_long", "rope_factors_short"

_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""The scaling of LLaMA 3.1 to 3.3, which differ in the factor alone; a file holds only what it makes."""


def parts(parameters: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The parameters of full attention, and those of layers with a window where they have their own."""
    if "full_attention" in parameters:
        return dict(parameters["full_attention"]), dict(parameters["sliding_attention"])
    return dict(parameters), None


def unfit(parameters: Mapping[str, Any], scalings: tuple[str, ...], partial: bool) -> str | None:
    """Why an architecture with these kinds of scaling cannot hold the parameters; None if it can."""
    full, sliding = parts(parameters)
    kind = str(full.get("rope_type", "default"))
    if kind not in ("default", *scalings):
        return f"it has no RoPE scaling of type {kind}"
    if sliding is not None and sliding.get("rope_type", "default") != "default":
        return "it has no RoPE scaling in layers with a sliding window"
    if not partial and full.get("partial_rotary_factor", 1.0) != 1.0:
        return "it turns whole heads, not a part of each"
    if kind == "yarn":
        factor, given = full["factor"], full.get("attention_factor")
        usual = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
        if full.get("mscale") or full.get("mscale_all_dim") or not full.get("truncate", True):
            return "it has none of YaRN's options mscale, mscale_all_dim and truncate"
        if given is not None and not math.isclose(given, usual, rel_tol=1e-6):
            return f"it scales attention under YaRN by {usual:.4g}, not by {given:.4g}"
    return None


def keys(parameters: Mapping[str, Any], context: int) -> dict[str, float | int | str]:
    """The keys, without the architecture's name.

    Args:
        parameters: which `unfit` has nothing against.
        context: the config's `max_position_embeddings`.
    """
    full, sliding = parts(parameters)
    kind = full.get("rope_type", "default")
    found: dict[str, float | int | str] = {"rope.freq_base": float(full["rope_theta"])}
    if sliding is not None:
        found["rope.freq_base_swa"] = float(sliding["rope_theta"])
    if kind in ("linear", "yarn"):
        found |= {"rope.scaling.type": kind, "rope.scaling.factor": float(full["factor"])}
    if kind in ("yarn", "longrope"):
        original = int(full.get("original_max_position_embeddings") or context)
        found["rope.scaling.original_context_length"] = original
    if kind == "yarn":
        for name in ("beta_fast", "beta_slow"):
            if full.get(name) is not None:
                found[f"rope.scaling.yarn_{name}"] = float(full[name])
    if kind == "longrope":
        scale = full.get("factor") or context / original
        usual = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
        found["rope.scaling.attn_factor"] = float(full.get("attention_factor") or usual)
    return found


def tensors(parameters: Mapping[str, Any], dims: int) -> dict[str, torch.Tensor]:
    """The tensors of factors by name, float32 of `dims / 2` each; `dims` is how much of a head is turned."""
    full, _ = parts(parameters)
    kind = full.get("rope_type", "default")
    if kind == "longrope":
        return {LONG: torch.tensor(full["long_factor"]), SHORT: torch.tensor(full["short_factor"])}
    if kind != "llama3":
        return {}
    frequencies = full["rope_theta"] ** -(torch.arange(0, dims, 2, dtype=torch.float32) / dims)
    waves = 2 * math.pi / frequencies
    low, high = full["low_freq_factor"], full["high_freq_factor"]
    original, factor = full["original_max_position_embeddings"], full["factor"]
    smooth = (original / waves - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    factors = torch.where(waves > original / low, factor, between)
    return {FACTORS: torch.where(waves < original / high, 1.0, factors).float()}


def parameters(
    fields: Mapping[str, Any], factors: Mapping[str, torch.Tensor], dims: int, head_dim: int
) -> dict[str, Any]:
    """The `rope_parameters` of a file: what `keys` and `tensors` make of them.

    Args:
        fields: the keys, without the architecture's name.
        factors: tensors of factors by name.
        dims: how much of a head is turned.
        head_dim: the size of a head.

    Raises `ValueError` for a scaling that no config describes.
    """
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": fields.get("rope.freq_base", 10000.0)}
    if dims != head_dim:
        found["partial_rotary_factor"] = dims / head_dim
    kind = fields.get("rope.scaling.type")
    original = fields.get("rope.scaling.original_context_length")
    if LONG in factors:
        found |= {
            "rope_type": "longrope",
            "long_factor": factors[LONG].tolist(),
            "short_factor": factors[SHORT].tolist(),
            "original_max_position_embeddings": original,
        }
        if "rope.scaling.attn_factor" in fields:
            found["attention_factor"] = fields["rope.scaling.attn_factor"]
    elif FACTORS in factors:
        guess = {**found, "rope_type": "llama3", "factor": float(factors[FACTORS].max()), **_LLAMA3}
        if not torch.allclose(tensors(guess, dims)[FACTORS], factors[FACTORS], rtol=1e-4):
            raise ValueError("its factors of RoPE (rope_freqs) are not those of LLaMA 3")
        found = guess
    elif kind in ("linear", "yarn"):
        found |= {"rope_type": kind, "factor": fields["rope.scaling.factor"]}
        if kind == "yarn":
            found["original_max_position_embeddings"] = original or fields["context_length"]
            for name in ("beta_fast", "beta_slow"):
                if f"rope.scaling.yarn_{name}" in fields:
                    found[name] = fields[f"rope.scaling.yarn_{name}"]
    elif kind not in (None, "none"):
        raise ValueError(f"it scales RoPE by '{kind}'")
    return found
