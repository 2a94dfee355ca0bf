"""Gates: what training under a budget learns of units, and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from accelerate import cpu_offload
from tiny import FAMILIES, SHAPE, snapshot, token_ids
from transformers import LlamaConfig, LlamaForCausalLM

from probeprune import (
    METHODS,
    Gates,
    Gradients,
    attach,
    compose,
    find_blocks,
    load_prepared,
    prepare,
    prune,
    records,
)
from probeprune.algebra.soft_threshold import soft_keep
from probeprune.calibration import gates as training
from probeprune.calibration.gates import Budget, gated, learn_gates
from probeprune.calibration.gradient_footprints import gates as gates_phase
from probeprune.errors import UsageError
from probeprune.methods import TABLES, Method
from probeprune.model.described import empty_like
from probeprune.model.footprint import LiveBytes, Phase, Rehearsal
from probeprune.model.placing import place
from probeprune.plan import parts_of
from probeprune.processes import shares

WINDOWS = token_ids(12, 16, seed=5)
FEW = Gates(steps=6, batch_size=2, length=16)


def tiny(layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "num_hidden_layers": layers})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def gates_of(how: Gates = FEW, **changes: object) -> Method:
    return compose("gates", gates=how, skip_layers=0, **changes)


# -- the soft threshold ------------------------------------------------------------------------------


def test_the_gradient_is_that_of_finite_differences_and_the_budget_holds():
    torch.manual_seed(1)
    scores = torch.randn(12, dtype=torch.float64, requires_grad=True)
    costs = torch.tensor([1.0] * 9 + [40.0] * 3, dtype=torch.float64)
    for gone, temperature in ((5.0, 1.0), (60.0, 0.3), (125.0, 0.5)):
        kept = soft_keep(scores, costs, gone, temperature)
        assert abs((costs * (1 - kept)).sum().item() - gone) < 1e-9
        assert torch.autograd.gradcheck(lambda s: soft_keep(s, costs, gone, temperature), scores)  # noqa: B023


def test_it_hardens_to_the_lowest_scores_and_nothing_to_remove_keeps_all():
    scores, costs = torch.tensor([3.0, -1.0, 2.0, 0.0, 1.0]), torch.ones(5)
    assert soft_keep(scores, costs, 2.0, 1e-3).round().tolist() == [1, 0, 1, 0, 1]
    assert soft_keep(scores, costs, 0.0, 1.0).tolist() == [1] * 5


# -- the training --------------------------------------------------------------------------------------


def divergence_of(model, ids: torch.Tensor, blocks, scales: dict[str, torch.Tensor]) -> torch.Tensor:
    """KL from the dense predictions, all logits at once."""
    wanted = model(input_ids=ids).logits.log_softmax(-1)
    with gated(blocks, scales):
        logs = model(input_ids=ids).logits.log_softmax(-1)
    return (wanted.exp() * (wanted - logs)).sum(-1).mean()


def test_the_gradient_of_the_gates_is_that_of_the_whole_divergence(monkeypatch):
    monkeypatch.setattr(training, "LOGITS", 7 * SHAPE["vocab_size"])  # several parts, the last one shorter
    model, ids = tiny().double(), WINDOWS[:3]
    blocks = find_blocks(model)
    torch.manual_seed(2)
    scales = {b.name: torch.rand(b.units, dtype=torch.float64) for b in blocks}
    leaves = {n: s.clone().requires_grad_(True) for n, s in scales.items()}
    with torch.no_grad():
        whole = divergence_of(model, ids, blocks, scales)
        loss = training._backward(model, blocks, leaves, ids, ids.numel())
        torch.testing.assert_close(loss.double(), whole, rtol=1e-5, atol=0)
        for block, unit in ((blocks[0], 1), (blocks[1], 7), (blocks[3], 99)):
            moved = []
            for step in (1e-3, -1e-3):
                other = {n: s.clone() for n, s in scales.items()}
                other[block.name][unit] += step
                moved.append(divergence_of(model, ids, blocks, other))
            slope = (moved[0] - moved[1]) / 2e-3
            gradient = leaves[block.name].grad
            assert gradient is not None
            # Logits are float32.
            torch.testing.assert_close(gradient[unit], slope, rtol=1e-3, atol=1e-7)


@pytest.fixture(scope="module")
def planted():
    """A model of which some units do nothing, and what training from random scores makes of it."""
    model = tiny()
    useless = {}
    with torch.no_grad():
        for block in find_blocks(model):
            units = torch.arange(0, block.units, 3 if block.kind == "mlp" else 2)
            for unit in units.tolist():
                first = unit * block.unit_width
                block.consumer.weight[:, first : first + block.unit_width] = 0
            useless[block.name] = set(units.tolist())
    before = snapshot(model)
    how = Gates(steps=60, batch_size=4, length=16, learning_rate=0.3, start="random")
    prepared = prepare(model, gates_of(how), 0.2, WINDOWS)
    before.assert_untouched()
    assert not any(p.requires_grad and p.grad is not None for p in model.parameters())
    return model, useless, how, prepared


def test_units_that_do_nothing_leave_first(planted):
    model, useless, how, prepared = planted
    with attach(model, gates_of(how), 0.2, calibration=prepared) as handle:
        gone = {k.name: set(range(k.of)) - set(k.units) for k in handle.kept_units()}
    lost = sum(map(len, gone.values()))
    right = sum(len(units & useless[name]) for name, units in gone.items())
    assert lost > 20 and right >= 0.95 * lost


def test_training_lowers_the_divergence_on_held_out_text(planted):
    model, _, how, prepared = planted
    held_out = token_ids(8, 16, seed=77)
    found = []
    start = compose("random", allocation="global", skip_layers=0)
    for method, calibration in ((start, None), (gates_of(how, compensation="none"), prepared)):
        with torch.no_grad():
            wanted = model(input_ids=held_out).logits.log_softmax(-1)
            with attach(model, method, 0.2, calibration=calibration):
                logs = model(input_ids=held_out).logits.log_softmax(-1)
        found.append(float((wanted.exp() * (wanted - logs)).sum(-1).mean()))
    assert found[1] < 0.1 * found[0]


@pytest.mark.parametrize("allocation", ["global", "uniform", "even"])
def test_a_budget_is_met_whatever_the_allocation(allocation):
    model = tiny()
    blocks = parts_of(model, METHODS["gates"])
    total = sum(b.parameters for b in blocks)
    done = prune(model, gates_of(allocation=allocation), 0.3, calibration=WINDOWS)
    lost = sum((k.of - len(k.units)) * b.unit_parameters for k, b in zip(done.kept, blocks, strict=True))
    assert abs(lost / total - done.removed_share) < 1e-9
    # A cut ends within half a step: of a head where all compete, else of a channel, or one in each layer.
    sizes = [b.unit_parameters for b in blocks]
    step = {"global": max(sizes), "uniform": min(sizes), "even": 2 * min(sizes)}[allocation]
    assert abs(lost - 0.3 * total) <= step / 2 + 1


def test_one_seed_gives_the_same_units_and_another_order_of_text_others():
    model, blocks = tiny(), find_blocks(tiny())
    start = {b.name: torch.arange(b.units, dtype=torch.float32) for b in blocks}

    def learnt(seed: int) -> dict[str, torch.Tensor]:
        wanted = [Budget(find_blocks(model), 0.3 * sum(b.parameters for b in blocks))]
        return learn_gates(model, WINDOWS, wanted, start, FEW, seed=seed)

    first, again, other = learnt(0), learnt(0), learnt(1)
    assert all(first[n].dtype == torch.float32 and first[n].equal(again[n]) for n in first)
    assert not all(first[n].equal(other[n]) for n in first)


def test_gates_are_found_again_in_the_cache_and_a_file(tmp_path: Path, monkeypatch):
    model, method = tiny(), gates_of()
    first = prepare(model, method, 0.3, WINDOWS, cache=tmp_path)
    monkeypatch.setattr(training, "_batches", None)  # nothing is trained again
    again = prepare(model, method, 0.3, WINDOWS, cache=tmp_path)
    first.save(tmp_path / "file")
    key = next(k for k in first.pieces if k.startswith("gates"))
    for other in (again, load_prepared(tmp_path / "file")):
        assert all(first.pieces[key][n].equal(s) for n, s in other.pieces[key].items())
    with pytest.raises(UsageError, match=r"not prepared for ratio 0\.2"):
        first.statistics(model, method, 0.2)


def test_gates_start_from_gradients_too_and_follow_batches():
    model = tiny()
    method = gates_of(replace(FEW, start="param_first"), gradients=Gradients(windows=2, length=16))
    following = compose("best-dynamic", importance="gates", gates=FEW, allocation="global", skip_layers=0)
    calibration = prepare(model, [method, following], 0.3, WINDOWS)
    for m in (method, following):
        with attach(model, m, 0.3, calibration=calibration) as handle:
            model(input_ids=WINDOWS)
            assert abs(handle.removed_share - 0.3) < 0.03


def test_the_record_comes_back_from_json():
    for method in (METHODS["gates"], gates_of(), METHODS["gates+distill"]):
        assert records.from_json(Method, json.loads(json.dumps(method.record())), TABLES) == method


def test_a_plan_holds_what_a_step_takes_in_all_layers():
    model, how = tiny(6), Gates(steps=1, batch_size=4, length=48)
    blocks = find_blocks(model)
    start = {b.name: torch.arange(b.units, dtype=torch.float32) for b in blocks}
    budget = Budget(blocks, 0.3 * sum(b.parameters for b in blocks))
    with LiveBytes([*model.parameters(), *model.buffers()]) as live:
        learn_gates(model, token_ids(4, 48), [budget], start, how)
    phase = gates_phase(Rehearsal(model, torch.float32, torch.device("cpu")), how)
    assert phase.whole and phase.layers == 6
    assert phase.work == pytest.approx(live.peak, rel=0.15)


# -- refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"steps": 0}, "steps must be a whole number"),
        ({"learning_rate": 0}, "learning_rate must be a number"),
        ({"start": "wanda"}, "did you mean 'wanda-sp'"),
        ({"start": "obs"}, "has none before they are trained"),
        ({"start": "gates"}, "has none before they are trained"),
    ],
)
def test_settings_out_of_range_are_refused(settings, words):
    with pytest.raises(UsageError, match=words):
        Gates(**settings)


def test_what_cannot_work_is_refused():
    with pytest.raises(UsageError, match="trains no gates; leave gates out"):
        compose("wanda-sp", gates=Gates())
    with pytest.raises(UsageError, match="'wanda-sp' takes no gradients"):
        compose("gates", gradients=Gradients())
    with pytest.raises(UsageError, match="cannot be scored from a probe"):
        compose("probe", importance="gates")
    with pytest.raises(UsageError, match="windows of 32 tokens, and calibration has 16"):
        prepare(tiny(), gates_of(replace(FEW, length=32)), 0.3, WINDOWS)


def test_offloaded_layers_are_refused_before_any_work():
    model, said = tiny(), []
    cpu_offload(model, torch.device("cpu"))
    with pytest.raises(UsageError, match="its layers are offloaded; load it without"):
        prepare(model, gates_of(), 0.3, WINDOWS, progress=lambda *work: said.append(work))
    assert not said


def test_less_memory_than_all_layers_take_is_refused_before_the_model_is_opened():
    shape = empty_like(tiny(40))
    phases = [Phase("gates", 1 << 30, layers=40, whole=True)]
    limit = psutil.Process().memory_info().rss + (512 << 20)
    with pytest.raises(UsageError, match="all layers in memory, which gates need"):
        place("m", shape, torch.float32, torch.device("cpu"), limit, lambda *_: phases)


def test_overflow_names_the_step():
    model = FAMILIES["llama-gqa"]()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    method = gates_of(replace(FEW, start="magnitude"))
    with pytest.raises(FloatingPointError, match="NaN or infinite at step 1 of 6"):
        prune(model, method, 0.3, calibration=WINDOWS)


def test_shares_of_a_step_add_up_to_the_whole(monkeypatch):
    """Two processes, played one after the other: each has the gradient of its windows."""
    model, ids = tiny(), WINDOWS[:4]
    blocks = find_blocks(model)

    def gradients(rows: torch.Tensor) -> torch.Tensor:
        leaves = {b.name: torch.full((b.units,), 0.5, requires_grad=True) for b in blocks}
        training._backward(model, blocks, leaves, rows, ids.numel())
        return torch.cat([torch.zeros(len(g)) if g.grad is None else g.grad for g in leaves.values()])

    parts = gradients(ids[:3]) + gradients(ids[3:]) + gradients(ids[:0])
    torch.testing.assert_close(parts, gradients(ids), rtol=1e-4, atol=1e-7)
    assert not shares.active()
