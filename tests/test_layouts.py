"""Layouts for engines: what they hold, what they refuse, and that they open again as the same model."""

import json

import pytest
import torch
from tiny import FAMILIES, token_ids
from transformers import AutoConfig

from probeprune import compose, find_blocks, load_model, prune, save, with_equal_heads
from probeprune.engines.wishes import ENGINES
from probeprune.errors import UsageError
from probeprune.methods import METHODS, for_layout

IDS = token_ids(3, 20)
LIKE_LLAMA = ["llama", "llama-gqa", "llama-bias", "mistral", "qwen2"]


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def cut(family, method="random", ratio=0.3, **kwargs):
    """A model with the same heads in all layers, and a narrower MLP in the last one."""
    model = FAMILIES[family]()
    if family == "mistral":
        model.config.sliding_window = None
    prune(model, with_equal_heads(compose(method, round_to=1)), ratio, **kwargs)
    prune(model, compose("random", blocks=("mlp",), skip_layers=len(model.model.layers) - 1), 0.05)
    return model


def widths(model, kind):
    return [b.units for b in find_blocks(model) if b.kind == kind]


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "flap"])
@pytest.mark.parametrize("family", LIKE_LLAMA)
def test_heads_alike_and_a_width_for_each_mlp(family, bias, tmp_path, number_tokenizer):
    model = cut(family, "flap", calibration=IDS) if bias else cut(family)
    assert len(set(widths(model, "mlp"))) > 1 and len(set(widths(model, "attention"))) == 1
    heads = next(b for b in find_blocks(model) if b.kind == "attention")
    if bias and model.config.hidden_size % heads.query_heads:
        with pytest.raises(UsageError, match=r"nemotron-nas cannot hold.*not a multiple"):
            save(model, tmp_path / "out", tokenizer=number_tokenizer, layout="nemotron-nas")
        return
    save(model, tmp_path / "out", tokenizer=number_tokenizer, layout="nemotron-nas")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["model_type"] == "nemotron-nas" and config["architectures"] == ["DeciLMForCausalLM"]
    assert [b["ffn"]["intermediate_size"] for b in config["block_configs"]] == widths(model, "mlp")
    assert config["num_attention_heads"] == heads.query_heads and config["head_dim"] == heads.head_dim
    assert {b["attention"]["n_heads_in_group"] for b in config["block_configs"]} == {heads.group_size}
    assert not (tmp_path / "out/modeling_pruned.py").exists()
    loaded = load_model(str(tmp_path / "out"), dtype="float32").model
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
    assert widths(loaded, "mlp") == widths(model, "mlp")
    # What an engine does: the config class beside the weights, its blocks read as attributes.
    read = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(read).__name__ == "DeciLMConfig"
    assert [b.ffn.intermediate_size for b in read.block_configs] == widths(model, "mlp")
    assert not any(b.attention.no_op or b.ffn.no_op or hasattr(b.ffn, "ffn_mult") for b in read.block_configs)
    read.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again/config.json").read_text())
    assert again["block_configs"] == config["block_configs"]


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("qwen3", "does not compute what LLaMA does"),
        ("gemma2", "does not compute what LLaMA does"),
        ("opt", "does not compute what LLaMA does"),
        ("phi3", "does not compute what LLaMA does"),
    ],
)
def test_other_families_are_refused(family, reason, tmp_path):
    with pytest.raises(UsageError, match=rf"nemotron-nas cannot hold this model .*{reason}"):
        save(FAMILIES[family](), tmp_path / "out", layout="nemotron-nas")
    assert not list(tmp_path.iterdir())


def test_heads_that_differ_and_sliding_windows_are_refused(tmp_path):
    model = FAMILIES["llama"]()
    prune(model, compose("random", skip_layers=2), 0.2)
    with pytest.raises(UsageError, match=r"different numbers of heads.*with_equal_heads"):
        save(model, tmp_path / "out", layout="nemotron-nas")
    model = FAMILIES["mistral"]()
    model.config.sliding_window = 16
    with pytest.raises(UsageError, match="has a sliding window"):
        save(model, tmp_path / "out", layout="nemotron-nas")


@pytest.mark.parametrize(
    "blocks",
    [
        None,
        [],
        [{"attention": {"n_heads_in_group": 1}, "ffn": {"intermediate_size": 0}}] * 6,
        [{"attention": {"n_heads_in_group": 1, "no_op": True}, "ffn": {"intermediate_size": 8}}] * 6,
        [{"attention": {"n_heads_in_group": 1}, "ffn": {"ffn_mult": 2.0}}] * 6,
        ["block"] * 6,
    ],
    ids=["none", "empty", "no width", "no attention", "multiplier", "text"],
)
def test_blocks_that_cannot_be_opened_are_one_sentence(blocks, tmp_path, number_tokenizer):
    model = cut("llama-gqa")
    save(model, tmp_path / "out", tokenizer=number_tokenizer, layout="nemotron-nas")
    file = tmp_path / "out/config.json"
    config = json.loads(file.read_text())
    if isinstance(blocks, list):
        blocks = blocks[: config["num_hidden_layers"]]
    file.write_text(json.dumps({**config, "block_configs": blocks}))
    with pytest.raises(UsageError) as error:
        load_model(str(tmp_path / "out"))
    assert "config.json" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", [m.name for m in METHODS.values() if m.when.kind == "once"])
def test_every_method_can_have_the_widths_that_a_layout_needs(name):
    assert for_layout(name, "per-layer") == METHODS[name]
    for layout in ("uniform", "nemotron-nas"):
        method = for_layout(name, layout)
        assert method.name == name and method.skip_layers == 0
        assert for_layout(method, layout) == method
    assert for_layout(for_layout(name, "uniform"), "nemotron-nas") == for_layout(name, "nemotron-nas")


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_sets_layout_and_rounding(engine):
    from probeprune.cli.groups import WidthOptions

    wish = ENGINES[engine]
    options = WidthOptions(engine=engine)
    assert (options.checked_layout(), options.rounding()) == (wish.layout, wish.round_to)
    own = WidthOptions(engine=engine, layout="per-layer", round_to=8)
    assert (own.checked_layout(), own.rounding()) == ("per-layer", 8)
    assert wish.round_to % 32 == 0
    with pytest.raises(UsageError, match="unknown engine 'llama'"):
        WidthOptions(engine="llama").checked_layout()
