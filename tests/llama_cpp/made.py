"""Tiny models, dense and pruned, one for each thing that a GGUF file can hold."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import tiny
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
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from probeprune import compose, prune, with_equal_widths
from probeprune.engines.llama_cpp import LlamaCpp
from probeprune.model.gguf_files import embedded_gguf

SHAPE = {**tiny.SHAPE, "vocab_size": 400, "max_position_embeddings": 256}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.6],
    "long_factor": [1.0, 2.0, 3.0, 4.0],
    "original_max_position_embeddings": 256,
}
NEOX = {k: v for k, v in SHAPE.items() if k not in ("num_key_value_heads", "head_dim")}


def llama(**changes) -> Callable[[], PreTrainedModel]:
    return lambda: LlamaForCausalLM(LlamaConfig(**{**SHAPE, **changes}))


def gemma3(**changes) -> Callable[[], PreTrainedModel]:
    shape = {**SHAPE, "num_hidden_layers": 6, "sliding_window": 8, "query_pre_attn_scalar": 8, **changes}
    return lambda: Gemma3ForCausalLM(Gemma3TextConfig(**shape))


DENSE = {
    name: tiny.lively(build)
    for name, build in {
        "llama": llama(),
        "llama-tied": llama(tie_word_embeddings=True),
        "llama-bias": llama(attention_bias=True, mlp_bias=True),
        "llama-wide-heads": llama(head_dim=16),
        "llama-llama3": llama(rope_parameters=tiny.LLAMA3, max_position_embeddings=16384),
        "llama-linear": llama(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}),
        "llama-yarn": llama(rope_parameters=YARN),
        "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=None)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE)),
        "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE, sliding_window=8, query_pre_attn_scalar=8)),
        "gemma3": gemma3(),
        "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SHAPE, pad_token_id=0)),
        "phi3-long": lambda: Phi3ForCausalLM(
            Phi3Config(
                **{**SHAPE, "max_position_embeddings": 1024},
                pad_token_id=0,
                rope_parameters=LONG,
                original_max_position_embeddings=256,
            )
        ),
        "gptneox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**NEOX)),
        "gptneox-sequential": lambda: GPTNeoXForCausalLM(
            GPTNeoXConfig(**NEOX, hidden_act="gelu_new", use_parallel_residual=False, attention_bias=False)
        ),
    }.items()
}
DENSE["qwen3-tied"] = tiny.lively(lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, tie_word_embeddings=True)))
"""Dense models by name."""


def pruned(name: str, method: str, ratio: float = 0.3, **changes) -> Callable[[], PreTrainedModel]:
    """A dense model pruned; statistics from random ids."""

    def make() -> PreTrainedModel:
        model = DENSE[name]()
        prune(
            model,
            compose(method, name=method, round_to=1, skip_layers=1, **changes),
            ratio,
            calibration=tiny.token_ids(),
        )
        return model

    return make


def uniform(name: str, ratio: float = 0.5, **changes) -> Callable[[], PreTrainedModel]:
    """A dense model pruned to the same widths in all layers."""

    def make() -> PreTrainedModel:
        model = DENSE[name]()
        method = with_equal_widths(compose("wanda-sp", name="wanda-sp", round_to=1, skip_layers=0, **changes))
        prune(model, method, ratio, calibration=tiny.token_ids())
        return model

    return make


MADE: dict[str, tuple[str, Callable[[], PreTrainedModel]]] = {
    **{name: (name.split("-")[0], build) for name, build in DENSE.items()},
    "mistral": ("llama", DENSE["mistral"]),
    "llama, per layer": ("deci", pruned("llama", "flap")),
    "llama tied, per layer": ("deci", pruned("llama-tied", "flap", compensation="none")),
    "llama with biases, per layer": ("deci", pruned("llama-bias", "flap")),
    "llama3, per layer": ("deci", pruned("llama-llama3", "flap")),
    "mistral, per layer": ("deci", pruned("mistral", "flap")),
    "qwen2, per layer": ("deci", pruned("qwen2", "flap")),
    "qwen3 tied, per layer": ("openelm", pruned("qwen3-tied", "flap", compensation="none")),
    "llama, uniform": ("llama", uniform("llama")),
    "llama with biases, uniform": ("llama", uniform("llama-bias")),
    "llama, uniform, means added": ("llama", uniform("llama", compensation="bias")),
    "qwen2, uniform": ("deci", uniform("qwen2")),
    "qwen2, narrower MLPs": ("qwen2", uniform("qwen2", blocks=("mlp",))),
    "qwen2, narrower MLPs, means added": ("deci", uniform("qwen2", blocks=("mlp",), compensation="bias")),
    "qwen3, uniform": ("qwen3", uniform("qwen3")),
    "gemma2, uniform": ("gemma2", uniform("gemma2")),
    "gemma3, uniform": ("gemma3", uniform("gemma3")),
    "phi3, narrower MLPs": ("phi3", uniform("phi3", blocks=("mlp",))),
    "gptneox, narrower MLPs": ("gptneox", uniform("gptneox", blocks=("mlp",))),
}
"""By name: the architecture of the file, and how the model is made."""


def with_context(engine: LlamaCpp, context: int) -> LlamaCpp:
    """The same engine for texts of that many tokens."""
    return replace(engine, context=context)


def embedded() -> Path:
    """The GGUF file of SmolLM2-135M."""
    return embedded_gguf()
