"""A prepared calibration in a file: back to the bit, or refused in a sentence that names the file."""

import json
from dataclasses import fields

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import FAMILIES, logits, padded, token_ids

from probeprune import (
    METHODS,
    Gradients,
    ProbeEveryBatch,
    Refit,
    UsageError,
    attach,
    compose,
    load_prepared,
    prepare,
)
from probeprune.calibration.collecting import calibrate

WINDOWS = token_ids(8, 16, seed=9)


def assert_same(got, want) -> None:
    """Equal to the bit, whatever it is made of."""
    assert type(got) is type(want)
    if isinstance(want, torch.Tensor):
        assert got.dtype == want.dtype and got.equal(want)
    elif isinstance(want, dict):
        assert got.keys() == want.keys()
        for key, value in want.items():
            assert_same(got[key], value)
    elif hasattr(want, "state"):  # moments
        assert_same(got.state(), want.state())
    elif hasattr(want, "__dataclass_fields__"):
        for f in fields(want):
            assert_same(getattr(got, f.name), getattr(want, f.name))
    else:
        assert got == want


REFIT = Refit(sensitivity=2)
PREPARED = {
    "moments": METHODS["wanda-sp"],
    "moments by position": compose("probe", when=ProbeEveryBatch(own_positions=4)),
    "saliences": compose("llm-pruner", gradients=Gradients(3, 12)),
    "saliences with draws": compose("loraprune", gradients=Gradients(3, 12)),
    "damages, parameters": compose("random", allocation="damage"),
    "damages, flops": compose("random", allocation="damage", budget="flops"),
    "consumers": compose("best-static", compensation=REFIT),
    "consumers that get a bias": compose("best-static", compensation=Refit(sensitivity=0, bias=True)),
    "consumers of scored units": compose("magnitude", compensation=Refit(damping=(0.1, 1.0))),
    "consumers that follow": compose("best-dynamic", compensation=REFIT),
}
"""A method for every part and every form it comes in. On `opt`, consumers have a bias of their own and so a
mean; on `llama-gqa` neither."""


@pytest.mark.parametrize("what", PREPARED)
@pytest.mark.parametrize("family", ["llama-gqa", "opt"])
def test_a_file_gives_back_what_was_saved(family, what, tmp_path):
    model, method = FAMILIES[family](), PREPARED[what]
    known = prepare(model, method, 0.2, WINDOWS)
    known.save(tmp_path / "calibration.safetensors")
    loaded = load_prepared(tmp_path / "calibration.safetensors")
    assert (loaded.model, loaded.text, loaded.methods) == (known.model, known.text, known.methods)
    assert loaded.text["windows"] == 8 and loaded.text["length"] == 16
    assert_same(dict(loaded.pieces), dict(known.pieces))
    for consumer in loaded.statistics(model, method, 0.2).consumers.values():
        biased = family == "opt" or method.compensation.adds_bias
        assert (consumer.bias is not None) == biased
        assert (consumer.mean is not None) == (biased and consumer.inverse is not None)
    outputs = []
    for calibration in (known, loaded):
        with attach(model, method, 0.2, calibration=calibration):
            outputs.append(logits(model, *padded("left")))
    assert outputs[0].equal(outputs[1])


def test_consumers_that_follow_are_saved_with_their_moments(tmp_path):
    model, method = FAMILIES["opt"](), PREPARED["consumers that follow"]
    prepare(model, method, 0.2, WINDOWS).save(tmp_path / "calibration.safetensors")
    consumers = load_prepared(tmp_path / "calibration.safetensors").statistics(model, method, 0.2).consumers
    following = {name for name, c in consumers.items() if c.inverse is not None and c.mean is not None}
    assert following and following == {name for name in consumers if name.endswith(".fc2") or ".mlp" in name}


def test_one_file_holds_many_methods_and_ratios(tmp_path):
    model = FAMILIES["llama-gqa"]()
    known = prepare(model, list(PREPARED.values()), [0.1, 0.2], WINDOWS)
    known.save(str(tmp_path / "calibration.safetensors"))
    loaded = load_prepared(str(tmp_path / "calibration.safetensors"))
    assert_same(dict(loaded.pieces), dict(known.pieces))
    assert loaded.methods == tuple((m, r) for r in (0.1, 0.2) for m in PREPARED.values())
    assert [p.name for p in tmp_path.iterdir()] == ["calibration.safetensors"], "half a file left behind"


