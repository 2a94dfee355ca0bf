"""Checkpoints: same logits and bytes after a round trip, with and without this package, or nothing at all."""

import io
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from forked import Forked
from safetensors.torch import load_file
from tiny import FAMILIES, LLAMA3, SHAPE, opened, token_ids
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from probeprune import compose, find_blocks, load_model, prune, save, with_equal_widths
from probeprune.errors import UsageError
from probeprune.model import checkpoint, modeling_pruned
from probeprune.model.described import export
from probeprune.model.modeling_pruned import pruned_config

IDS = token_ids(3, 20)

OPENED = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
for line in sys.stdin:
    path, trust = json.loads(line)
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=trust).eval()
    ids = torch.load(path + "/../ids.pt", weights_only=True)
    with torch.no_grad():
        torch.save(model(ids).logits, path + "/../logits.pt")
    tokens = model.generate(ids[:, :6], max_new_tokens=5, do_sample=False, pad_token_id=0)
    plain = model.generate(ids[:, :6], max_new_tokens=5, do_sample=False, pad_token_id=0, use_cache=False)
    model.save_pretrained(path + "/../again")
    print(json.dumps([type(model).__name__, type(model).__module__, tokens.equal(plain)]))
"""


def pruned(family: str, layout: str):
    """A pruned model; `per-layer` leaves layers dense, `uniform` cuts all alike, `mlp` cuts MLPs alone."""
    model = FAMILIES[family]()
    if layout == "per-layer":
        prune(model, compose("random", skip_layers=2), 0.4 if family == "gemma3" else 0.2)
    else:
        blocks = ("mlp",) if layout == "mlp" else ("attention", "mlp")
        prune(model, compose(with_equal_widths("random"), blocks=blocks), 0.2)
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("layout", ["per-layer", "uniform", "mlp"])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(family, layout, tmp_path):
    model = pruned(family, layout)
    exported = save(model, tmp_path / "one")
    expected = logits(model)
    assert logits(exported).equal(expected)
    loaded = opened(tmp_path / "one")
    assert logits(loaded).equal(expected)
    # No config can hold OPT's and GPT-NeoX's head size apart from the head count.
    tied = layout != "mlp" and family.startswith(("opt", "gpt"))
    kind = "Pruned" if tied else "PerLayer" if layout == "per-layer" else ""
    own_names = [kind for kind in ("Pruned", "PerLayer") if type(loaded).__name__.startswith(kind)]
    assert own_names == ([kind] if kind else [])
    assert (tmp_path / "one/modeling_pruned.py").exists() == bool(kind)
    # Saved again, by transformers and by us: the same bytes of weights.
    loaded.save_pretrained(tmp_path / "two")
    save(loaded, tmp_path / "three")
    weights = (tmp_path / "one/model.safetensors").read_bytes()
    assert weights == (tmp_path / "two/model.safetensors").read_bytes()
    assert weights == (tmp_path / "three/model.safetensors").read_bytes()
    config = json.loads((tmp_path / "one/config.json").read_text())
    assert config == json.loads((tmp_path / "three/config.json").read_text())
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".bin", ".pt", ".pkl", ".pth")]
    # Found in the loaded model, and pruned again.
    assert [b.units for b in find_blocks(loaded)] == [b.units for b in find_blocks(model)]
    prune(loaded, compose("magnitude", skip_layers=3), 0.1)
    save(loaded, tmp_path / "four")
    assert logits(opened(tmp_path / "four")).equal(logits(loaded))


def open_without(lines: str, folder: Path) -> tuple[int, str, str]:
    """Exit code, output and errors of `OPENED` where importing the package fails."""
    done = subprocess.run(
        [sys.executable, "-c", f'import sys; sys.modules["probeprune"] = None\n{OPENED}'],
        input=lines,
        capture_output=True,
        text=True,
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "PATH": "/usr/bin:/bin"},
        cwd=folder,
    )
    return done.returncode, done.stdout, done.stderr


def open_with(lines: str, folder: Path) -> tuple[int, str, str]:
    """The same where it was imported."""
    return Forked(opening, lines).ended()


def opening(lines: str) -> None:
    import probeprune  # noqa: F401

    sys.stdin = io.StringIO(lines)
    exec(OPENED, {})


@pytest.mark.parametrize("package", ["with", "without"])
def test_new_processes_open_it_with_and_without_the_package(package, tmp_path):
    cases = [
        ("llama", "uniform"),
        ("llama-gqa", "per-layer"),
        ("llama", "per-layer"),
        ("opt", "per-layer"),
        ("opt", "mlp"),
        ("phi3-gqa", "per-layer"),
        ("gpt-neox", "uniform"),
    ]
    expected, lines = [], []
    for i, (family, layout) in enumerate(cases):
        folder = tmp_path / str(i)
        model = pruned(family, layout)
        save(model, folder / "model")
        torch.save(IDS, folder / "ids.pt")
        expected.append(logits(model))
        own = (folder / "model/modeling_pruned.py").exists()
        # The package registers model types of its own; a family's own needs the file beside the weights.
        model_type = json.loads((folder / "model/config.json").read_text())["model_type"]
        trust = own and (package == "without" or model_type == family_of(family))
        lines.append(json.dumps([str(folder / "model"), trust]))
    code, output, errors = (open_with if package == "with" else open_without)("\n".join(lines), tmp_path)
    assert code == 0, errors
    answers = [json.loads(line) for line in output.splitlines()]
    assert len(answers) == len(cases)
    for i, (_, module, cache_agrees) in enumerate(answers):
        got = torch.load(tmp_path / str(i) / "logits.pt", weights_only=True)
        torch.testing.assert_close(got, expected[i], rtol=1e-5, atol=1e-5)
        assert cache_agrees
        assert (tmp_path / str(i) / "model/model.safetensors").read_bytes() == (
            tmp_path / str(i) / "again/model.safetensors"
        ).read_bytes()
        if package == "without":
            assert not module.startswith("probeprune")
    assert answers[0][0] == "MistralForCausalLM" and answers[1][0] == "PerLayerLlamaForCausalLM"


def family_of(name):
    return FAMILIES[name]().config.model_type


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi3"])
def test_a_per_layer_config_is_the_one_of_transformers(family, tmp_path):
    """Its keys, by layer, are fields of the family's config, under the family's model type."""
    model = pruned(family, "per-layer")
    save(model, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["model_type"] == family_of(family) and "pruned" not in config
    width = {b.layer: b.units for b in find_blocks(model) if b.kind == "mlp"}
    heads = {b.layer: (b.query_heads, b.kv_heads) for b in find_blocks(model) if b.kind == "attention"}
    layers = {int(i): own for i, own in config["per_layer_config"].items()}
    assert 2 in layers and 0 not in layers
    for i in width:
        fields = {**config, **layers.get(i, {})}
        assert fields["intermediate_size"] == width[i]
        assert (fields["num_attention_heads"], fields["num_key_value_heads"]) == heads[i]
    # Without our file nothing opens it with other widths: transformers says what it cannot read.
    with pytest.raises(Exception, match=r"per-layer attribute|not a multiple"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_transformers_that_is_too_old_is_one_sentence(monkeypatch):
    monkeypatch.setattr(transformers, "PretrainedConfig", object)
    with pytest.raises(ImportError, match=r"needs transformers 5\.14 or newer, and this is"):
        runpy.run_path(modeling_pruned.__file__)


def test_layers_with_different_heads_open_with_their_tokenizer(tmp_path, number_tokenizer):
    """Transformers finds the tokenizer's class by the config, and refuses heads that differ in LLaMA's."""
    model = pruned("llama", "per-layer")
    save(model, tmp_path / "out", tokenizer=number_tokenizer)
    loaded = load_model(str(tmp_path / "out"), dtype="float32")
    assert logits(loaded.model).equal(logits(model))
    assert loaded.tokenizer("7 8 9")["input_ids"] == number_tokenizer("7 8 9")["input_ids"]


def test_a_layer_reads_its_own_fields_and_the_model_s_attention():
    model = export(pruned("phi3", "per-layer"))
    attention = model.model.layers[2].self_attn
    assert (
        attention.config.num_attention_heads == 4
        and model.model.layers[0].self_attn.config.num_attention_heads == 6
    )
    eager = logits(model)
    model.set_attn_implementation("eager")
    assert attention.config._attn_implementation == "eager"
    torch.testing.assert_close(logits(model), eager, rtol=1e-5, atol=1e-5)


def test_checkpoints_of_the_first_schema_open(tmp_path, number_tokenizer):
    """Their model type began with `pruned_`, and they listed the sizes of every module."""
    model = pruned("llama", "per-layer")
    save(model, tmp_path / "old", tokenizer=number_tokenizer)
    file = tmp_path / "old/config.json"
    config = json.loads(file.read_text())
    dense = FAMILIES["llama"]()
    sizes = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            theirs = dense.get_submodule(name)
            own = {
                s: getattr(module, s)
                for s in ("in_features", "out_features")
                if getattr(module, s) != getattr(theirs, s)
            }
            if own:
                sizes[name] = own
    del config["per_layer_config"]
    config |= {"model_type": "pruned_llama", "architectures": ["PrunedLlamaForCausalLM"], "pruned": sizes}
    config["auto_map"] = pruned_config(type(dense.config), "Pruned")().auto_map
    file.write_text(json.dumps(config))
    for loaded in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "old"),
        load_model(str(tmp_path / "old"), dtype="float32").model,
    ):
        assert type(loaded).__name__ == "PrunedLlamaForCausalLM" and logits(loaded.float()).equal(
            logits(model)
        )
    save(loaded, tmp_path / "new")
    assert "per_layer_config" in json.loads((tmp_path / "new/config.json").read_text())
    assert logits(opened(tmp_path / "new")).equal(logits(model))


def test_heads_that_do_not_divide_the_hidden_size_make_a_llama_a_mistral(tmp_path):
    model = pruned("llama", "uniform")
    heads = {b.query_heads for b in find_blocks(model) if b.kind == "attention"}
    assert heads == {5}, "48 is no multiple of 5"
    save(model, tmp_path / "out", layout="uniform")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["model_type"] == "mistral" and config["sliding_window"] is None
    assert config["num_attention_heads"] == 5 and config["head_dim"] == 8


def test_rotary_scaling_survives_the_change_of_family(tmp_path):
    torch.manual_seed(0)
    rope = {**LLAMA3, "original_max_position_embeddings": 16}
    shape = {**SHAPE, "num_key_value_heads": 6}
    model = LlamaForCausalLM(LlamaConfig(**shape, rope_parameters=rope, tie_word_embeddings=True)).eval()
    prune(model, with_equal_widths("random"), 0.2)
    save(model, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(loaded).__name__ == "MistralForCausalLM" and logits(loaded).equal(logits(model))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(tmp_path / "out/model.safetensors")


@pytest.mark.parametrize("family", ["llama-gqa", "opt", "gpt-neox"])
def test_biases_go_into_a_plain_config_where_it_has_room(family, tmp_path):
    model = FAMILIES[family]()
    calibration = IDS
    blocks = ("attention", "mlp") if family == "llama-gqa" else ("mlp",)
    prune(model, compose(with_equal_widths("flap"), blocks=blocks), 0.5, calibration=calibration)
    save(model, tmp_path / "out", layout="uniform")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not type(loaded).__name__.startswith("Pruned")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
    if family == "llama-gqa":
        assert loaded.config.attention_bias and loaded.config.mlp_bias


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "phi3"])
def test_a_bias_that_no_plain_config_holds_is_an_error_that_names_alternatives(family, tmp_path):
    model = FAMILIES[family]()
    prune(model, with_equal_widths("flap"), 0.2, calibration=IDS)
    with pytest.raises(UsageError, match=r"bias.*layout per-layer.*without compensation"):
        save(model, tmp_path / "out", layout="uniform")
    assert not list(tmp_path.iterdir())
    save(model, tmp_path / "out")
    loaded = opened(tmp_path / "out")
    assert type(loaded).__name__.startswith("Pruned") and logits(loaded).equal(logits(model))


def test_biases_of_whole_blocks_go_into_a_per_layer_config(tmp_path):
    """LLaMA's config has them for all maps of a block: those that had none get zeros."""
    model = FAMILIES["llama-gqa"]()
    prune(model, compose("flap", skip_layers=2), 0.3, calibration=IDS)
    save(model, tmp_path / "out", layout="per-layer")
    loaded = opened(tmp_path / "out")
    assert type(loaded).__name__ == "PerLayerLlamaForCausalLM"
    assert (
        loaded.model.layers[0].mlp.up_proj.bias is None
        and loaded.model.layers[3].mlp.up_proj.bias is not None
    )
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)


