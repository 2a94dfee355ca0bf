"""Calibration is cached by content and goes on after a kill with the same result."""

import pytest
import tiny_experts
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import FAMILIES, token_ids

from probeprune import UsageError, attach, prepare
from probeprune.algebra.moments import Moments
from probeprune.calibration import collecting, unfinished
from probeprune.calibration.collecting import calibrate, merge
from probeprune.model.identity import model_fingerprint, weights_fingerprint

WINDOWS = token_ids(10, 12)


def same(a: dict[str, Moments], b: dict[str, Moments], **tolerance) -> None:
    assert a.keys() == b.keys()
    for name, moments in a.items():
        for key, value in moments.state().items():
            torch.testing.assert_close(value, b[name].state()[key], **tolerance)


def count_passes(model, layer: int = 0) -> list:
    passes: list = []
    model.model.layers[layer].register_forward_pre_hook(lambda *_: passes.append(1))
    return passes


def test_a_second_calibration_reads_the_first(tmp_path):
    model = FAMILIES["llama-gqa"]()
    first = calibrate(model, WINDOWS, batch_size=4, cache=tmp_path)
    passes = count_passes(model)
    same(calibrate(model, WINDOWS, batch_size=4, cache=tmp_path), first, rtol=0, atol=0)
    assert not passes
    # Other text, other weights: other statistics.
    calibrate(model, WINDOWS + 1, batch_size=4, cache=tmp_path)
    assert len(passes) == 3
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] += 1e-3
    calibrate(model, WINDOWS, batch_size=4, cache=tmp_path)
    assert len(passes) == 6


def test_a_broken_run_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(unfinished, "EVERY", 0.0)
    monkeypatch.setattr(unfinished, "COST", 0.0)
    model = FAMILIES["llama-gqa"]()
    whole = calibrate(model, WINDOWS, batch_size=2)

    def kill(what: str, done: int, total: int) -> None:
        if done == 26:  # the third of five batches of the third layer
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, WINDOWS, batch_size=2, cache=tmp_path, progress=kill)
    collected = []
    take = collecting.collect

    def counted(runner, layer, observed, *args):
        collected.append((layer, len(observed)))
        return take(runner, layer, observed, *args)

    monkeypatch.setattr(collecting, "collect", counted)
    resumed = calibrate(model, WINDOWS, batch_size=2, cache=tmp_path)
    assert collected == [(2, 2), (3, 2), (4, 2)], "layers that are done are not run through again"
    same(resumed, whole, rtol=0, atol=0)
    assert not [p for p in tmp_path.iterdir() if p.suffix != ".safetensors"], "half a file left behind"


def test_a_damaged_cache_entry_is_made_again(tmp_path):
    model = FAMILIES["opt"]()
    first = calibrate(model, WINDOWS, batch_size=4, cache=tmp_path)
    (entry,) = tmp_path.iterdir()
    entry.write_bytes(entry.read_bytes()[:100])
    same(calibrate(model, WINDOWS, batch_size=4, cache=tmp_path), first, rtol=0, atol=0)


def test_shares_of_the_text_merge_to_the_whole():
    # As two processes would each take a part.
    model = FAMILIES["llama"]()
    first, second = calibrate(model, WINDOWS[:3]), calibrate(model, WINDOWS[3:])
    merge(first, second)
    same(first, calibrate(model, WINDOWS), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_calibrated_is_refused():
    model = FAMILIES["llama"]()
    with pytest.raises(UsageError, match="longer than the model's 128 positions"):
        calibrate(model, torch.ones(1, 129, dtype=torch.long))
    with pytest.raises(UsageError, match=r"model.eval\(\)"):
        calibrate(model.train(), WINDOWS)


def test_overflowed_statistics_name_their_block():
    model = FAMILIES["llama"]()
    with torch.no_grad():
        model.model.layers[4].mlp.up_proj.weight[0] = float("inf")
    with pytest.raises(FloatingPointError, match=r"layers\.4\.mlp"):
        attach(model, "wanda-sp", 0.2, calibration=WINDOWS)


def test_the_fingerprint_reads_saved_buffers():
    model = tiny_experts.build("glm4_moe")()
    before = model_fingerprint(model), weights_fingerprint(model)
    (name, bias), *_ = [b for b in model.named_buffers() if b[0].endswith("e_score_correction_bias")]
    assert name in model.state_dict()
    kept = bias.clone()
    bias += 1
    assert not {model_fingerprint(model), weights_fingerprint(model)} & set(before)
    bias.copy_(kept)  # caches of rotary angles and the like are no part of it
    model.model.rotary_emb.inv_freq *= 2
    assert (model_fingerprint(model), weights_fingerprint(model)) == before


def test_the_fingerprint_reads_every_weight():
    model = FAMILIES["llama"]()
    before = model_fingerprint(model)
    assert model_fingerprint(FAMILIES["llama"]()) == before
    with torch.no_grad():
        model.lm_head.weight[-1, -1] += 1e-6
    assert model_fingerprint(model) != before


def _damage(entry, how: str) -> None:
    good = entry.read_bytes()
    with safe_open(entry, framework="pt") as file:
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    if how == "empty":
        entry.write_bytes(b"")
    elif how == "garbage":
        entry.write_bytes(b"\xff" * len(good))
    elif how == "no record of what was done":
        save_file(tensors, entry)
    elif how == "a count that is no number":
        save_file(tensors, entry, metadata={**metadata, "more": '{"done": "all"}'})
    elif how == "a tensor missing":
        tensors.popitem()
        save_file(tensors, entry, metadata=metadata)


@pytest.mark.parametrize(
    "how",
    ["empty", "garbage", "no record of what was done", "a count that is no number", "a tensor missing"],
)
def test_whatever_the_damage_the_entry_is_made_again(tmp_path, how):
    # A cache must never be the reason that nothing works until somebody finds and deletes a file.
    model = FAMILIES["llama-gqa"]()
    first = calibrate(model, WINDOWS, batch_size=4, cache=tmp_path)
    (entry,) = tmp_path.iterdir()
    _damage(entry, how)
    same(calibrate(model, WINDOWS, batch_size=4, cache=tmp_path), first, rtol=0, atol=0)
    passes = count_passes(model)
    calibrate(model, WINDOWS, batch_size=4, cache=tmp_path)
    assert not passes, "the mended entry is not used"


def test_settings_that_change_the_result_change_the_key(tmp_path):
    model = FAMILIES["llama-gqa"]()
    pooled = calibrate(model, WINDOWS, cache=tmp_path)
    apart = calibrate(model, WINDOWS, cache=tmp_path, own_positions=4)
    calibrate(model, WINDOWS[:, :6], cache=tmp_path)
    calibrate(model, WINDOWS.view(20, 6), cache=tmp_path)  # the same bytes, other windows
    assert len(list(tmp_path.iterdir())) == 4
    assert {m.own for m in pooled.values()} == {0}
    assert {m.own for m in apart.values()} == {4}


def test_statistics_do_not_depend_on_the_batch_size():
    model = FAMILIES["gemma3"]()
    same(
        calibrate(model, WINDOWS, batch_size=3),
        calibrate(model, WINDOWS, batch_size=10),
        rtol=1e-4,
        atol=1e-5,
    )


def test_statistics_made_in_inference_mode_serve_outside():
    model = FAMILIES["llama-gqa"]()
    with torch.inference_mode():
        prepared = prepare(model, "probe", 0.2, WINDOWS)
    with torch.no_grad(), attach(model, "probe", 0.2, calibration=prepared):
        assert model(WINDOWS).logits.isfinite().all()
