"""Damaged and foreign checkpoints: refused in one sentence that says what is wrong, or the same model."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, token_ids

from probeprune import compose, load_model, prune, save
from probeprune.errors import UsageError
from probeprune.model.folder import INDEX, WEIGHTS

IDS = token_ids(2, 12)
LAYER = "model.layers.1.mlp.down_proj.weight"
FAMILY_OF = {"plain": "llama-gqa", "per-layer": "llama-gqa", "opt": "opt", "gpt-neox": "gpt-neox"}


def logits(folder):
    with torch.no_grad():
        return load_model(str(folder), dtype="float32", device="cpu").model(IDS).logits


@pytest.fixture(scope="module")
def originals(tmp_path_factory, number_tokenizer):
    """By kind, a good checkpoint and its logits; `per-layer` has several files, as large models have."""
    folder, found = tmp_path_factory.mktemp("good"), {}
    for kind, family in FAMILY_OF.items():
        model = FAMILIES[family]()
        if kind == "per-layer":
            prune(model, compose("random", skip_layers=2), 0.2)
        exported = save(model, folder / kind, tokenizer=number_tokenizer)
        if kind == "per-layer":
            exported.save_pretrained(folder / kind, max_shard_size="60KB")
            (folder / kind / WEIGHTS).unlink()
        found[kind] = folder / kind, logits(folder / kind)
    return found


@pytest.fixture
def copy(originals, tmp_path):
    """Make a copy of a good checkpoint, to be spoilt."""
    return lambda kind="plain": Path(shutil.copytree(originals[kind][0], tmp_path / "model"))


def refused(folder, *named):
    """Opening ends in one sentence that has all these words."""
    with pytest.raises(UsageError) as error:
        load_model(str(folder), dtype="float32", device="cpu")
    text = str(error.value)
    assert "\n" not in text and text.endswith(".") and len(text) < 900, text
    for word in named:
        assert word in text, text
    return text


def refused_or_equal(folder, expected, *named):
    """Opening ends in one sentence that has one of these words, or gives the logits of the good model."""
    try:
        got = logits(folder)
    except UsageError as error:
        assert "\n" not in str(error) and any(word in str(error) for word in named), error
    else:
        assert got.equal(expected)


def edit(file, change):
    fields = json.loads(file.read_text())
    change(fields)
    file.write_text(json.dumps(fields))


# -- files ---------------------------------------------------------------------------------------------------

JSON_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
CONTENTS = {
    "empty": b"",
    "cut": b'{"model_type": "lla',
    "list": b"[]",
    "number": b"7",
    "null": b"null",
    "text": b'"llama"',
    "bad UTF-8": b'{"model_type": "\xff\xfe"}',
    "deep": b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "huge number": b'{"vocab_size": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("name", [*JSON_FILES, INDEX, "pruning.json", "training.json"])
def test_json_of_others(name, content, copy):
    folder = copy("per-layer")
    (folder / name).write_bytes(CONTENTS[content])
    refused(folder, name)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("what", ["directory", "fifo", "missing", "dangling link", "loop"])
def test_things_that_are_no_files(name, what, copy):
    folder = copy()
    file = folder / name
    file.unlink()
    if what == "directory":
        file.mkdir()
    elif what == "fifo":
        os.mkfifo(file)
    elif what != "missing":
        file.symlink_to(name if what == "loop" else "nowhere")
    # Without tokenizer.json, transformers says itself what it misses.
    refused(folder, "tokenizer" if name == "tokenizer.json" and what == "missing" else name.split(".")[-1])


@pytest.mark.parametrize("size", [0, 4, 8, 200, -1000, -1])
@pytest.mark.parametrize("kind", ["plain", "per-layer"])
def test_cut_weights(size, kind, copy):
    folder = copy(kind)
    file = sorted(folder.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[: size or None] if size else b"")
    refused(folder, file.name, "damaged")


@pytest.mark.parametrize("at", range(0, 8))
def test_a_flipped_byte_of_the_header(at, copy, originals):
    file = (folder := copy()) / WEIGHTS
    content = bytearray(file.read_bytes())
    content[at * 13] ^= 0x41
    file.write_bytes(content)
    refused_or_equal(folder, originals["plain"][1], WEIGHTS, "weights of model")


# -- outside of the folder -----------------------------------------------------------------------------------

OUTSIDE = ["../stolen.safetensors", "../../x.safetensors", "w.bin", "sub/x.safetensors", "x.pt", "", 7, None]
OUTSIDE += ["..\\x.safetensors", ["x.safetensors"], "x\0.safetensors"]


@pytest.mark.parametrize("shard", OUTSIDE, ids=repr)
@pytest.mark.parametrize("kind", ["plain", "per-layer"])
def test_a_shard_is_a_plain_name_inside_the_folder(shard, kind, copy, monkeypatch):
    folder = copy(kind)
    taken = sorted(folder.glob("*.safetensors"))[0]
    shutil.copy(taken, folder.parent / "stolen.safetensors")
    names = {name: taken.name for name in load_file(taken)}
    names[next(iter(names))] = shard
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    (folder / WEIGHTS).unlink(missing_ok=True)
    monkeypatch.setattr("probeprune.model.folder.safe_open", None)  # nothing is opened
    refused(folder, INDEX, repr(shard))


def test_an_absolute_path_in_the_index_or_the_config(copy):
    folder = copy()
    stolen = str(shutil.copy(folder / WEIGHTS, folder.parent / "stolen.safetensors"))
    edit(folder / "config.json", lambda c: c.update(transformers_weights=stolen))
    refused(folder, "config.json", stolen)
    edit(folder / "config.json", lambda c: c.pop("transformers_weights"))
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(load_file(stolen), stolen)}))
    (folder / WEIGHTS).unlink()
    refused(folder, INDEX, stolen)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", WEIGHTS, "pruning.json"])
def test_a_symlink_out_of_the_folder(name, copy):
    folder = copy()
    target = folder.parent / "elsewhere"
    if name == "pruning.json":
        target.write_text("{}")
    else:
        (folder / name).rename(target)
    (folder / name).symlink_to(target)
    refused(folder, name, "symlink")


@pytest.mark.parametrize("weight_map", [None, {}, [], "x"])
def test_an_index_without_names(weight_map, copy):
    folder = copy("per-layer")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    refused(folder, INDEX)


@pytest.fixture
def hub_cache(originals, tmp_path, monkeypatch):
    """A model in the hub's cache, as downloads leave it: links in `snapshots` to files in `blobs`."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    home = tmp_path / "models--owner--name"
    snapshot = home / "snapshots" / ("a" * 40)
    for folder in (home / "blobs", home / "refs", snapshot):
        folder.mkdir(parents=True)
    (home / "refs/main").write_text("a" * 40)
    for number, file in enumerate(sorted(originals["per-layer"][0].iterdir())):
        shutil.copy(file, home / f"blobs/{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    return snapshot


def test_a_model_of_the_hub_opens_from_its_cache(hub_cache, originals):
    assert logits("owner/name").equal(originals["per-layer"][1])
    assert load_model("owner/name", dtype="float32").name == "owner/name"


def test_a_model_of_the_hub_may_not_reach_out_either(hub_cache):
    index = json.loads((hub_cache / INDEX).read_text())
    index["weight_map"][LAYER] = "../../../../stolen.safetensors"
    (hub_cache / INDEX).unlink()
    (hub_cache / INDEX).write_text(json.dumps(index))
    refused("owner/name", INDEX, "stolen")


@pytest.mark.parametrize("config", ["with", "without"])
def test_adapters_are_no_models(config, copy):
    folder = copy()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "../other"}')
    if config == "without":
        (folder / "config.json").unlink()
    refused(folder, "is an adapter, not a model")