def test_half_precision_comes_back_as_it_was(tmp_path):
    model, method = FAMILIES["llama-gqa"]().bfloat16(), PREPARED["consumers that follow"]
    known = prepare(model, method, 0.2, WINDOWS)
    known.save(tmp_path / "calibration.safetensors")
    loaded = load_prepared(tmp_path / "calibration.safetensors")
    assert {c.weight.dtype for c in loaded.statistics(model, method, 0.2).consumers.values()} == {
        torch.bfloat16
    }
    assert_same(dict(loaded.pieces), dict(known.pieces))


# -- refusals ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved calibration: its bytes, tensors and header."""
    file = tmp_path_factory.mktemp("saved") / "calibration.safetensors"
    model = FAMILIES["llama-gqa"]()
    prepare(model, [PREPARED["consumers"], PREPARED["damages, flops"]], 0.2, WINDOWS).save(file)
    with safe_open(file, framework="pt") as opened:
        tensors = {k: opened.get_tensor(k) for k in opened.keys()}  # noqa: SIM118
        header = json.loads(opened.metadata()["probeprune"])
    return file.read_bytes(), tensors, header


def write(file, tensors, header) -> None:
    save_file(tensors, file, metadata={"probeprune": json.dumps(header)})


def without(header, *names):
    return {k: v for k, v in header.items() if k not in names}


DAMAGES = {
    "empty": lambda f, b, t, h: f.write_bytes(b""),
    "cut short": lambda f, b, t, h: f.write_bytes(b[: len(b) // 2]),
    "garbage": lambda f, b, t, h: f.write_bytes(b"\xff" * len(b)),
    "text": lambda f, b, t, h: f.write_text("calibration\n"),
    "weights": lambda f, b, t, h: save_file(t, f),
    "a model": lambda f, b, t, h: save_file(FAMILIES["opt"]().model.state_dict(), f, {"format": "pt"}),
    "moments of a cache": lambda f, b, t, h: f.write_bytes(entry_of_a_cache(f.parent)),
    "a header that is no JSON": lambda f, b, t, h: save_file(t, f, metadata={"probeprune": "{"}),
    "a header that is a list": lambda f, b, t, h: write(f, t, [1, 2]),
    "a header without its model": lambda f, b, t, h: write(f, t, without(h, "model")),
    "values that are a list": lambda f, b, t, h: write(f, t, {**h, "values": [1]}),
    "pieces of an unknown part": lambda f, b, t, h: write(f, t, {**h, "values": {"momentum-1": {}}}),
    "a tensor missing": lambda f, b, t, h: write(f, dict(list(t.items())[:-1]), h),
    "methods without ratios": lambda f, b, t, h: write(f, t, {**h, "methods": [h["methods"][0][:1]]}),
    "a ratio that is no number": lambda f, b, t, h: write(f, t, {**h, "methods": [[{"name": "a"}, "b"]]}),
}


def entry_of_a_cache(folder) -> bytes:
    calibrate(FAMILIES["llama-gqa"](), WINDOWS, cache=folder / "cache")
    (entry,) = (folder / "cache").iterdir()
    return entry.read_bytes()


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_file_or_one_of_another_kind_is_refused(saved, how, tmp_path):
    file = tmp_path / "calibration.safetensors"
    DAMAGES[how](file, *saved)
    with pytest.raises(UsageError) as error:
        load_prepared(file)
    assert str(error.value) == f"{file} holds no prepared calibration, or is damaged; prepare it again."


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": 0}, "written by another version of probeprune; prepare it again."),
        ({"methods": [[{"name": "mine", "importnace": "ppsp"}, 0.2]]}, "did you mean 'importance'"),
        ({"methods": [[{"name": "mine", "importance": "ppps"}, 0.2]]}, "did you mean 'ppsp'"),
    ],
)
def test_a_file_of_another_version_is_refused(saved, change, says, tmp_path):
    file = tmp_path / "calibration.safetensors"
    write(file, saved[1], {**saved[2], **change})
    with pytest.raises(UsageError) as error:
        load_prepared(file)
    sentence = str(error.value)
    assert (
        says in sentence
        and sentence.startswith(f"{file}: ")
        and sentence.endswith(".")
        and "\n" not in sentence
    )


@pytest.mark.parametrize("made", ["nothing", "a folder"])
def test_no_file_is_refused(made, tmp_path):
    path = tmp_path / "calibration"
    if made == "a folder":
        path.mkdir()
    with pytest.raises(UsageError, match="there is no file"):
        load_prepared(path)
