"""The architectures of GGUF files, one record each: the same table writes a file and reads it.

An `Architecture` says for which families llama.cpp computes what they compute, under which names it looks for
tensors and in which order of rows, and what it cannot hold. Knows neither tensors nor files.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

Order = Literal["plain", "query pairs", "key pairs", "by head"]
"""Order of a tensor's rows in the file.

- `plain`: as in the model.
- `query pairs`, `key pairs`: within each head the two halves interleaved, so that the numbers that RoPE turns
  together lie side by side.
- `by head`: the model has queries, keys and values head by head, the file all queries, then keys, then
  values.
"""

Width = Literal["hidden", "heads", "groups", "qkv", "mlp", "two mlps", "head", "vocabulary"]
"""A number of rows or columns: the hidden states; all query heads; all key-value heads; queries, keys and
values; the MLP, or its gate and its input; one head; the tokens."""


@dataclass(frozen=True)
class Part:
    """One tensor of a file, `NAME.weight`, with the bias beside it, `NAME.bias`."""

    name: str
    modules: Mapping[str, Width]
    """The modules whose weights it holds, one below the other, with the rows of each; paths are relative to
    the layer, or to the model for what is not in a layer."""
    columns: Width | None = None
    """None for a vector."""
    order: Order = "plain"
    bias: Literal["no", "if there", "always"] = "no"
    """Whether the architecture has a bias here; for `always`, zeros are written where the model has none."""
    shift: float = 0.0
    """Added to the weight in the file: the norms of some families multiply by `1 + weight`."""


@dataclass(frozen=True)
class Window:
    """Layers that see the last tokens only: all but every `period`-th, from which `full` is the first."""

    period: int
    full: int

    def types(self, layers: int) -> list[str]:
        """The `layer_types` of a config with these layers."""
        kinds = ("sliding_attention", "full_attention")
        return [kinds[i % self.period == self.full] for i in range(layers)]


@dataclass(frozen=True)
class Architecture:
    """One value of `general.architecture`."""

    name: str
    model_types: tuple[str, ...]
    """`model_type` of the configs that it carries; a file is opened as the first."""
    layer: tuple[Part, ...]
    ends: tuple[Part, ...]
    """Tensors outside of the layers; those of `output` are left out where the head is tied."""
    per_layer: bool = False
    """Whether layers may differ in heads and MLP width."""
    full_heads: bool = False
    """Whether all heads together must be as wide as the hidden states."""
    head: Literal["tied or not", "tied", "untied"] = "tied or not"
    activations: tuple[str, ...] = ("silu",)
    """Names of the activation functions that it computes; a file is opened with the first."""
    scalings: tuple[str, ...] = ("linear", "yarn")
    """Kinds of RoPE scaling that it has."""
    partial_rotary: bool = False
    """Whether RoPE may turn a part of each head only."""
    numbers: Mapping[str, str] = field(default_factory=dict)
    """Further keys (without the architecture's name) and the config field that each holds."""
    window: Window | None = None
    """Which layers have a sliding window; None if the engine gives none to any layer."""
    scaled_layers: int | None = None
    """The number of layers at which the engine scales attention by hidden size over heads; at any other it
    scales by the head size. None for an architecture that always does the latter."""


def _norm(name: str, module: str, width: Width = "hidden", shift: float = 0.0) -> Part:
    return Part(name, {module: width}, shift=shift)


def _linear(name: str, module: str, rows: Width, columns: Width) -> Part:
    return Part(name, {module: rows}, columns)


def _with_biases(*parts: Part) -> tuple[Part, ...]:
    return tuple(replace(part, bias="always") for part in parts)


_EMBEDDINGS = _linear("token_embd", "model.embed_tokens", "vocabulary", "hidden")
_HEAD = _linear("output", "lm_head", "vocabulary", "hidden")
_ENDS = (_EMBEDDINGS, _norm("output_norm", "model.norm"), _HEAD)
_NORMS = (_norm("attn_norm", "input_layernorm"), _norm("ffn_norm", "post_attention_layernorm"))
_QUERY = _linear("attn_q", "self_attn.q_proj", "heads", "hidden")
_KEY = _linear("attn_k", "self_attn.k_proj", "groups", "hidden")
_VALUE = _linear("attn_v", "self_attn.v_proj", "groups", "hidden")
_OUTPUT = _linear("attn_output", "self_attn.o_proj", "hidden", "heads")
_ATTENTION = (_QUERY, _KEY, _VALUE, _OUTPUT)
_HEAD_NORMS = (
    _norm("attn_q_norm", "self_attn.q_norm", "head"),
    _norm("attn_k_norm", "self_attn.k_norm", "head"),
)
_DOWN = _linear("ffn_down", "mlp.down_proj", "hidden", "mlp")
_MLP = (
    _linear("ffn_gate", "mlp.gate_proj", "mlp", "hidden"),
    _linear("ffn_up", "mlp.up_proj", "mlp", "hidden"),
    _DOWN,
)
_LLAMA = (
    *_NORMS,
    replace(_QUERY, order="query pairs", bias="if there"),
    replace(_KEY, order="key pairs", bias="if there"),
    *(replace(part, bias="if there") for part in (_VALUE, _OUTPUT, *_MLP)),
)
_GEMMA_NORMS = (
    _norm("attn_norm", "input_layernorm", shift=1.0),
    _norm("post_attention_norm", "post_attention_layernorm", shift=1.0),
    _norm("ffn_norm", "pre_feedforward_layernorm", shift=1.0),
    _norm("post_ffw_norm", "post_feedforward_layernorm", shift=1.0),
)
_GEMMA_ENDS = (_EMBEDDINGS, _norm("output_norm", "model.norm", shift=1.0), _HEAD)
_RMS = {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}

ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture(
        "llama",
        ("llama", "mistral"),
        _LLAMA,
        _ENDS,
        scalings=("linear", "yarn", "llama3"),
        numbers=_RMS,
    ),
    Architecture(
        "qwen2",
        ("qwen2",),
        (*_NORMS, *_with_biases(_QUERY, _KEY, _VALUE), _OUTPUT, *_MLP),
        _ENDS,
        full_heads=True,
        numbers=_RMS,
    ),
    Architecture("qwen3", ("qwen3",), (*_NORMS, *_ATTENTION, *_HEAD_NORMS, *_MLP), _ENDS, numbers=_RMS),
    Architecture(
        "gemma2",
        ("gemma2",),
        (*_GEMMA_NORMS, *_ATTENTION, *_MLP),
        _GEMMA_ENDS,
        head="tied",
        activations=("gelu_pytorch_tanh",),
        numbers={
            **_RMS,
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        window=Window(2, full=1),
        scaled_layers=46,
    ),
    Architecture(
        "gemma3",
        ("gemma3_text",),
        (*_GEMMA_NORMS, *_ATTENTION, *(replace(part, shift=1.0) for part in _HEAD_NORMS), *_MLP),
        _GEMMA_ENDS,
        head="tied",
        activations=("gelu_pytorch_tanh",),
        numbers=_RMS,
        window=Window(6, full=5),
        scaled_layers=62,
    ),
    Architecture(
        "phi3",
        ("phi3",),
        (
            *_NORMS,
            _linear("attn_qkv", "self_attn.qkv_proj", "qkv", "hidden"),
            _OUTPUT,
            _linear("ffn_up", "mlp.gate_up_proj", "two mlps", "hidden"),
            _DOWN,
        ),
        _ENDS,
        full_heads=True,
        scalings=("longrope",),
        partial_rotary=True,
        numbers=_RMS,
    ),
    Architecture(
        "gptneox",
        ("gpt_neox",),
        _with_biases(
            _norm("attn_norm", "input_layernorm"),
            replace(_linear("attn_qkv", "attention.query_key_value", "qkv", "hidden"), order="by head"),
            _linear("attn_output", "attention.dense", "hidden", "heads"),
            _norm("ffn_norm", "post_attention_layernorm"),
            _linear("ffn_up", "mlp.dense_h_to_4h", "mlp", "hidden"),
            _linear("ffn_down", "mlp.dense_4h_to_h", "hidden", "mlp"),
        ),
        (
            _linear("token_embd", "gpt_neox.embed_in", "vocabulary", "hidden"),
            replace(_norm("output_norm", "gpt_neox.final_layer_norm"), bias="always"),
            _HEAD,
        ),
        full_heads=True,
        head="untied",
        # The engine computes the approximation by tanh for both.
        activations=("gelu", "gelu_pytorch_tanh", "gelu_new", "gelu_fast"),
        partial_rotary=True,
        numbers={
            "attention.layer_norm_epsilon": "layer_norm_eps",
            "use_parallel_residual": "use_parallel_residual",
        },
    ),
    Architecture(
        "deci",
        ("llama", "mistral", "qwen2"),
        _LLAMA,
        _ENDS,
        per_layer=True,
        scalings=("linear", "yarn", "llama3"),
        numbers=_RMS,
    ),
    Architecture(
        "openelm",
        ("qwen3",),
        (
            *_NORMS,
            Part("attn_qkv", {m: w for p in (_QUERY, _KEY, _VALUE) for m, w in p.modules.items()}, "hidden"),
            _OUTPUT,
            *_HEAD_NORMS,
            *_MLP,
        ),
        _ENDS,
        per_layer=True,
        head="tied",
        numbers=_RMS,
    ),
)
"""A model goes to the first that carries it."""


def find_architecture(name: str) -> Architecture | None:
    """The record of a `general.architecture`; None for one that is not in the table."""
    return next((a for a in ARCHITECTURES if a.name == name), None)
