"""The refit of a model's consumers, layer by layer: against whole models, block by block."""

from dataclasses import replace

import pytest
import torch
from refitting import WINDOWS, explicit, refitting, some, watched
from tiny import FAMILIES, cuts

from probeprune import Refit, find_blocks, prune
from probeprune.algebra.elimination import LOOKS, eliminate
from probeprune.algebra.least_squares import FLOOR
from probeprune.calibration.refit import RefitRequest, refit
from probeprune.calibration.sensitivity import sensitivities


def slow(dense, pruned, kept, windows, how):
    """Whole models in float64, once a block; least squares on all tokens. Units are zeroed, not cut."""
    dense, pruned, fitted = dense.double(), pruned.double(), {}
    for block, twin in zip(find_blocks(dense), find_blocks(pruned), strict=True):
        if block.name not in kept:
            continue
        channels = (kept[block.name][:, None] * block.unit_width + torch.arange(block.unit_width)).flatten()
        seen = watched(dense, block, windows)
        z, target = seen["z"], seen["output"]
        if how.sequential:
            now = watched(pruned, twin, windows)
            z, target = now["z"], target + how.share * (seen["residual"] - now["residual"])
        z, target = z.reshape(-1, block.width)[:, channels], target.reshape(-1, target.shape[-1])
        weight, own = block.consumer_weight[:, channels], block.consumer.bias
        fitted[block.name] = weight, bias = explicit(weight, own, z, target, *how.damping)
        with torch.no_grad():
            twin.consumer_weight.zero_()
            twin.consumer_weight[:, channels] = weight
            if bias is not None:
                twin.consumer.bias.copy_(bias)
    return fitted


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0, None], ids="share={}".format)
@pytest.mark.parametrize("family", ["llama-gqa", "mistral", "opt", "gpt-neox", "gpt-neox-sequential"])
def test_a_refit_is_what_whole_models_give_block_by_block(family, share):
    how = Refit(damping=(1e-2,), share=share or 0.0, sequential=share is not None)
    model = FAMILIES[family]()
    kept = some(model)
    got = refit(model, RefitRequest(cuts(kept)), WINDOWS, how, batch_size=5)
    want = slow(model, FAMILIES[family](), kept, WINDOWS, how)
    assert got.keys() == want.keys() == kept.keys()
    for name, consumer in got.items():
        weight, bias = want[name]
        torch.testing.assert_close(consumer.weight.double(), weight, rtol=1e-2, atol=1e-3)
        if bias is not None:
            torch.testing.assert_close(consumer.bias.double(), bias, rtol=1e-2, atol=1e-2)
        assert consumer.error < consumer.error_before, "on the tokens it is fitted to"


