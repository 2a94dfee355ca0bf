"""Hybrids: layers that have attention or an MLP are pruned there, and what else mixes tokens stays whole."""

import pytest
import tiny_families
import torch
from test_cost import outside_blocks
from test_families import (
    DENSE_FIRST,
    IDS,
    MASK,
    PROBE,
    TOLD,
    WINDOWS,
    balanced,
    check_checkpoint,
    check_flops,
    check_masked,
    even,
    noting,
    seen,
)
from test_families import test_a_plain_config_holds_fewer_heads_where_the_record_says_so as plain_heads
from test_families import (
    test_all_units_in_any_order_are_the_dense_block_and_restoring_puts_them_back as any_order,
)
from test_families import test_logits_by_parts_are_the_models_own as by_parts
from tiny import PARALLEL, close, kept, logits, snapshot

from probeprune import attach, compose, find_blocks
from probeprune.model.families import find_family

pytestmark = pytest.mark.filterwarnings("ignore:no head of 4 of 6 attention blocks|no head of 5 of 6")
test_any_order, test_by_parts, test_plain_heads = any_order, by_parts, plain_heads
BESIDE = compose(PARALLEL, skip_layers=0)


def half(model) -> float:
    """The ratio, of all blocks, at which about half of what is no mixer goes."""
    blocks = find_blocks(model)
    whole = sum(b.parameters for b in blocks if b.whole is not None)
    return 0.51 * (1 - whole / sum(b.parameters for b in blocks))


def may_go(handle) -> list:
    """The blocks that can lose units: of a single key-value head, its group cannot."""
    return [b for b in handle.blocks if b.whole is None and b.units > 1]


@pytest.fixture(scope="module", params=tiny_families.HYBRIDS)
def row(request):
    """The name of a row, its model, and that model's logits on a padded batch."""
    model = tiny_families.build(request.param)()
    return request.param, model, logits(model, IDS, MASK)


def test_blocks_are_all_linear_maps_of_the_layers(row):
    _, model, _ = row
    blocks = find_blocks(model)
    weights = sum(
        p.numel()
        for path, module in model.named_modules()
        if ".layers." in path and isinstance(module, torch.nn.Linear)
        for p in module.parameters()
    )
    assert sum(b.parameters for b in blocks) == weights
    assert {b.kind for b in blocks} == {"attention", "mlp", "mixer"}
    shared = set(getattr(model.config, "kv_sharing_modes", [])) & {"store", "reuse"}
    assert all(b.whole is not None for b in blocks if b.kind == "mixer")
    assert any(b.whole is not None for b in blocks if b.kind != "mixer") == bool(shared)
    ran: list[str] = []
    for block in blocks:
        read: dict[str, torch.Tensor] = {}
        hooks = [
            block.entry.register_forward_pre_hook(noting(read, "entry"), with_kwargs=True),
            block.consumer.register_forward_hook(lambda *_, name=block.name: ran.append(name)),
        ]
        if block.norm is not None:
            hooks.append(block.norm.register_forward_hook(lambda _, a, out, r=read: r.update(normed=out)))
        logits(model, IDS, MASK)
        for hook in hooks:
            hook.remove()
        if block.norm is not None:
            close(read["entry"], read["normed"] * block.input_factor)
    assert ran == [b.name for b in blocks]


def test_flops_counted_are_those_of_the_formulas(row):
    _, model, _ = row
    rest = outside_blocks(model, 3)  # convolutions, states and rotary angles
    assert rest >= 0
    check_flops(model, rest, half(model))


@pytest.mark.parametrize("method", [PROBE, BESIDE, None], ids=["probe", "beside", "balanced"])
def test_a_batch_is_the_dense_model_masked_and_detaching_restores_all_bits(row, method):
    _, model, dense = row
    before, ratio, method = snapshot(model), half(model), method or balanced(model)
    with attach(model, method, ratio, calibration=WINDOWS) as handle:
        got, choice = logits(model, IDS, MASK), kept(handle)
        assert {b.kind for b, units in choice if len(units) < b.units} == {b.kind for b in may_go(handle)}
        assert handle.removed_share == pytest.approx(ratio, abs=0.03)
        cached = model.generate(IDS, attention_mask=MASK, **TOLD)
        prompted = kept(handle)
    check_masked(model, before, (got, choice), (cached, prompted))
    assert (got - dense).abs().max() > 0.01 * dense.abs().max(), "nothing was pruned"
    assert logits(model, IDS, MASK).equal(dense)


def test_a_cut_model_and_its_checkpoints_are_the_dense_one_masked(row, tmp_path):
    name, model, _ = row
    both = find_family(model).attention.plain_heads
    for method, layout in ((even(both), "uniform"), (compose(DENSE_FIRST, skip_layers=1), None)):
        folder = tmp_path / method.name.replace(" ", "-")
        build = tiny_families.build(name)
        _, loaded = check_checkpoint(model, build, seen, method, 0.2, folder, layout)
    tokens = [loaded.generate(IDS, attention_mask=MASK, use_cache=c, **TOLD) for c in (True, False)]
    assert tokens[0].equal(tokens[1])


@pytest.mark.parametrize("method", ["best-static", "flap", "best-dynamic"])
def test_methods_that_calibrate_in_every_way_run_on_layers_without_attention(method):
    model = tiny_families.build("nemotron_h")()
    before = snapshot(model)
    chosen = compose(method, skip_layers=0)
    with attach(model, chosen, 0.1, calibration=WINDOWS) as handle:
        choice = kept(handle)
        assert logits(model, IDS, MASK).isfinite().all()
    assert any(len(units) < b.units for b, units in choice)
    before.assert_untouched()
