"""Values that fields of a model's config.json and generation_config.json may have, one table.

Transformers accepts many others and fails later, somewhere else. Only fields that the supported families
read are listed; knows nothing of weights.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from probeprune.errors import UsageError
from probeprune.model.modeling_pruned import distinct_layers

MOST = 2**31 - 1
"""The largest count and token id."""


@dataclass(frozen=True)
class Allowed:
    """The values that a field of a file of others may have: numbers, but names, flags and lists too."""

    words: str
    """What they are, to follow `must be`."""
    holds: Callable[[Any], bool]

    def or_none(self) -> "Allowed":
        """The same values, and null."""
        return Allowed(f"{self.words} or null", lambda v: v is None or self.holds(v))

    def or_list(self) -> "Allowed":
        """The same values, and lists of them."""
        return Allowed(
            f"{self.words} or a list of such",
            lambda v: all(map(self.holds, v)) if isinstance(v, list) else self.holds(v),
        )


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= 1e30 and isfinite(value)


COUNT = Allowed(f"a whole number from 1 to {MOST}", lambda v: type(v) is int and 1 <= v <= MOST)
WHOLE = Allowed(f"a whole number from 0 to {MOST}", lambda v: type(v) is int and 0 <= v <= MOST)
TOKEN = Allowed(f"a token id, a whole number up to {MOST}", lambda v: type(v) is int and -1 <= v <= MOST)
POSITIVE = Allowed("a number above 0", lambda v: _number(v) and v > 0)
AT_LEAST_0 = Allowed("a number of at least 0", lambda v: _number(v) and v >= 0)
SHARE = Allowed("a number from 0 to 1", lambda v: _number(v) and 0 <= v <= 1)
PART = Allowed("a number above 0 and at most 1", lambda v: _number(v) and 0 < v <= 1)
NUMBER = Allowed("a number", _number)
FLAG = Allowed("true or false", lambda v: isinstance(v, bool))
NAME = Allowed("a name", lambda v: isinstance(v, str) and v != "")
FLAG_OR_NAME = Allowed("true, false or a name", lambda v: FLAG.holds(v) or NAME.holds(v))
NAMES = Allowed("a list of names", lambda v: isinstance(v, list) and all(isinstance(n, str) for n in v))
POSITIVES = Allowed(
    "a list of numbers above 0", lambda v: isinstance(v, list) and all(map(POSITIVE.holds, v))
)
FLAGS = Allowed("a list of 0 and 1", lambda v: isinstance(v, list) and all(n in (0, 1) for n in v))
OBJECT = Allowed("an object", lambda v: isinstance(v, dict))


def _table(rows: Mapping[str, Allowed]) -> dict[str, Allowed]:
    return {name: allowed for names, allowed in rows.items() for name in names.split()}


FIELDS = _table(
    {
        "hidden_size ffn_dim word_embed_proj_dim num_hidden_layers num_attention_heads vocab_size "
        "max_position_embeddings original_max_position_embeddings": COUNT,
        "n_embd n_head n_heads n_layer n_layers n_positions n_ctx d_model attention_heads num_layers "
        "max_seq_len window_size": COUNT,
        "intermediate_size n_inner ffn_hidden_size num_kv_heads rotary_dim": COUNT.or_none(),
        # Of `pruned`: the modules of a checkpoint whose layers differ in width.
        "in_features out_features num_key_value_groups num_heads split_size embed_dim": COUNT,
        "num_key_value_heads head_dim sliding_window": COUNT.or_none(),
        "max_window_layers": WHOLE,
        "num_local_experts n_routed_experts moe_num_experts num_experts_per_tok moe_k moe_intermediate_size "
        "shared_expert_intermediate_size intermediate_size_mlp n_group topk_group": COUNT.or_none(),
        "num_experts moe_topk": COUNT.or_list().or_none(),
        "n_shared_experts moe_num_shared_experts first_k_dense_replace num_nextn_predict_layers": (
            WHOLE.or_none()
        ),
        "kv_lora_rank qk_nope_head_dim qk_rope_head_dim qk_head_dim": COUNT,
        "q_lora_rank v_head_dim dim_model_base": COUNT.or_none(),
        "scale_emb scale_depth": NUMBER.or_none(),
        "routed_scaling_factor": NUMBER,
        "rms_norm_eps layer_norm_eps layer_norm_epsilon norm_eps norm_epsilon rope_theta rotary_emb_base "
        "rope_local_base_freq factor low_freq_factor high_freq_factor beta_fast beta_slow": POSITIVE,
        "attention_factor final_logit_softcapping attn_logit_softcapping clip_qkv": POSITIVE.or_none(),
        "query_pre_attn_scalar alpha": POSITIVE,
        "embedding_multiplier attention_multiplier residual_multiplier logits_scaling logit_scale "
        "llama_4_scaling_beta mscale mscale_all_dim": NUMBER,
        "short_factor long_factor": POSITIVES,
        "partial_rotary_factor rotary_pct": PART,
        "attention_dropout hidden_dropout dropout activation_dropout layerdrop embd_pdrop resid_pdrop "
        "residual_dropout embedding_dropout attn_pdrop emb_pdrop embed_dropout resid_dropout "
        "hidden_dropout_prob attention_probs_dropout_prob": SHARE,
        "initializer_range init_std": AT_LEAST_0,
        "tie_word_embeddings attention_bias mlp_bias bias use_cache do_layer_norm_before enable_bias "
        "layer_norm_elementwise_affine use_parallel_residual use_sliding_window "
        "_remove_final_layer_norm use_qk_norm qk_layernorm use_bias use_qkv_bias attention_out_bias "
        "scale_attn_weights scale_attn_by_inverse_layer_idx reorder_and_upcast_attn multi_query "
        "new_decoder_architecture parallel_attn alibi scale_embedding": FLAG,
        "rope_interleave norm_topk_prob": FLAG.or_none(),
        "no_rope_layers": FLAGS.or_none(),
        "no_rope_layer_interval": COUNT.or_none(),
        "use_bidirectional_attention": FLAG_OR_NAME.or_none(),
        "top_k_experts num_global_key_value_heads global_head_dim": COUNT.or_none(),
        "hidden_size_per_layer_input num_kv_shared_layers": WHOLE.or_none(),
        "attention_k_eq_v enable_moe_block use_double_wide_mlp": FLAG,
        "hidden_act hidden_activation activation_function dtype torch_dtype": NAME.or_none(),
        "rope_type type": NAME,
        "layer_types": NAMES.or_none(),
        "rope_parameters rope_scaling": OBJECT.or_none(),
        "pruned per_layer_config": OBJECT,
        "pad_token_id bos_token_id": TOKEN.or_none(),
        "eos_token_id": TOKEN.or_list().or_none(),
    }
)
"""What is allowed by field, of config.json and the objects nested in it."""

GENERATION_FIELDS = _table(
    {
        "max_length max_new_tokens num_beams num_return_sequences": COUNT.or_none(),
        "min_length min_new_tokens top_k no_repeat_ngram_size": WHOLE.or_none(),
        "temperature": AT_LEAST_0.or_none(),
        "top_p min_p typical_p epsilon_cutoff eta_cutoff": SHARE.or_none(),
        "repetition_penalty": POSITIVE.or_none(),
        "length_penalty guidance_scale": NUMBER.or_none(),
        "do_sample use_cache": FLAG.or_none(),
        "pad_token_id bos_token_id": TOKEN.or_none(),
        "eos_token_id": TOKEN.or_list().or_none(),
    }
)
"""What is allowed by field of generation_config.json."""


def check_fields(file: Path, fields: Mapping[str, Any], table: Mapping[str, Allowed]) -> None:
    """Raise `UsageError` for the first field of a JSON object, or one nested in it, with another value."""
    for path, name, value in _walk(fields):
        if name == "sliding_window" and value == 0 and fields.get("use_sliding_window") is False:
            continue  # what Qwen2-MoE says of no window
        if name == "rms_norm_eps" and value is None and "layer_norm_eps" in fields:
            continue  # Command A MoE: its norms are LayerNorms
        if name in table and not table[name].holds(value):
            # Writing out a number of thousands of digits is an error itself.
            huge = type(value) is int and abs(value) > MOST
            shown = "a number far too large" if huge else json.dumps(value)
            if len(shown) > 60:
                shown = f"{shown[:60]}..."
            raise UsageError(f"'{file}' says {path} {shown}; it must be {table[name].words}.")


def _walk(fields: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Path, name and value of every field. Without recursion: the nesting is not ours."""
    left: list[tuple[str, Any]] = list(fields.items())
    while left:
        path, value = left.pop()
        yield path, path.rpartition(".")[2], value
        if isinstance(value, dict):
            left += [(f"{path}.{name}", inner) for name, inner in value.items()]


def check_heads(file: Path, config: Any, fields: Mapping[str, Any]) -> None:
    """Raise `UsageError` for numbers of heads that do not divide what they must.

    Args:
        file: where the config was read from.
        config: the config of a supported family.
        fields: what the file says.
    """
    for own in distinct_layers(config):
        _check_heads_of(file, own, fields)


def _check_heads_of(file: Path, config: Any, fields: Mapping[str, Any]) -> None:
    """As `check_heads`, of the config of one layer."""
    heads, groups = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    if groups is not None and heads % groups:
        raise UsageError(
            f"'{file}' says num_key_value_heads {groups}, which does not divide num_attention_heads {heads}; "
            "get the checkpoint again."
        )
    derived = getattr(config, "head_dim", None) in (None, config.hidden_size // heads)
    if fields.get("head_dim") is None and derived and config.hidden_size % heads:
        raise UsageError(
            f"'{file}' says num_attention_heads {heads}, which does not divide hidden_size "
            f"{config.hidden_size}, and no head_dim; get the checkpoint again."
        )
