"""Damages against a slow version on whole models, and the widths that follow from them."""

import pytest
import torch
from tiny import FAMILIES, Given, token_ids

from probeprune import Refit, attach, compose, find_blocks, prune, with_equal_widths
from probeprune.calibration.collecting import calibrate
from probeprune.calibration.damage import damages, unit_flops, unit_nanoseconds
from probeprune.calibration.sensitivity import sensitivities
from probeprune.calibration.statistics import Statistics
from probeprune.errors import UsageError
from probeprune.model.cost import block_flops, blocks_flops
from probeprune.preparation import Preparation
from probeprune.strategies import allocation
from probeprune.strategies.widths import Damage, Request

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
    return model, blocks, [Damage(curves[b.name], b.unit_parameters, b.parameters) for b in blocks]


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.6])
def test_the_budget_is_met_closely_and_at_less_damage_than_uniformly(judged, ratio):
    _, blocks, costs = judged
    request = Request(blocks, ratio, damages=costs)
    kept = allocation.least_damage(request)
    assert ratio <= allocation.removed_share(blocks, kept) < ratio + 0.02
    assert all(k >= 1 for k in kept)

    def damage(widths):
        return sum(float(d.curve[b.units - k]) for b, k, d in zip(blocks, widths, costs, strict=True))

    one = allocation.uniform(request)
    assert damage(kept) < damage(one) * 1.02
    even = allocation.least_damage_even(request)
    assert len({k for b, k in zip(blocks, even, strict=True) if b.kind == "mlp"}) == 1
    assert len({k for b, k in zip(blocks, even, strict=True) if b.kind == "attention"}) == 1
    assert allocation.removed_share(blocks, even) >= ratio and damage(kept) <= damage(even) + 1e-9


def test_a_budget_of_flops_or_time_is_a_share_of_them():
    model, ids = FAMILIES["llama-gqa"](), token_ids()
    blocks = find_blocks(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    by = {"importance": "wanda-sp", "allocation": "damage", "skip_layers": 0}
    flops = compose("ppsp", budget="flops", **by)
    whole = blocks_flops(blocks, [b.units for b in blocks], 1, WINDOWS.shape[1])
    calibration = Preparation(model, WINDOWS)
    with attach(model, flops, 0.3, calibration=calibration) as handle, torch.no_grad():
        kept = [len(k.units) for k in handle.kept_units()]
        saved = whole - blocks_flops(blocks, kept, 1, WINDOWS.shape[1])
        assert 0.3 * whole <= saved < 0.33 * whole
        model(input_ids=ids)
    time = compose("ppsp", budget="time", **by)
    measured = calibration.statistics(time, 0.25).damages
    assert all(
        d.saving >= 1 and d.whole == d.saving * b.units
        for b, d in zip(blocks, measured.values(), strict=True)
    )
    assert all(v.equal(before[k]) for k, v in model.state_dict().items())
    with attach(model, time, 0.25, calibration=calibration) as handle:
        kept = [len(k.units) for k in handle.kept_units()]
    costs = measured.values()
    saved = sum((b.units - k) * d.saving for b, k, d in zip(blocks, kept, costs, strict=True))
    assert saved >= 0.25 * sum(d.whole for d in costs) - 1
    with pytest.raises(UsageError, match="needs allocation 'damage'"):
        compose("ppsp", budget="flops")
    with pytest.raises(UsageError, match="one step"):
        prune(model, time, 0.3, calibration=WINDOWS, steps=2)


def test_the_time_of_a_unit_is_measured_on_the_model_as_it_stays():
    model = FAMILIES["opt"]()
    blocks = find_blocks(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    times = unit_nanoseconds(model, blocks, token_ids(2, 16), rounds=2)
    assert len(times) == len(blocks) and all(t >= 1 for t in times)
    assert unit_flops(blocks, 16)[0] * blocks[0].units == block_flops(blocks[0], blocks[0].units, 1, 16)
    assert all(v.equal(before[k]) for k, v in model.state_dict().items())


def test_what_is_not_to_be_pruned_stays_whole(judged):
    _, blocks, found = judged
    request = Request(blocks, 0.2, damages=found, skip_layers=1, round_to=8, kinds=("mlp",))
    kept = allocation.least_damage(request)
    for b, k in zip(blocks, kept, strict=True):
        assert k == b.units if b.layer < 1 or b.kind == "attention" else k % 8 == 0
    with pytest.raises(UsageError, match="cannot be met"):
        allocation.least_damage(Request(blocks, 0.9, damages=found, kinds=("mlp",), skip_layers=4))


@pytest.mark.parametrize("allocating", ["damage", "damage-even"])
@pytest.mark.parametrize("family", ["llama-gqa", "opt"])
def test_a_method_that_allocates_by_damage_prunes_what_it_shows(family, allocating):
    model, ids = FAMILIES[family](), token_ids()
    method = compose(
        "ppsp",
        importance="obs",
        allocation=allocating,
        compensation=Refit(damping=(0.1,), sensitivity=2),
        skip_layers=0,
    )
    with attach(model, method, 0.3, calibration=WINDOWS) as handle, torch.no_grad():
        shown, kept = model(input_ids=ids).logits, handle.kept_units()
        assert 0.3 <= handle.removed_share < 0.33
    done = prune(model, method, 0.3, calibration=WINDOWS)
    assert [k.units for k in done.kept] == [k.units for k in kept]
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, shown, rtol=1e-3, atol=1e-3)


def test_damages_that_are_missing_are_asked_for():
    model = FAMILIES["llama"]()
    method = compose("ppsp", allocation="damage", name="by-damage")
    assert with_equal_widths(method).allocation == "damage-even"
    with pytest.raises(UsageError, match="no damage curve that fits"):
        attach(model, method, 0.3, calibration=Given(model, Statistics(calibrate(model, WINDOWS))))


def test_one_width_for_all_layers_needs_all_layers():
    with pytest.raises(UsageError, match="one width"):
        compose("ppsp", allocation="damage-even")
    with pytest.raises(UsageError, match="one width"):
        allocation.least_damage_even(Request(find_blocks(FAMILIES["llama"]()), 0.3, skip_layers=1))
