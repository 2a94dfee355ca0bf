"""Layers that read keys and values of others, and inputs that differ by token (Gemma 4 E2B, E4B): what runs a
layer at a time gives what the whole model does."""

import json

import pytest
import tiny_families
import torch
from test_families import IDS, MASK, PROBE, TOLD, check_masked
from test_offloaded import on_disk
from test_plan import job, outline
from test_unfinished import Watch
from tiny import kept, logits, snapshot, token_ids
from torch.nn.functional import cross_entropy

from probeprune import METHODS, Gradients, attach, compose, find_blocks, prune, save
from probeprune.calibration import footprints, gradient_footprints, unfinished
from probeprune.calibration.collecting import calibrate
from probeprune.calibration.gradients import saliences
from probeprune.evaluation.perplexity import perplexity
from probeprune.jobs.forecast import forecast
from probeprune.methods import with_equal_widths
from probeprune.model.footprint import Batch, Rehearsal
from probeprune.model.layers import LayerRunner
from probeprune.model.shared_kv import Carried
from probeprune.strategies.compensation import Refit

WINDOWS = token_ids(4, 64, seed=3)
REFIT = compose("wanda-sp", name="refit", skip_layers=0, compensation=Refit(sensitivity=0))
GRADIENTS = compose("llm-pruner", name="gradients", gradients=Gradients(windows=2, length=32))
pytestmark = pytest.mark.filterwarnings("ignore:no head of 4 of 6 attention blocks")


def build():
    return tiny_families.build("gemma4_text e4b")()


def test_layers_one_by_one_are_the_model_for_batches_of_one_shape_with_other_tokens():
    model = build()
    batches, masks = [token_ids(2, 16, seed=i) for i in (3, 4, 5)], [None, None, MASK[:2, -16:]]
    runner = LayerRunner(model, batches, masks)
    with torch.no_grad():
        for layer in range(len(runner)):
            for i, states in enumerate(runner.hidden):
                runner.hidden[i] = runner.run(layer, i, states)
        for i, states in enumerate(runner.hidden):
            whole = model.model(input_ids=batches[i], attention_mask=masks[i], use_cache=False)[0]
            assert runner.finish(i, states).equal(whole)
    assert states.shape[-1] == Carried(model).width == 48 + 2 * 2 * (8 + 16)


def test_gradients_are_those_of_the_whole_model():
    """Those of an early layer reach it through keys and values too."""
    model = build()
    got = saliences(model, WINDOWS[:2])
    double = build().double()
    members = [m for b in find_blocks(double) for m in b.members]
    loss = sum(cross_entropy(double(w[None]).logits[0, :-1], w[1:]) for w in WINDOWS[:2]) / 2
    gradients = torch.autograd.grad(loss, [m.linear.weight for m in members])
    for m, gradient in zip(members, gradients, strict=True):
        wanted = (m.weight * gradient).abs().sum(1 - m.axis)
        torch.testing.assert_close(got[m.name].double(), wanted, rtol=1e-3, atol=1e-5)


def test_the_second_stream_of_a_refit_is_that_of_the_pruned_model(monkeypatch):
    """Its keys and values are its own: what enters the last layer is what the cut model puts there."""
    model, seen, ran = build(), [], LayerRunner.run

    def spy(self, layer, batch, states, module=None):
        if layer == 5:
            seen.append(self._carried.hidden(states).clone())
        return ran(self, layer, batch, states, module)

    monkeypatch.setattr(LayerRunner, "run", spy)
    prune(model, REFIT, 0.2, calibration=WINDOWS)
    entering = []
    hook = model.model.layers[5].register_forward_pre_hook(lambda _, args: entering.append(args[0]))
    with torch.no_grad():
        model(WINDOWS)
    hook.remove()
    errors = [float((own - entering[0]).abs().max()) for own in seen if own.shape == entering[0].shape]
    assert min(errors) < 1e-4 < 1e-2 < max(errors)


