"""Tiny random models of every supported family, with weights large enough that pruning shows."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
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
    YoutuConfig,
    YoutuForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from probeprune import METHODS, Probe, compose, save
from probeprune.algebra.moments import Moments, Tokens
from probeprune.calibration.statistics import Statistics
from probeprune.model.pruned_configs import read_config
from probeprune.preparation import Piece, Preparation
from probeprune.prepare import Calibration, statistics_for
from probeprune.strategies.probe_every_batch import ProbeEveryBatch
from probeprune.strategies.pruned_block import Cut

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""RoPE scaled as in LLaMA 3."""

SHAPE = {
    "hidden_size": 48,
    "intermediate_size": 100,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 128,
    "max_position_embeddings": 128,
}
OPT_SHAPE = {
    "hidden_size": 48,
    "ffn_dim": 100,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "vocab_size": 128,
    "max_position_embeddings": 128,
}
LATENT = {"kv_lora_rank": 14, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 8, "head_dim": 4}
"""Latent attention whose queries, keys and values have other sizes than their joint maps."""
NEOX_SHAPE = {k: v for k, v in SHAPE.items() if k not in ("num_key_value_heads", "head_dim")}


def opened(path: Path, auto: Any = AutoModelForCausalLM, **kwargs: Any) -> PreTrainedModel:
    """A checkpoint of any layout, in eval mode, without its tokenizer."""
    config = read_config(path, json.loads((path / "config.json").read_text()))
    model: PreTrainedModel = auto.from_pretrained(path, config=config, **kwargs)
    return model.eval()


def lively(build: Callable[[], PreTrainedModel]) -> Callable[[], PreTrainedModel]:
    """The usual initialisation is so small that a whole block can go without changing a logit."""

    def make() -> PreTrainedModel:
        torch.manual_seed(0)
        model = build()
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, nn.Linear | Conv1D):
                    module.weight.normal_(std=0.2)
                    if module.bias is not None:
                        module.bias.normal_(std=0.2)
                elif isinstance(module, nn.Embedding):
                    module.weight.normal_(std=1.0)
        return model.eval()

    return make


def noisy(build: Callable[[], PreTrainedModel]) -> Callable[[], PreTrainedModel]:
    """As `lively`, with noise on all other parameters too, those of norms among them."""

    def make() -> PreTrainedModel:
        model = build()
        with torch.no_grad():
            for module in model.modules():
                if not isinstance(module, nn.Linear | nn.Embedding):
                    for parameter in module.parameters(recurse=False):
                        parameter += 0.3 * torch.randn_like(parameter)
        return model

    return lively(make)


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    name: lively(build)
    for name, build in {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**{**SHAPE, "num_key_value_heads": 6})),
        "llama-gqa": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
        "llama-bias": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True)),
        "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=8)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE)),
        "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE, sliding_window=8)),
        "gemma3": lambda: Gemma3ForCausalLM(
            Gemma3TextConfig(**{**SHAPE, "num_hidden_layers": 6}, sliding_window=8)
        ),
        "opt": lambda: OPTForCausalLM(OPTConfig(**OPT_SHAPE, word_embed_proj_dim=48)),
        "opt-post-norm": lambda: OPTForCausalLM(
            OPTConfig(**OPT_SHAPE, word_embed_proj_dim=32, do_layer_norm_before=False)
        ),
        "phi3": lambda: Phi3ForCausalLM(Phi3Config(**{**SHAPE, "num_key_value_heads": 6}, pad_token_id=0)),
        "phi3-gqa": lambda: Phi3ForCausalLM(Phi3Config(**SHAPE, pad_token_id=0, sliding_window=8)),
        "youtu": lambda: YoutuForCausalLM(
            YoutuConfig(**{**SHAPE, **LATENT, "num_key_value_heads": 6}, q_lora_rank=20)
        ),
        "gpt-neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**NEOX_SHAPE)),
        "gpt-neox-sequential": lambda: GPTNeoXForCausalLM(
            GPTNeoXConfig(**NEOX_SHAPE, use_parallel_residual=False, attention_bias=False)
        ),
    }.items()
}


