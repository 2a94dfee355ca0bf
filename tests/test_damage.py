"""Damages against a slow version on whole models, and the widths that follow from them."""

from dataclasses import replace

import pytest
import torch
from tiny import FAMILIES, token_ids

from probeprune import Refit, allocation, attach, calibrate, compose, evenly, find_blocks, prune
from probeprune.calibration import Statistics
from probeprune.damage import damages, unit_flops, unit_nanoseconds
from probeprune.errors import UsageError
from probeprune.evaluation.cost import blocks_flops
from probeprune.sensitivity import sensitivities
from probeprune.surgery import method_consumers, method_damages

WINDOWS = token_ids(12, 24, seed=3)


def observed(model, block):
    """A block's `z` and output on the windows, tokens in one row each, float64."""
    seen = {}
    hook = block.consumer.register_forward_hook(lambda _, a, o: seen.update(z=a[0], output=o))
    with torch.no_grad():
        model(input_ids=WINDOWS)
    hook.remove()
    return (seen[k].reshape(-1, seen[k].shape[-1]).double() for k in ("z", "output"))


@pytest.mark.parametrize("family", ["llama-gqa", "opt", "gemma2", "gpt-neox"])
def test_the_damage_of_a_width_is_what_the_refitted_block_misses(family):
    model = FAMILIES[family]()
    metrics = sensitivities(model, WINDOWS[:3])
    found = damages(model, WINDOWS, metrics, damping=1e-6, batch_size=5)
    assert found.keys() == {b.name for b in find_blocks(model)}
    for block in find_blocks(model):
        curve = found[block.name]
        assert curve.shape == (block.units + 1,) and curve[0] == 0 and (curve.diff() >= -1e-9).all()
        z, t = observed(model, block)
        if block.consumer.bias is not None:
            z, t = z - z.mean(0), t - t.mean(0)
        # All gone: what is missed is all of the block.
        want = torch.einsum("ti,ij,tj->", t, metrics[block.name].double(), t) / len(t) / 2
        assert float(curve[-1]) == pytest.approx(float(want), rel=1e-2), block.name


def test_damages_are_those_of_the_model_given_and_leave_it_alone():
    model = FAMILIES["llama"]()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    metrics = sensitivities(model, WINDOWS[:3])
    whole = damages(model, WINDOWS, metrics)
    parts = damages(model, WINDOWS, metrics, batch_size=1)
    for name, curve in whole.items():
        torch.testing.assert_close(curve, parts[name], rtol=1e-3, atol=1e-6)
    assert all(v.equal(before[k]) for k, v in model.state_dict().items())
    with torch.no_grad():
        find_blocks(model)[0].consumer.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="damage of"):
        damages(model, WINDOWS, metrics)


@pytest.fixture(scope="module")
def judged():
    model = FAMILIES["llama-gqa"]()
    blocks = find_blocks(model)
    metrics = sensitivities(model, WINDOWS[:3])
    curves = damages(model, WINDOWS, metrics)
    return model, blocks, [curves[b.name] for b in blocks]


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.6])
def test_the_budget_is_met_closely_and_at_less_damage_than_uniformly(judged, ratio):
    _, blocks, curves = judged
    savings = [b.unit_parameters for b in blocks]
    total = sum(b.parameters for b in blocks)
    kept = allocation.least_damage(blocks, curves, savings, round(ratio * total))
    assert ratio <= allocation.removed_share(blocks, kept) < ratio + 0.02
    assert all(k >= 1 for k in kept)

    def damage(widths):
        return sum(float(c[b.units - k]) for b, k, c in zip(blocks, widths, curves, strict=True))

    one = allocation.uniform(blocks, ratio, skip_layers=0)
    assert damage(kept) < damage(one) * 1.02
    even = allocation.least_damage_even(blocks, curves, savings, round(ratio * total))
    assert len({k for b, k in zip(blocks, even, strict=True) if b.kind == "mlp"}) == 1
    assert len({k for b, k in zip(blocks, even, strict=True) if b.kind == "attention"}) == 1
    assert allocation.removed_share(blocks, even) >= ratio and damage(kept) <= damage(even) + 1e-9


def test_a_budget_of_flops_or_time_buys_other_widths(judged):
    model, blocks, curves = judged
    flops = unit_flops(blocks, 512)
    whole = blocks_flops(blocks, [b.units for b in blocks], 1, 512)
    kept = allocation.least_damage(blocks, curves, flops, round(0.3 * whole))
    assert whole - blocks_flops(blocks, kept, 1, 512) >= round(0.3 * whole)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    times = unit_nanoseconds(model, blocks, token_ids(2, 16), rounds=2)
    assert len(times) == len(blocks) and all(t >= 1 for t in times)
    assert all(v.equal(before[k]) for k, v in model.state_dict().items())
    budget = sum(t * b.units for t, b in zip(times, blocks, strict=True)) // 4
    kept = allocation.least_damage(blocks, curves, times, budget)
    assert sum((b.units - k) * t for b, k, t in zip(blocks, kept, times, strict=True)) >= budget


def test_what_is_not_to_be_pruned_stays_whole(judged):
    _, blocks, curves = judged
    savings = [b.unit_parameters for b in blocks]
    budget = round(0.2 * sum(b.parameters for b in blocks))
    kept = allocation.least_damage(blocks, curves, savings, budget, skip_layers=1, round_to=8, kinds=("mlp",))
    for b, k in zip(blocks, kept, strict=True):
        assert k == b.units if b.layer < 1 or b.kind == "attention" else k % 8 == 0
    with pytest.raises(UsageError, match="cannot be met"):
        allocation.least_damage(blocks, curves, savings, budget * 5, kinds=("mlp",), skip_layers=4)


@pytest.mark.parametrize("allocating", ["damage", "damage-even"])
@pytest.mark.parametrize("family", ["llama-gqa", "opt"])
def test_a_method_that_allocates_by_damage_prunes_what_it_shows(family, allocating):
    model, ids = FAMILIES[family](), token_ids()
    method = compose(
        "ppsp",
        importance="obs",
        allocation=allocating,
        compensation="least-squares",
        refit=Refit(damping=(0.1,), sensitivity=2),
        skip_layers=0,
    )
    known = Statistics(damages=method_damages(model, method, WINDOWS))
    consumers = method_consumers(model, method, 0.3, WINDOWS, statistics=known)
    with (
        attach(model, method, 0.3, statistics=replace(known, consumers=consumers)) as handle,
        torch.no_grad(),
    ):
        shown, kept = model(input_ids=ids).logits, handle.kept_units()
        assert 0.3 <= handle.removed_share < 0.33
    done = prune(model, method, 0.3, calibration=WINDOWS)
    assert [k.units for k in done.kept] == [k.units for k in kept]
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, shown, rtol=1e-3, atol=1e-3)


def test_damages_that_are_missing_are_asked_for():
    model = FAMILIES["llama"]()
    method = compose("ppsp", allocation="damage", name="by-damage")
    assert evenly(method).allocation == "damage-even"
    with pytest.raises(UsageError, match="method_damages"):
        attach(model, method, 0.3, statistics=calibrate(model, WINDOWS))
    with pytest.raises(UsageError, match="one width"):
        compose("ppsp", allocation="damage-even")
