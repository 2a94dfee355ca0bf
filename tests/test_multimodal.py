"""A multimodal model's language model is pruned as it is alone; what reads images stays, bit for bit."""

import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import tiny_multimodal
import torch
from short_training import HELD_OUT, SHORT, TEXT
from test_cost import outside_blocks
from test_families import (
    BALANCED,
    DENSE_FIRST,
    PROBE,
    RATIO,
    TOLD,
    WINDOWS,
    balanced,
    check_checkpoint,
    check_flops,
    even,
)
from tiny import close, kept, masked, opened, snapshot
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, LlavaForConditionalGeneration

from probeprune import attach, compose, find_blocks, prune, save
from probeprune.cli import app, run
from probeprune.engines.gguf_plan import plan
from probeprune.errors import Notice, UsageError
from probeprune.model import placing
from probeprune.model.decoding import next_token_logits
from probeprune.model.experts import find_stacks
from probeprune.model.families import find_family
from probeprune.model.footprint import Phase, weights_of
from probeprune.model.loading import load_model
from probeprune.model.multimodal import MULTIMODAL, multimodal_of
from probeprune.model.offloading import is_offloaded
from probeprune.model.passes import find_decoder
from probeprune.training.distilling import say_unlike
from probeprune.training.recovery import merged, recover

pytestmark = pytest.mark.filterwarnings("ignore:no head of 4 of 6 attention blocks")


@pytest.fixture(scope="module", params=tiny_multimodal.ROWS)
def row(request):
    """The name of a row, its model, a batch with images, and the model's logits on it."""
    model = tiny_multimodal.build(request.param)()
    batch = tiny_multimodal.batch_of(request.param)
    return request.param, model, batch, seen(model, batch)


def seen(model, batch) -> torch.Tensor:
    """Logits of the real tokens of a batch with images."""
    with torch.no_grad():
        return model(**batch).logits[batch["attention_mask"].bool()]


def written(model, batch, **changes) -> torch.Tensor:
    """Tokens that the model writes behind the batch."""
    return model.generate(**batch, **{**TOLD, **changes})


def beside_text(model) -> dict[str, torch.Tensor]:
    """The tensors of a model that are not of its decoder layers."""
    layers = f"{find_family(model).layers}."
    return {n: t for n, t in model.state_dict().items() if not n.startswith(layers)}


def test_every_class_has_a_tiny_model():
    types = {name.split()[0] for name in (*tiny_multimodal.ROWS, *tiny_multimodal.SPARSE)}
    assert types == {t for m in MULTIMODAL for t in m.model_types}


def test_blocks_are_those_of_the_language_model(row):
    _, model, _, _ = row
    blocks = find_blocks(model)
    text = multimodal_of(model.config.model_type).text
    layers = model.config.text_config.num_hidden_layers
    kinds = 3 if any(b.kind == "mixer" and b.norm is None for b in blocks) else 2
    assert len(blocks) == kinds * layers
    assert all(b.name.startswith(f"{text}.layers.{b.layer}.") for b in blocks)
    ids = WINDOWS[:2]
    with torch.no_grad():
        hidden = find_decoder(model)(input_ids=ids, use_cache=False)[0]
        close(next_token_logits(model, hidden), model(input_ids=ids).logits)


@pytest.mark.parametrize("method", [PROBE, BALANCED], ids=lambda m: m.name)
def test_a_batch_with_images_is_the_dense_model_masked_and_detaching_restores_all_bits(row, method):
    _, model, batch, dense = row
    method = balanced(model) if method is BALANCED else method
    # Qwen's classes note on themselves how far an image has moved positions, in every pass.
    before, beside = snapshot(find_decoder(model)), {n: t.clone() for n, t in beside_text(model).items()}
    with attach(model, method, RATIO, calibration=WINDOWS) as handle:
        got, choice = seen(model, batch), kept(handle)
        assert any(len(units) < b.units for b, units in choice if b.kind == "attention")
        cached, prompted = written(model, batch), kept(handle)
    before.assert_untouched()
    assert all(t.equal(beside[n]) for n, t in beside_text(model).items())
    with masked(choice):
        close(got, seen(model, batch))
    with masked(prompted):
        assert cached.equal(written(model, batch))
    assert (got - dense).abs().max() > 0.01 * dense.abs().max(), "nothing was pruned"
    assert seen(model, batch).equal(dense)


def test_flops_counted_are_those_of_the_formulas(row):
    _, model, _, _ = row
    rest = outside_blocks(model, 3)
    assert rest >= 0
    check_flops(model, rest)


def test_a_cut_model_and_its_checkpoints_are_the_dense_one_masked(row, tmp_path):
    name, model, batch, _ = row
    both = find_family(model).attention.plain_heads
    auto, build = AutoModelForImageTextToText, tiny_multimodal.build(name)
    cuts = ((even(both), RATIO if both else 0.25, "uniform"), (DENSE_FIRST, 0.35, None))
    for method, ratio, layout in cuts:
        folder = tmp_path / method.name.replace(" ", "-")
        smaller, loaded = check_checkpoint(
            model, build, lambda m: seen(m, batch), method, ratio, folder, layout, auto
        )
        assert all(t.equal(loaded.get_parameter(n)) for n, t in beside_text(model).items() if "weight" in n)
    assert written(loaded, batch).equal(written(smaller, batch))