def test_layers_of_different_width_have_no_uniform_layout(tmp_path):
    with pytest.raises(UsageError, match="its layers have different widths"):
        save(pruned("llama", "per-layer"), tmp_path / "out", layout="uniform")
    with pytest.raises(UsageError, match="unknown layout"):
        save(pruned("llama", "uniform"), tmp_path / "out", layout="even")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
    # Five heads do not divide LLaMA's hidden size; Mistral's config has a head size of its own.
    assert type(export(pruned("llama", "uniform"), "per-layer")).__name__ == "PerLayerMistralForCausalLM"


def test_an_interrupted_save_leaves_nothing(tmp_path, monkeypatch):
    model = pruned("llama", "uniform")

    class Tokenizer:
        def save_pretrained(self, path):
            assert (path / "model.safetensors").exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save(model, tmp_path / "out", tokenizer=Tokenizer())
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    save(model, tmp_path / "out")
    assert (tmp_path / "out/config.json").exists() and len(list(tmp_path.iterdir())) == 1
    assert oct((tmp_path / "out").stat().st_mode)[-3:] != "700"


def test_a_directory_in_use_and_a_full_disk_are_refused(tmp_path, monkeypatch):
    model = pruned("llama", "uniform")
    (tmp_path / "used").mkdir()
    (tmp_path / "used/file").write_text("mine")
    for path in (tmp_path / "used", tmp_path / "used/file"):
        with pytest.raises(UsageError, match="exists and is not empty"):
            save(model, path)
    assert (tmp_path / "used/file").read_text() == "mine"
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UsageError, match=r"needs 0\.06 GiB and its disk has 0\.00 GiB left"):
        save(model, tmp_path / "deep/er/out")
    assert [p.name for p in tmp_path.iterdir()] == ["used"]


@pytest.mark.parametrize("damage", ["missing", "truncated", "garbage"])
@pytest.mark.parametrize("layout", ["uniform", "per-layer"])
def test_a_damaged_checkpoint_is_one_sentence(damage, layout, tmp_path, number_tokenizer):
    model = pruned("llama-gqa", layout)
    save(model, tmp_path / "out", tokenizer=number_tokenizer)
    # As large models come: in several files.
    export(model).save_pretrained(tmp_path / "out", max_shard_size="100KB")
    (tmp_path / "out/model.safetensors").unlink()
    assert logits(load_model(str(tmp_path / "out"), dtype="float32").model).equal(logits(model))
    shard = sorted((tmp_path / "out").glob("model-*.safetensors"))[1]
    if damage == "missing":
        shard.unlink()
    elif damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-1000])
    else:
        shard.write_bytes(b"nothing of the kind")
    with pytest.raises(UsageError, match="incomplete" if damage == "missing" else "is damaged") as error:
        load_model(str(tmp_path / "out"), dtype="float32")
    assert shard.name in str(error.value) and "\n" not in str(error.value)
