"""What checkpoints say twice, so that tools that know transformers 4 compute the same."""

import json

import pytest
import tiny
from transformers import (
    AutoConfig,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
)

from probeprune import compose, load_model, prune, save
from probeprune.model.older_names import rope_fields

LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 24,
    "long_factor": [2.0] * 24,
}
THETA = {"rope_type": "default", "rope_theta": 123.0}
SMALL = {"hidden_size": 48, "num_attention_heads": 1, "num_key_value_heads": 1}


def phi3(**more) -> Phi3Config:
    return Phi3Config(
        **SMALL, pad_token_id=0, original_max_position_embeddings=64, rope_parameters={**LONG, **more}
    )


CASES = {
    "default": (LlamaConfig(rope_parameters=THETA), {"rope_theta": 123.0}),
    "llama3": (
        LlamaConfig(rope_parameters=tiny.LLAMA3),
        {"rope_theta": 5e5, "rope_scaling": {k: v for k, v in tiny.LLAMA3.items() if k != "rope_theta"}},
    ),
    "gpt-neox": (
        GPTNeoXConfig(rope_parameters={**THETA, "partial_rotary_factor": 0.5}),
        {"rotary_emb_base": 123.0, "rotary_pct": 0.5},
    ),
    "gemma3": (
        Gemma3TextConfig(
            rope_parameters={"full_attention": THETA, "sliding_attention": {**THETA, "rope_theta": 7.0}}
        ),
        {"rope_theta": 123.0, "rope_local_base_freq": 7.0},
    ),
    "phi3": (
        phi3(),
        {
            "rope_theta": 1e4,
            "partial_rotary_factor": 1.0,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 24, "long_factor": [2.0] * 24},
        },
    ),
    "phi3, with what the older name has no room for": (
        phi3(attention_factor=1.5),
        {"rope_theta": 1e4, "partial_rotary_factor": 1.0},
    ),
    "opt": (OPTConfig(), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_fields_of_rope_under_both_names_are_read_as_one(name, tmp_path):
    config, fields = CASES[name]
    assert rope_fields(config) == fields
    written = {**config.to_dict(), **fields}
    (tmp_path / "config.json").write_text(json.dumps(written))
    again = AutoConfig.from_pretrained(tmp_path)
    parameters = dict(getattr(again, "rope_parameters", None) or {})
    parameters.pop("type", None)
    assert parameters == (getattr(config, "rope_parameters", None) or {})
    assert rope_fields(again) == fields


@pytest.mark.parametrize("layout", ["uniform", "nemotron-nas"])
def test_checkpoints_have_them(layout, tmp_path, number_tokenizer):
    model = tiny.FAMILIES["llama-gqa"]()
    model.config.rope_parameters["rope_theta"] = 500.0
    save(model, tmp_path / "model", layout=layout, tokenizer=number_tokenizer)
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 500.0
    tokenizer = json.loads((tmp_path / "model/tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    again = load_model(str(tmp_path / "model"))
    assert isinstance(again.tokenizer, PreTrainedTokenizerFast)
    assert again.model.config.rope_parameters["rope_theta"] == 500.0


def test_layers_of_different_width_need_no_older_names(tmp_path):
    model = tiny.FAMILIES["llama-gqa"]()
    prune(model, compose("random", skip_layers=2), 0.2)
    save(model, tmp_path / "model")
    assert "rope_theta" not in json.loads((tmp_path / "model/config.json").read_text())
