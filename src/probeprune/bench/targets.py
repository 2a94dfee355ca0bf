"""The models that bench measures: a loaded one on text, or a random one of a real model's shape.

A shape needs no download: its decoder layers have the real sizes, and there may be fewer of them. Random
models are measured on random tokens, for speed and memory only.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from probeprune.data.corpora import load_corpus
from probeprune.data.windows import calibration_windows
from probeprune.errors import UsageError, unknown
from probeprune.model.blocks import find_blocks
from probeprune.model.loading import LoadedModel
from probeprune.model.passes import token_windows
from probeprune.ranges import plain

SHAPES: dict[str, dict[str, Any]] = {
    # hidden size, MLP width, layers, heads, key-value heads, head size: from the models' config.json
    name: dict(
        zip(
            (
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "num_key_value_heads",
                "head_dim",
            ),
            sizes,
            strict=True,
        )
    )
    for name, sizes in {
        "llama-2-7b": (4096, 11008, 32, 32, 32, 128),
        "llama-2-13b": (5120, 13824, 40, 40, 40, 128),
        "llama-3-8b": (4096, 14336, 32, 32, 8, 128),
        "llama-3.2-1b": (2048, 8192, 16, 32, 8, 64),
        "llama-3.2-3b": (3072, 8192, 28, 24, 8, 128),
    }.items()
}

_VOCABULARY = 1024
"""Vocabulary of a random model. Embedding and head are not measured."""
_SPREAD = 0.35
"""Standard deviation of the logarithm of a random model's channel scales. With this value about one kept unit
in seven changes from batch to batch, as in SmolLM2-135M; with equal channels it would be one in four."""


@dataclass(frozen=True)
class Target:
    """A model to measure and tokens to measure it on.

    Attributes:
        name: shown in tables and lines.
        model: in eval mode.
        windows: called with (count, length); returns a LongTensor (count, length) of token ids.
        dtype, device: of the model.
    """

    name: str
    model: Any
    windows: Callable[[int, int], torch.Tensor]
    dtype: torch.dtype
    device: torch.device


def from_loaded(loaded: LoadedModel) -> Target:
    """A loaded model on windows of the embedded C4 text."""

    def windows(count: int, length: int) -> torch.Tensor:
        drawn = calibration_windows(load_corpus("c4"), loaded.tokenizer, count=count, length=length, seed=0)
        return token_windows(loaded.model, drawn)

    return Target(loaded.name, loaded.model, windows, loaded.dtype, loaded.device)


def of_shape(shape: str, layers: int | None, dtype: torch.dtype, device: torch.device) -> Target:
    """A random model with layers of a real model's sizes, on random tokens.

    Args:
        shape: a key of `SHAPES`.
        layers: number of layers; None for the real model's.
        dtype, device: of the weights.

    Raises:
        UsageError: an unknown shape, or fewer than one layer.
    """
    if shape not in SHAPES:
        raise UsageError(unknown("shape", shape, SHAPES))
    sizes = dict(SHAPES[shape])
    if layers is not None:
        sizes["num_hidden_layers"] = plain("layers", layers)
    return of_sizes(shape, sizes, dtype, device)


def of_sizes(shape: str, sizes: Mapping[str, int], dtype: torch.dtype, device: torch.device) -> Target:
    """A random LLaMA of these sizes, on random tokens.

    Args:
        shape: a name for tables and lines.
        sizes: fields of its config, as in `SHAPES`.
        dtype, device: of the weights.
    """
    config = LlamaConfig(**sizes, vocab_size=_VOCABULARY, max_position_embeddings=131072, dtype=dtype)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.device(device):
        torch.manual_seed(0)
        model = LlamaForCausalLM._from_config(config, dtype=dtype).eval().requires_grad_(False)
        for block in find_blocks(model):
            scale = torch.randn(block.units, 1, dtype=torch.float32).mul_(_SPREAD).exp_()
            last = block.members[-2]  # value or up: z is linear in it
            rows = last.part(last.weight, block.units).view(block.units, last.width, -1)
            rows.mul_(scale[..., None].to(dtype))

    def windows(count: int, length: int) -> torch.Tensor:
        return torch.randint(_VOCABULARY, (count, length), generator=torch.Generator().manual_seed(0))

    name = f"{shape}, {sizes['num_hidden_layers']} layers, random"
    return Target(name, model, windows, dtype, device)