@pytest.mark.parametrize("unit", ["channel", "expert"])
def test_experts_beside_an_mlp_go_too(unit, tmp_path, monkeypatch):
    changes = {"enable_moe_block": True, "num_experts": 6, "top_k_experts": 2, "moe_intermediate_size": 16}
    row = tiny_multimodal.ROWS["gemma4"]
    moe = {**row, "text_config": {**row["text_config"], **changes}}
    monkeypatch.setitem(tiny_multimodal.ROWS, "gemma4", moe)
    model, batch = tiny_multimodal.build("gemma4")(), tiny_multimodal.batch_of("gemma4")
    before = {s.name: s.units for s in find_stacks(model, unit)}
    assert len(before) == 3
    method = compose("magnitude", skip_layers=0, blocks=("experts",), experts=unit, allocation="even")
    method = compose(method, expert_importance="magnitude")
    prune(model, method, 0.1)
    assert all(s.units < before[s.name] for s in find_stacks(model, unit))
    save(model, tmp_path / "out", layout="uniform")
    assert not (tmp_path / "out" / "modeling_pruned.py").exists()
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    close(seen(loaded, batch), seen(model, batch))


@pytest.fixture(scope="module")
def llava(tmp_path_factory, number_tokenizer):
    """A folder with a tiny LLaVA, its tokenizer and the files of its processor."""
    folder = tmp_path_factory.mktemp("llava") / "model"
    save(tiny_multimodal.build("llava")(), folder, tokenizer=number_tokenizer)
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "CLIPImageProcessor"}')
    (folder / "processor_config.json").write_text('{"patch_size": 6, "processor_class": "LlavaProcessor"}')
    return folder


def test_a_folder_opens_with_its_own_class_and_its_processor_comes_along(llava, tmp_path):
    loaded = load_model(str(llava), dtype="float32", device="cpu")
    assert type(loaded.model) is LlavaForConditionalGeneration
    prune(loaded.model, DENSE_FIRST, 0.35)
    save(loaded.model, tmp_path / "out", tokenizer=loaded.tokenizer)
    for name in ("preprocessor_config.json", "processor_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (llava / name).read_bytes()
    again = load_model(str(tmp_path / "out"), dtype="float32", device="cpu")
    batch = tiny_multimodal.batch_of("llava")
    assert seen(again.model, batch).equal(seen(loaded.model, batch))
    opens = (
        "import sys, torch; sys.modules['probeprune'] = None; from transformers import "
        "AutoModelForImageTextToText as Auto; m = Auto.from_pretrained(sys.argv[1], trust_remote_code=True, "
        "dtype=torch.float32).eval(); print(float(m(torch.arange(9)[None] + 3).logits.double().sum()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", opens, str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "hf")},
    )
    with torch.no_grad():
        here = loaded.model(torch.arange(9)[None] + 3).logits.double().sum()
    assert float(done.stdout) == pytest.approx(float(here), abs=1e-6)


def test_a_layer_at_a_time_is_the_model_in_memory(llava, tmp_path, monkeypatch):
    monkeypatch.setattr(placing, "in_use", lambda device: (0, 1 << 40))
    monkeypatch.setattr(placing, "retained", lambda device: 0)
    weights = weights_of(tiny_multimodal.build("llava")(), torch.float32)
    least = weights.rest + weights.largest + 2 * weights.tensor
    with pytest.warns(Notice, match="the layers stay on disk"):
        there = load_model(
            str(llava), dtype="float32", device="cpu", memory=least, work=lambda *_: [Phase("none", 0)]
        )
    here = load_model(str(llava), dtype="float32", device="cpu")
    assert is_offloaded(there.model)
    for loaded, name in ((there, "there"), (here, "here")):
        prune(loaded.model, compose("flap", skip_layers=1), 0.3, calibration=WINDOWS)
        save(loaded.model, tmp_path / name)
    first, second = (
        opened(tmp_path / n, AutoModelForImageTextToText, dtype=torch.float32) for n in ("there", "here")
    )
    assert first.state_dict().keys() == second.state_dict().keys()
    assert all(t.equal(second.state_dict()[n]) for n, t in first.state_dict().items())


def test_an_unknown_language_model_is_refused_in_one_sentence():
    config = tiny_multimodal.config_of("llava")
    config.text_config = CONFIG_MAPPING["gpt2"](n_embd=48, n_layer=2, n_head=2, vocab_size=128)
    model = AutoModelForImageTextToText.from_config(config).eval()
    sentence = (
        "the language model inside LlavaForConditionalGeneration is of type 'gpt2', and it is supported "
    )
    with pytest.raises(UsageError, match=f"{sentence}with llama, mistral, qwen2 alone"):
        find_blocks(model)


def test_no_gguf_file_holds_a_multimodal_model():
    with pytest.raises(UsageError, match="a GGUF file holds a language model alone"):
        plan(tiny_multimodal.build("llava")(), "f16")


def test_a_plan_says_what_a_multimodal_model_takes(llava, capsys):
    asked = ["plan", str(llava), "--method", "flap", "--ratio", "0.3", "--round-to", "1", "--json"]
    assert run(lambda: app(asked)) == 0
    found = json.loads(capsys.readouterr().out)
    model = tiny_multimodal.build("llava")()
    assert found["before"]["parameters"] == model.num_parameters()


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_recovery_trains_the_language_model_alone(kind, tmp_path):
    model = tiny_multimodal.build("llava")()
    prune(model, DENSE_FIRST, 0.35)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        say_unlike(model, tiny_multimodal.build("llava")())  # which it was pruned from
    before = {n: t.clone() for n, t in model.state_dict().items()}
    training = replace(SHORT, steps=2) if kind == "lora" else replace(SHORT, steps=2, lora=None)
    after = merged(recover(model, TEXT, HELD_OUT, training, tmp_path / "work").model).state_dict()
    moved = {n for n, t in before.items() if not t.equal(after[n])}
    assert moved and not any("vision" in n or "projector" in n for n in moved)
    save(model, tmp_path / "out")
    again = opened(tmp_path / "out", AutoModelForImageTextToText, dtype=torch.float32)
    assert all(t.equal(again.state_dict()[n]) for n, t in after.items())