@pytest.mark.parametrize("family", ["llama-gqa", "opt", "gpt-neox", "gemma2"])
def test_elimination_leaves_what_it_would_on_whole_models_and_refits_to_that(family):
    how = Refit(damping=(1e-1,))
    model = FAMILIES[family]()
    counts = {name: len(units) for name, units in some(model).items()}
    metrics = sensitivities(model, WINDOWS[:4])
    got = refit(model, RefitRequest(cuts(counts), metrics=metrics), WINDOWS, how, batch_size=5)
    again = refit(
        model, RefitRequest(cuts({name: c.units for name, c in got.items()})), WINDOWS, how, batch_size=5
    )
    assert {name: len(c.units) for name, c in got.items()} == counts
    for name, consumer in got.items():
        torch.testing.assert_close(consumer.weight, again[name].weight, rtol=1e-3, atol=1e-4)
    # The first block that is cut sees the dense model's activations.
    block = next(b for b in find_blocks(model) if b.name in counts)
    seen = watched(model, block, WINDOWS)
    z, t = (x.reshape(-1, x.shape[-1]) for x in (seen["z"], seen["output"]))
    weight, bias = explicit(block.consumer.weight.detach(), block.consumer.bias, z, t, *how.damping)
    centred = z.double() - (0 if bias is None else z.double().mean(0))
    moment = centred.T @ centred / len(z)
    own = moment.diagonal()
    moment += how.damping[0] * own.clamp_min(FLOOR * own.median()).diag()
    order = eliminate(
        moment,
        weight,
        block.unit_width,
        metric=metrics[block.name],
        at_once=max(block.units // LOOKS, 1),
    ).order
    assert sorted(order[-counts[block.name] :].tolist()) == got[block.name].units.tolist()


def test_the_order_by_elimination_beats_others_on_what_it_is_made_for():
    """The error of the blocks' outputs, on text that nothing was fitted to."""
    model = FAMILIES["llama"]()
    kept = {name: u for name, u in some(model).items() if ".mlp" in name}
    how = Refit(sequential=False, share=0.0, damping=(1e-2, 1e-1, 1.0), sensitivity=0)
    chosen = refit(model, RefitRequest(cuts({name: len(u) for name, u in kept.items()})), WINDOWS, how)
    drawn = refit(model, RefitRequest(cuts(kept)), WINDOWS, how)
    assert all(chosen[name].error < drawn[name].error for name in kept)


def test_damping_is_chosen_on_the_windows_held_out_and_may_be_none():
    model = FAMILIES["opt"]()
    kept = some(model)
    how = Refit(damping=(1e-3, 1e-1, 10.0), sequential=False, share=0.0, held_out=0.25)
    got = refit(model, RefitRequest(cuts(kept)), WINDOWS, how)
    block = next(b for b in find_blocks(model) if b.name in kept and b.kind == "mlp")
    seen = watched(model, block, WINDOWS)
    z, t = seen["z"].view(24, 24, -1)[..., kept[block.name]], seen["output"].view(24, 24, -1)
    weight, bias = block.consumer.weight.detach()[:, kept[block.name]], block.consumer.bias.detach()
    fit, held, whole = (
        (z[part].flatten(0, 1), t[part].flatten(0, 1)) for part in (slice(18), slice(18, 24), slice(24))
    )
    errors = {}
    for damping in how.damping:
        w, b = explicit(weight, bias, *fit, damping)
        errors[damping] = float((held[1] - held[0].double() @ w.T - b).square().sum(1).mean())
    spread = float((held[1] - held[1].mean(0)).square().sum(1).mean())
    consumer = got[block.name]
    assert consumer.damping == min(errors, key=errors.get)
    assert consumer.error == pytest.approx(min(errors.values()) / spread, rel=1e-2)
    torch.testing.assert_close(
        consumer.weight.double(), explicit(weight, bias, *whole, consumer.damping)[0], rtol=1e-2, atol=1e-3
    )
    # Four windows are too few for a hundred channels: whatever is fitted to them is worse elsewhere.
    llama = FAMILIES["llama"]()
    few = refit(llama, RefitRequest(cuts(some(llama))), WINDOWS[:4], replace(how, damping=(1e-3,) * 2))
    stays = [c for c in few.values() if c.damping is None]
    assert stays and all(c.error == c.error_before for c in stays)


def test_a_new_bias_only_where_asked_for():
    model = FAMILIES["llama"]()
    assert all(c.bias is None for c in refit(model, RefitRequest(cuts(some(model))), WINDOWS).values())
    added = refit(model, RefitRequest(cuts(some(model))), WINDOWS, Refit(bias=True, damping=(1.0,)))
    assert all(c.bias is not None for c in added.values())


def test_a_failed_refit_names_its_block_and_changes_nothing(monkeypatch):
    model = FAMILIES["llama"]()
    block = find_blocks(model)[3]
    with torch.no_grad():
        block.producers[0].weight.zero_()  # a gate that never opens: nothing reaches the consumer
    monkeypatch.setattr("probeprune.algebra.least_squares.FLOOR", 0.0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(FloatingPointError, match=rf"refit of {block.name} failed.*more calibration windows"):
        prune(model, refitting(), 0.3, calibration=WINDOWS)
    assert all(v.equal(before[k]) for k, v in model.state_dict().items())
