"""A model saved with its method attached opens as it was and computes the same, or is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny import FAMILIES, logits, padded, token_ids
from transformers import AutoModelForCausalLM, pipeline

import probeprune
from probeprune import METHODS, Refit, UsageError, attach, compose, load_model, prepare, save
from probeprune.model import loading
from probeprune.runtime.attached_folder import STATISTICS

WINDOWS = token_ids(8, 16, seed=9)
SAVED = {
    "probe": METHODS["probe"],
    "full-batch": METHODS["full-batch"],
    "best-dynamic": compose("best-dynamic", compensation=Refit(sensitivity=2)),
    "best-static": compose("best-static", compensation=Refit(sensitivity=2)),
    "flap": METHODS["flap"],
    "random": compose("random", allocation="damage", skip_layers=0),
    "balanced": compose("probe", unit_kind="balanced", skip_layers=0),
}


@pytest.fixture
def base(tmp_path, number_tokenizer):
    """A dense checkpoint with a tokenizer."""
    model = FAMILIES["llama-gqa"]()
    model.resize_token_embeddings(1002)
    save(model, tmp_path / "base", tokenizer=number_tokenizer)
    return tmp_path / "base"


def dense(folder):
    return load_model(str(folder), dtype="float32")


def kept(base, target, method="probe", ratio=0.3, **options):
    """A folder with a method attached, and what the model computes under it."""
    loaded = dense(base)
    with attach(loaded.model, method, ratio, calibration=WINDOWS) as handle:
        save(handle, target, tokenizer=loaded.tokenizer, **options)
    with attach(loaded.model, method, ratio, calibration=WINDOWS):
        return logits(loaded.model, *padded("left"))


@pytest.mark.parametrize("weights", ["copy", "reference"])
@pytest.mark.parametrize("name", SAVED)
def test_a_saved_method_computes_the_same_and_detaches(base, tmp_path, name, weights):
    method = SAVED[name]
    wanted = kept(base, tmp_path / "out", method, weights=weights)
    loaded = load_model(str(tmp_path / "out"))
    assert loaded.handle.method == method and loaded.handle.ratio == 0.3 and loaded.dtype == torch.float32
    assert logits(loaded.model, *padded("left")).equal(wanted)
    probeprune.detach(loaded.model)
    assert logits(loaded.model, *padded("left")).equal(logits(dense(base).model, *padded("left")))


def test_weights_beside_a_method_are_the_dense_ones_bit_for_bit(base, tmp_path):
    loaded = dense(base)
    with attach(loaded.model, "probe", 0.3, calibration=WINDOWS):
        loaded.model(torch.tensor([[5, 6, 7]]))  # units are out of their order
        save(loaded.model, tmp_path / "out", tokenizer=loaded.tokenizer)
    want, got = (load_file(f / "model.safetensors") for f in (base, tmp_path / "out"))
    assert want.keys() == got.keys() and all(got[k].equal(want[k]) for k in want)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert logits(plain.eval(), *padded("left")).equal(logits(dense(base).model, *padded("left")))
    assert not list(tmp_path.glob(".*"))


def test_a_reference_holds_no_weights_and_names_its_base(base, tmp_path):
    kept(base, tmp_path / "out", weights="reference")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"README.md", "attached.json", STATISTICS}
    record = json.loads((tmp_path / "out" / "attached.json").read_text())
    assert record["base_model"] == str(base.resolve()) and record["text"]["windows"] == 8
    card = (tmp_path / "out" / "README.md").read_text()
    assert "no weights in this folder" in card and "probeprune.load\\_model" not in card


def test_an_opened_model_saves_again_and_generates_in_a_pipeline(base, tmp_path):
    kept(base, tmp_path / "one")
    loaded = load_model(str(tmp_path / "one"))
    made = pipeline("text-generation", model=loaded.model, tokenizer=loaded.tokenizer)
    text = made("7 8 9", max_new_tokens=4, do_sample=False, return_full_text=False)[0]["generated_text"]
    with attach(dense(base).model, "probe", 0.3, calibration=WINDOWS) as handle:
        ids = loaded.tokenizer("7 8 9", return_tensors="pt")
        own = handle.model.generate(**ids, max_new_tokens=4, do_sample=False)
    assert text == loaded.tokenizer.decode(own[0, -4:])
    save(loaded.model, tmp_path / "two", tokenizer=loaded.tokenizer)
    one, two = (json.loads((tmp_path / n / "attached.json").read_text()) for n in ("one", "two"))
    assert {**one, "base_model": None} == {**two, "base_model": None}
    files = [(tmp_path / n / STATISTICS).read_bytes() for n in ("one", "two")]
    assert files[0] == files[1]


def test_it_opens_in_another_dtype_where_that_is_asked_for(base, tmp_path):
    wanted = kept(base, tmp_path / "out", SAVED["best-dynamic"])
    loaded = load_model(str(tmp_path / "out"), dtype="bfloat16")
    assert loaded.dtype == loaded.model.dtype == torch.bfloat16
    found = logits(loaded.model, *padded("left")).float()
    assert torch.corrcoef(torch.stack([found.flatten(), wanted.flatten()]))[0, 1] > 0.99


def test_only_what_runs_methods_opens_such_a_folder(base, tmp_path):
    kept(base, tmp_path / "out")
    for opening in (loading.load_model, loading.open_shape):
        with pytest.raises(UsageError, match="keeps a model with method 'probe' attached"):
            opening(str(tmp_path / "out"))


def broken(folder, **changes):
    file = folder / "attached.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("weights", ["copy", "reference"])
def test_a_base_model_that_has_changed_is_refused(base, tmp_path, weights):
    kept(base, tmp_path / "out", weights=weights)
    where = base if weights == "reference" else tmp_path / "out"
    model = FAMILIES["llama-gqa"]()
    model.resize_token_embeddings(1002)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] += 1
    model.save_pretrained(where)
    with pytest.raises(UsageError, match=r"has changed since method 'probe'.*its weights are others"):
        load_model(str(tmp_path / "out"))
    config = json.loads((where / "config.json").read_text())
    (where / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    with pytest.raises(UsageError, match=r"its rms_norm_eps was 1e-06 and is 0.1"):
        load_model(str(tmp_path / "out"))


def test_statistics_that_are_missing_torn_or_of_another_are_refused(base, tmp_path):
    out = tmp_path / "out"
    kept(base, out)
    whole = (out / STATISTICS).read_bytes()
    for torn in (whole[:-8], whole[:100], b"", whole[:-8] + bytes(8)):
        (out / STATISTICS).write_bytes(torn)
        with pytest.raises(UsageError, match=r"is torn, or belongs to another attached.json"):
            load_model(str(out))
    (out / STATISTICS).unlink()
    with pytest.raises(UsageError, match=r"lacks statistics.safetensors, what 'probe' knows of it"):
        load_model(str(out))


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"format": 99}, "written by another version"),
        ({"ratio": "half"}, "its ratio is 'half'"),
        ({"ratio": 7}, "ratio must be"),
        ({"weights": "gone"}, "its weights is 'gone'"),
        ({"dtype": "int8"}, "its dtype is 'int8'"),
        ({"method": {"name": "x", "importance": "wisdom"}}, "unknown importance 'wisdom'"),
        ({"method": {"name": "x", "when": {"kind": "always"}}}, "unknown kind 'always'"),
        ({"method": {"name": "x", "colour": "red"}}, "unknown field 'colour'"),
        ({"method": {}}, "no record of probeprune"),
        ({"cuts": {"a": 3}}, "no record of probeprune"),
        ({"cuts": {"a": [3, None]}}, "attached to a model of 1 blocks"),
    ],
)
def test_a_record_that_is_not_ours_is_refused(base, tmp_path, changes, sentence):
    kept(base, tmp_path / "out")
    broken(tmp_path / "out", **changes)
    with pytest.raises(UsageError, match=sentence):
        load_model(str(tmp_path / "out"))


def test_units_that_a_block_does_not_have_are_refused(base, tmp_path):
    kept(base, tmp_path / "out", "flap")
    cuts = json.loads((tmp_path / "out" / "attached.json").read_text())["cuts"]
    name, (width, units) = next((n, c) for n, c in cuts.items() if c[1] and len(c[1]) > 1)
    for wrong in ([*units[:-1], 999], [units[0], *units[:-1]], units[:-1]):
        broken(tmp_path / "out", cuts={**cuts, name: [width, wrong]})
        with pytest.raises(UsageError, match=f"units that the method keeps of {name}"):
            load_model(str(tmp_path / "out"))


def test_a_reference_that_does_not_open_says_how_to_point_it_elsewhere(base, tmp_path):
    kept(base, tmp_path / "out", weights="reference")
    base.rename(tmp_path / "moved")
    with pytest.raises(UsageError, match=r"do not open; if they have moved, change base_model"):
        load_model(str(tmp_path / "out"))
    broken(tmp_path / "out", base_model=str(tmp_path / "moved"))
    assert load_model(str(tmp_path / "out")).handle is not None


def test_what_cannot_be_saved_is_one_sentence_and_writes_nothing(base, tmp_path):
    loaded = dense(base)
    with pytest.raises(UsageError, match="no method is attached"):
        save(loaded.model, tmp_path / "out", weights="reference")
    handle = attach(loaded.model, "probe", 0.3, calibration=WINDOWS)
    with pytest.raises(UsageError, match="a layout is for models that were cut"):
        save(handle, tmp_path / "out", layout="uniform")
    with pytest.raises(UsageError, match="unknown place of weights 'nowhere'"):
        save(handle, tmp_path / "out", weights="nowhere")
    loaded.model.config._name_or_path = ""
    with pytest.raises(UsageError, match="nobody knows by which name"):
        save(handle, tmp_path / "out", weights="reference")
    handle.detach()
    with pytest.raises(UsageError, match="this handle is detached"):
        save(handle, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_offloaded_model_under_a_method_saves_and_opens(base, tmp_path):
    wanted = kept(base, tmp_path / "whole")
    del wanted
    offloaded = load_model(str(base), dtype="float32", device_map={"": "cpu"})
    with attach(offloaded.model, "probe", 0.3, calibration=WINDOWS) as handle:
        save(handle, tmp_path / "out", tokenizer=offloaded.tokenizer)
    one, two = (load_file(tmp_path / n / STATISTICS) for n in ("whole", "out"))
    assert one.keys() == two.keys()


def test_prepared_calibration_says_its_text(base, tmp_path):
    loaded = dense(base)
    prepared = prepare(loaded.model, "probe", 0.3, WINDOWS)
    with attach(loaded.model, "probe", 0.3, calibration=prepared) as handle:
        save(handle, tmp_path / "out", tokenizer=loaded.tokenizer)
    assert load_model(str(tmp_path / "out")).handle.kept.text == prepared.text
    shutil.rmtree(tmp_path / "out")