@pytest.mark.parametrize("method", [REFIT, GRADIENTS, PROBE], ids=lambda m: m.name)
def test_a_layer_at_a_time_from_disk_is_the_model_in_memory(method, tmp_path):
    here = build()
    there = on_disk(here, tmp_path / "dense")
    assert perplexity(here, WINDOWS).losses == perplexity(there, WINDOWS).losses
    found = []
    for model in (here, there):
        if method is PROBE:
            with attach(model, method, 0.2, calibration=WINDOWS):
                found.append(perplexity(model, WINDOWS, batch_size=2))
        else:
            prune(model, method, 0.2, calibration=WINDOWS)
            found.append(perplexity(model, WINDOWS, batch_size=2))
    assert found[0].losses == pytest.approx(found[1].losses, rel=1e-5)
    assert found[0].flops_per_token == found[1].flops_per_token


def test_work_that_was_stopped_goes_on_with_the_keys_and_values_it_had(tmp_path, monkeypatch):
    monkeypatch.setattr(unfinished, "EVERY", 0.0)
    monkeypatch.setattr(unfinished, "COST", 0.0)
    model = build()
    Watch(model, 9)  # the first of two batches in the fifth layer
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, WINDOWS, batch_size=2, cache=tmp_path)
    model = build()
    watched, found = Watch(model), calibrate(model, WINDOWS, batch_size=2, cache=tmp_path)
    assert [layer for layer, _ in watched.passes] == [4, 4, 5, 5]
    for name, moments in calibrate(build(), WINDOWS, batch_size=2).items():
        assert all(t.equal(found[name].state()[key]) for key, t in moments.state().items())


def test_query_heads_go_from_every_layer_at_every_batch_and_keys_and_values_stay():
    model = build()
    before = snapshot(model)
    method = compose(PROBE, unit_kind="balanced", allocation="uniform")
    with attach(model, method, 0.4, calibration=WINDOWS) as handle:
        heads = [
            b
            for b, k in zip(handle.blocks, handle.widths, strict=True)
            if b.kind == "attention" and k < b.units
        ]
        assert [b.layer for b in heads] == [*range(6)]
        got, choice = logits(model, IDS, MASK), kept(handle)
        cached = model.generate(IDS, attention_mask=MASK, **TOLD)
        prompted = kept(handle)
    check_masked(model, before, (got, choice), (cached, prompted))


def test_mlps_of_two_widths_have_one_in_a_plain_config(tmp_path):
    model = build()
    prune(
        model,
        compose(with_equal_widths("best-static"), skip_layers=0, blocks=("mlp",)),
        0.2,
        calibration=WINDOWS,
    )
    widths = [b.units for b in find_blocks(model) if b.kind == "mlp"]
    save(model, tmp_path / "out", layout="uniform")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["use_double_wide_mlp"] and config["model_type"] == "gemma4_text"
    assert widths == [config["intermediate_size"] * times for times in (1, 1, 1, 1, 2, 2)]


def test_memory_is_planned_for_a_layer_that_reads_keys_and_values_of_others():
    model = build()
    rehearsal, batch = Rehearsal(model, torch.float32, torch.device("cpu")), Batch(2, 24)
    assert rehearsal.layer == 5
    gradients = METHODS["llm-pruner"].gradient_settings
    found = gradient_footprints.saliences(rehearsal, rehearsal, "param_mix", gradients)
    found += [footprints.damages(rehearsal, batch, 8, 0.1), footprints.moments(rehearsal, batch, 8, 24)]
    given = 6 * 12  # inputs by token, of all layers
    assert found[-1].states == 6 * 24 * (Carried(model).width + given) * 4
    assert all(p.work > 0 for p in found)


def test_a_plan_counts_what_stays_and_what_a_token_leaves_in_the_cache():
    model = build()
    figures = forecast(outline(model), job("magnitude", "uniform", blocks=("mlp",))).before
    cache = model(token_ids(2, 5), use_cache=True).past_key_values
    filled = [layer for layer in cache.layers if layer.keys is not None]
    held = sum(t.nbytes for layer in filled for t in (layer.keys, layer.values))
    assert figures.kv_bytes_per_token * 2 * 5 == held
    assert figures.flops_per_token == int(perplexity(model, token_ids(4, 24)).flops_per_token)