def token_ids(batch: int = 4, length: int = 24, seed: int = 1) -> torch.Tensor:
    """Random token ids (batch, length)."""
    return torch.randint(3, 120, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(side: str, batch: int = 4, length: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask of sequences of different lengths, padded on one side."""
    ids, mask = token_ids(batch, length), torch.ones(batch, length, dtype=torch.long)
    if side != "none":
        for row, pads in enumerate([0, 7, 1, 13][:batch]):
            mask[row, :pads] = 0
        if side == "right":
            mask = mask.flip(1)
    return ids * mask, mask


def activations(side: str, seed: int = 0, n: int = 7) -> tuple[torch.Tensor, Tokens]:
    """z (5, 11, n) with a large mean, padded on one side, and which tokens are real."""
    z = torch.randn(5, 11, n, generator=torch.Generator().manual_seed(seed)) * 3 + 5
    valid = None
    if side != "none":
        valid = torch.ones(5, 11, dtype=torch.bool)
        for row, pads in enumerate([0, 4, 1, 10, 3]):
            valid[row, :pads] = False
        if side == "right":
            valid = valid.flip(1)
        z = z.masked_fill(~valid[..., None], 1e6)  # padding must not show, whatever is in it
    return z, Tokens(5, 11, valid)


class masked:
    """Context: units outside `kept` (block, ids) are zero in front of the dense model's consumers."""

    def __init__(self, kept) -> None:
        self.kept, self.hooks = kept, []

    def __enter__(self) -> None:
        for block, units in self.kept:
            keep = torch.zeros(block.units)
            keep[torch.as_tensor(units)] = 1
            channels = keep.repeat_interleave(block.unit_width)
            self.hooks.append(
                block.consumer.register_forward_pre_hook(
                    lambda _, args, c=channels: (args[0] * c.to(args[0].dtype),)
                )
            )

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()


def cuts(units) -> dict[str, Cut]:
    """By block name the cut to these units, or to this number of units."""
    return {n: Cut(u) if isinstance(u, int) else Cut(len(u), u) for n, u in units.items()}


class Given(Preparation):
    """Statistics made by hand, to be given as `calibration`."""

    def __init__(self, model: nn.Module, statistics: Statistics) -> None:
        super().__init__(model, token_ids())
        self.given = statistics

    def get(self, piece: Piece) -> dict:
        return getattr(self.given, piece.part)


PROBING = compose("probe", name="probe", when=ProbeEveryBatch(Probe(reuse=0)))
"""Probe Pruning as published: every batch is probed, however small."""
PARALLEL = compose("probe", name="parallel", when=ProbeEveryBatch(Probe(parallel=True)))
"""The same with every probe beside the block before."""
DYNAMIC = (PROBING, "full-batch")
SIDES = ("none", "left", "right")
"""Where `padded` puts padding."""


def logits(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Logits of the real tokens (tokens, vocabulary)."""
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits[mask.bool()]


def moments_of(model: PreTrainedModel, calibration: Calibration) -> Mapping[str, Moments]:
    """Moments of the dense model, by block name."""
    return statistics_for(model, METHODS["ppsp"], 0.3, calibration).moments


@contextmanager
def lost_means_added(choice: list, moments: Mapping[str, Moments]) -> Iterator[None]:
    """The mean output of the lost channels, added behind the dense model's consumers."""
    hooks = []
    for block, units in choice:
        gone = torch.ones(block.units)
        gone[list(units)] = 0
        lost = moments[block.name].mean * gone.repeat_interleave(block.unit_width)
        bias = block.consumer.weight.detach() @ lost
        hooks.append(block.consumer.register_forward_hook(lambda _, a, out, b=bias: out + b))
    yield
    for hook in hooks:
        hook.remove()


class snapshot:
    """Everything of a model that attaching touches: attributes, hooks, parameters and buffers with their
    values."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.parts = self._parts()
        self.values = {name: tensor.clone() for name, tensor in self._tensors()}

    def assert_untouched(self) -> None:
        """The same objects with the same bits."""
        parts = self._parts()
        assert parts.keys() == self.parts.keys()
        for name, part in self.parts.items():
            assert parts[name] is part or parts[name] == part, name
        tensors = dict(self._tensors())
        assert tensors.keys() == self.values.keys()
        for name, value in self.values.items():
            assert tensors[name].equal(value), name

    def _tensors(self) -> list[tuple[str, torch.Tensor]]:
        return [*self.model.named_parameters(), *self.model.named_buffers()]

    def _parts(self) -> dict[str, object]:
        found: dict[str, object] = {}
        for name, module in self.model.named_modules():
            found |= {f"{name}.{k}": v for k, v in vars(module).items() if not k.startswith("_")}
            found |= {f"{name}.{k}": p for k, p in module._parameters.items()}
            found[f"{name} hooks"] = (len(module._forward_pre_hooks), len(module._forward_hooks))
        return found


def kept(handle) -> list:
    """What an attached method keeps at present: (block, unit ids)."""
    return [(b, k.units) for b, k in zip(handle.blocks, handle.kept_units(), strict=True)]


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    """Equal to rounding: within 1e-5 of the largest value."""
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def write_model_and_text(folder: Path, tokenizer: object) -> Path:
    """A tiny model in `model` and a text that is easy to learn in the file returned."""
    save(FAMILIES["llama-gqa"](), folder / "model", tokenizer=tokenizer)
    lines = [{"text": " ".join(str((7 * i + j * j) % 120) for j in range(60))} for i in range(40)]
    (folder / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "text.jsonl"