# -- tensors -------------------------------------------------------------------------------------------------


def rewrite(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def retype(name, dtype):
    return lambda t: t.update({name: t[name].to(dtype)})


NO_FLOATS = [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.int64, torch.bool]
NO_FLOATS.append(torch.complex64)


@pytest.mark.parametrize("dtype", NO_FLOATS, ids=str)
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", LAYER, "model.norm.weight"])
def test_weights_that_are_no_floats(name, dtype, copy):
    folder = copy()
    rewrite(folder, retype(name, dtype))
    refused(folder, name, WEIGHTS, "floating-point")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_floats_of_any_width_are_opened(dtype, copy, originals):
    folder = copy()
    rewrite(folder, lambda t: t.update({k: v.to(dtype) for k, v in t.items()}))
    assert logits(folder).equal(originals["plain"][1])


def layer(number, tensors):
    return [k for k in tensors if f".layers.{number}." in k]


TENSORS = {
    "a bias": (lambda t: t.update({LAYER.replace("weight", "bias"): torch.ones(48)}), "down_proj.bias"),
    "another layer": (
        lambda t: t.update({k.replace("s.4.", "s.5."): t[k].clone() for k in layer(4, t)}),
        "model.layers.5",
    ),
    "an expert": (
        lambda t: t.update({"model.layers.1.mlp.experts.0.w1": torch.ones(3, 3)}),
        "mlp.experts.0.w1",
    ),
    "scales": (lambda t: t.update({f"{LAYER}_scale": torch.ones(1)}), "_scale"),
    "integers": (lambda t: t.update({"qzeros": torch.ones(1, dtype=torch.int32)}), "qzeros"),
    "one missing": (lambda t: t.pop(LAYER), LAYER),
    "a head missing": (lambda t: t.pop("lm_head.weight"), "lm_head.weight"),
    "a layer missing": (lambda t: [t.pop(k) for k in layer(2, t)], "model.layers.2"),
    "the last layer missing": (lambda t: [t.pop(k) for k in layer(4, t)], "model.layers.4"),
    "all missing": (lambda t: t.clear(), "tensors"),
    "turned": (lambda t: t.update({LAYER: t[LAYER].T.contiguous()}), LAYER),
    "flat": (lambda t: t.update({LAYER: t[LAYER].flatten()}), LAYER),
    "cut": (lambda t: t.update({LAYER: t[LAYER][:-1].clone()}), LAYER),
    "no numbers": (lambda t: t.update({LAYER: torch.empty(0)}), LAYER),
    "a wider embedding": (lambda t: t.update({"lm_head.weight": torch.ones(200, 48)}), "lm_head.weight"),
    "another name": (lambda t: t.update({"x.weight": t.pop(LAYER)}), "x.weight"),
}


@pytest.mark.parametrize("what", TENSORS)
def test_tensors_are_exactly_those_of_the_config(what, copy):
    folder = copy()
    change, named = TENSORS[what]
    rewrite(folder, change)
    refused(folder, named)


@pytest.mark.parametrize("kind", ["plain", "gpt-neox"])
def test_buffers_that_families_no_longer_store_are_fine(kind, copy, originals):
    more = {
        "plain": {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
        "gpt-neox": {
            "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool),
            "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9),
            "gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(2),
        },
    }[kind]
    folder = copy(kind)
    rewrite(folder, lambda t: t.update(more))
    assert logits(folder).equal(originals[kind][1])


def test_a_tensor_in_two_files(copy):
    folder = copy("per-layer")
    one, two = sorted(folder.glob("*.safetensors"))[:2]
    tensors = load_file(one)
    save_file({**load_file(two), next(iter(tensors)): next(iter(tensors.values()))}, two)
    refused(folder, one.name, two.name, next(iter(tensors)))


# -- fields --------------------------------------------------------------------------------------------------

BAD = (0, -1, 2.5, "6", "x", [], {}, 10**9, 10**30, 1e300)
COUNTS = {
    "plain": "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "head_dim vocab_size",
    "per-layer": "hidden_size intermediate_size num_hidden_layers num_key_value_heads head_dim vocab_size",
    "opt": "hidden_size ffn_dim num_hidden_layers num_attention_heads vocab_size max_position_embeddings",
    "gpt-neox": "hidden_size intermediate_size num_hidden_layers num_attention_heads vocab_size",
}
FIELDS = [(kind, field) for kind, fields in COUNTS.items() for field in fields.split()]


@pytest.mark.parametrize("kind,field", FIELDS)
def test_counts_of_a_config(kind, field, copy):
    """Each of them changes shapes, so a wrong one is seen, whatever its value."""
    folder = copy(kind)
    original = (folder / "config.json").read_text()
    for value in (*BAD, None, json.loads(original).get(field, 1) + 1):
        (folder / "config.json").write_text(json.dumps({**json.loads(original), field: value}))
        if value is None and field in ("num_key_value_heads", "head_dim"):
            continue  # stands for a default
        refused(folder, "config.json" if type(value) is not int or value < 1 else "model")


OTHERS = {
    "rms_norm_eps": (None, 0, -1, "x", [], True),
    "max_position_embeddings": (None, 0, -1, 2.5, "x", 10**30),
    "hidden_act": ("no such function", 7, [], {}),
    "tie_word_embeddings": ("no", 1, None, []),
    "attention_bias": ("no", 1, [], True),
    "mlp_bias": ("no", 1, [], True),
    "attention_dropout": (-1, 2, "x", None),
    "rope_parameters": (7, [], "x", {"rope_type": "no such type"}, {"rope_type": 7}),
    "model_type": (None, 7, [], "", "no such type"),
    "pad_token_id": (10**9, "x", -7, 2.5, {}),
    "eos_token_id": ("x", 2.5, {}, ["x"], 10**30),
    "dtype": ("no such type", 7, []),
    "initializer_range": ("x", -1, None),
    "use_cache": ("x", 7),
    "transformers_weights": ("../x.safetensors", "w.bin", 7, [], {}),
}


@pytest.mark.parametrize("field", OTHERS)
def test_other_fields_of_a_config(field, copy, originals):
    folder = copy()
    original = (folder / "config.json").read_text()
    for value in OTHERS[field]:
        (folder / "config.json").write_text(json.dumps({**json.loads(original), field: value}))
        refused_or_equal(folder, originals["plain"][1], field, "config.json", "incomplete")


ROPE = {
    "rope_theta": (None, 0, -1, "x"),
    "factor": (0, -1, "x"),
    "rope_type": (7, "", "linear"),
    "partial_rotary_factor": (0, 7, "x"),
}


@pytest.mark.parametrize("field", ROPE)
def test_fields_inside_of_others(field, copy, originals):
    folder = copy()
    original = json.loads((folder / "config.json").read_text())
    for value in ROPE[field]:
        rope = {**original["rope_parameters"], field: value}
        (folder / "config.json").write_text(json.dumps({**original, "rope_parameters": rope}))
        refused_or_equal(folder, originals["plain"][1], "config.json")


@pytest.mark.parametrize(
    "value",
    [
        None,
        7,
        [],
        {"no.such.module": {"in_features": 3}},
        {"model.layers.4.mlp.down_proj": {"in_features": 0}},
        {"model.layers.4.mlp.down_proj": {"in_features": 10**9}},
        {"model.layers.4.mlp.down_proj": {"in_features": "7"}},
        {"model.layers.4.mlp.down_proj": {"no such size": 7}},
        {"model.layers.4.mlp.down_proj": 7},
    ],
)
def test_widths_of_layers(value, copy):
    folder = copy("per-layer")
    edit(folder / "config.json", lambda c: c.update(pruned=value))
    refused(folder, "model")


def test_numbers_of_heads_of_layers(copy):
    """No shape shows them: heads of a layer that its key-value heads do not divide are refused."""
    folder = copy("per-layer")

    def change(config):
        config["per_layer_config"]["4"]["num_key_value_heads"] = 4

    edit(folder / "config.json", change)
    refused(folder, "says num_key_value_heads 4, which does not divide num_attention_heads 6")


GENERATION = {"temperature": "x", "top_k": -1, "max_length": [], "eos_token_id": "x", "num_beams": 0}


@pytest.mark.parametrize("field", GENERATION)
def test_fields_of_a_generation_config(field, copy):
    folder = copy()
    edit(folder / "generation_config.json", lambda c: c.update({field: GENERATION[field]}))
    refused(folder, "generation_config.json", field)


@pytest.mark.parametrize("name", ["pruning.json", "training.json"])
@pytest.mark.parametrize("record", [{}, {"x": 1}, {"removed_share": "x", "method": {}, "steps": True}])
def test_records_of_another_kind(name, record, copy):
    folder = copy()
    (folder / name).write_text(json.dumps(record))
    refused(folder, name)
