"""State beside the weights follows them, and the probe is seen by nobody: over all methods and families."""

import types

import pytest
import torch
from all_methods import ALL, RATIO, SPREAD, prepared
from tiny import FAMILIES, close, masked, padded, snapshot, token_ids

from probeprune import attach, find_blocks, prepare

EACH = pytest.mark.parametrize("family, name", SPREAD)
EACH_DYNAMIC = pytest.mark.parametrize("family, name", [(f, n) for f, n in SPREAD if ALL[n].when.every_batch])
BATCHES = [padded("left"), padded("right"), padded("none", 3, 30)]


def dense_model(family):
    return FAMILIES[family]()


@torch.no_grad()
def logits(model, ids, mask=None):
    return model(ids, attention_mask=mask).logits


# -- autocast --------------------------------------------------------------------------------------


@EACH
def test_batches_in_one_autocast_region_are_as_without_its_cache(family, name):
    model, calibration = prepared(family)

    def run(cached):
        with (
            torch.no_grad(),
            attach(model, ALL[name], RATIO, calibration=calibration) as handle,
            torch.autocast("cpu", torch.bfloat16, cache_enabled=cached),
        ):
            return [(logits(model, *batch), handle.kept_units()) for batch in BATCHES]

    for (got, units), (expected, chosen) in zip(run(True), run(False), strict=True):
        assert units == chosen and got.equal(expected)


@EACH
def test_the_dense_model_is_itself_after_detaching_inside_an_autocast_region(family, name):
    model, calibration = prepared(family)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        dense = logits(model, *BATCHES[0])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with attach(model, ALL[name], RATIO, calibration=calibration):
            logits(model, *BATCHES[0])
        assert logits(model, *BATCHES[0]).equal(dense)


# -- casts and moves -------------------------------------------------------------------------------

WAYS = {
    "bfloat16": lambda m: m.to(torch.bfloat16),
    "bfloat16 and back": lambda m: m.to(torch.bfloat16).to(torch.float32),
    "double": lambda m: m.double(),
    "cpu": lambda m: m.cpu(),
    "float": lambda m: m.float(),
}


LOSSY = ("bfloat16", "bfloat16 and back")
SCHEDULES = ("wanda-sp", "probe", "best-dynamic")
CASTS = [(f, w, n) for f, n in SPREAD for w in WAYS if w in LOSSY or n in SCHEDULES]
"""(family, way, method): every method where digits are lost, and one of each schedule where none are."""


@pytest.mark.parametrize("family, way, name", CASTS)
def test_a_model_cast_while_attached_goes_on_in_its_new_dtype(family, way, name):
    calibration = prepared(family)[1]
    model, twin = dense_model(family), WAYS[way](dense_model(family))
    handle = attach(model, ALL[name], RATIO, calibration=calibration)
    logits(model, *BATCHES[0])
    WAYS[way](model)
    got, units = logits(model, *BATCHES[1]), handle.kept_units()
    assert got.dtype == twin.dtype and got.isfinite().all()
    method = ALL[name]
    if method.compensation.kind == "none":
        blocks = find_blocks(twin, method.unit_kind)
        with masked([(b, k.units) for b, k in zip(blocks, units, strict=True)]):
            error = (logits(twin, *BATCHES[1]) - got).abs()[BATCHES[1][1].bool()].max()
        assert error < (0.1 if twin.dtype == torch.bfloat16 else 1e-3) * got.abs().max()
    handle.detach()
    for (n, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert p.dtype == q.dtype and p.equal(q), n
    assert logits(model, *BATCHES[0]).equal(logits(twin, *BATCHES[0]))


# -- autograd --------------------------------------------------------------------------------------


@EACH_DYNAMIC
def test_gradients_across_a_later_batch_are_right_or_autograds_error(family, name):
    model, calibration = prepared(family)
    embed = model.get_input_embeddings()
    a, b = (embed(ids).detach() for ids, _ in (padded("none"), padded("none", 4, 24)))
    b = b.flip(0) * 1.5
    model.requires_grad_(False)
    try:
        with attach(model, ALL[name], RATIO, calibration=calibration):
            alone = a.clone().requires_grad_()
            model(inputs_embeds=alone).logits.square().mean().backward()
        with attach(model, ALL[name], RATIO, calibration=calibration) as handle:
            first = a.clone().requires_grad_()
            loss = model(inputs_embeds=first).logits.square().mean()
            before = handle.swapped
            with torch.no_grad():
                model(inputs_embeds=b)
            try:
                loss.backward()
            except RuntimeError as error:
                assert "modified by an inplace operation" in str(error)
                return
            assert handle.swapped == before or ALL[name].when.probe.parallel
        close(first.grad, alone.grad)
    finally:
        model.requires_grad_(True)


# -- a probe that nobody else sees -----------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["wanda-sp", "probe", "full-batch", "best-dynamic", "parallel"])
def test_recorders_see_the_models_own_pass(family, name):
    model, calibration = prepared(family)
    ids, mask = padded("left")
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with attach(model, ALL[name], RATIO, calibration=calibration) as handle, torch.no_grad():
            out = model(ids, attention_mask=mask, output_attentions=True, output_hidden_states=True)
        heads = [
            k * b.group_size if b.unit_kind == "group" else k
            for b, k in zip(handle.blocks, handle.widths, strict=True)
            if b.kind == "attention"
        ]
    finally:
        model.set_attn_implementation(implementation)
    assert [tuple(a.shape) for a in out.attentions] == [(4, h, 24, 24) for h in heads]
    assert [tuple(h.shape[:2]) for h in out.hidden_states] == [(4, 24)] * (len(heads) + 1)


@EACH
def test_hooks_of_others_run_once_a_pass_with_the_passs_own_shapes(family, name):
    model, calibration = prepared(family)
    ids, mask = padded("left")
    with attach(model, ALL[name], RATIO, calibration=calibration) as handle:
        expected = logits(model, ids, mask)
        seen: dict[str, int] = {}
        hooks = []
        for block in handle.blocks:
            for place, module in (("entry", block.entry), ("consumer", block.consumer), ("norm", block.norm)):
                if module is None:
                    continue
                key = f"{block.name} {place}"

                def count(m, args, kwargs, out, key=key):
                    x = args[0] if args else kwargs["hidden_states"]
                    assert x.numel() // x.shape[-1] == ids.numel()
                    seen[key] = seen.get(key, 0) + 1

                hooks.append(module.register_forward_hook(count, with_kwargs=True))
        got = logits(model, ids, mask)
    for hook in hooks:
        hook.remove()
    assert len(seen) >= 2 * len(handle.blocks) and set(seen.values()) == {1}
    if ALL[name].when.every_batch is False:
        assert got.equal(expected)


@EACH_DYNAMIC
def test_steering_and_cache_presses_run_under_every_dynamic_method(family, name):
    model, calibration = prepared(family)
    ids, mask = padded("left")
    blocks = [b for b in find_blocks(model) if b.layer == 4]
    steer = torch.randn(48, generator=torch.Generator().manual_seed(0))
    pressed = []

    def press(module, args, kwargs, out):  # what hooks that compress the cache do
        cache = next(a for a in (*args, *kwargs.values()) if hasattr(a, "get_seq_length"))
        pressed.append(cache.layers[4].keys.shape[-2])

    hooks = [blocks[1].consumer.register_forward_hook(lambda m, a, out: out + steer)]
    hooks.append(blocks[0].entry.register_forward_hook(press, with_kwargs=True))
    try:
        with attach(model, ALL[name], RATIO, calibration=calibration), torch.no_grad():
            steered = model(ids, attention_mask=mask, use_cache=True).logits
        hooks[0].remove()
        with attach(model, ALL[name], RATIO, calibration=calibration), torch.no_grad():
            plain = model(ids, attention_mask=mask, use_cache=True).logits
    finally:
        for hook in hooks:
            hook.remove()
    window = getattr(model.config, "sliding_window", None) or 25
    assert pressed == [min(24, window - 1)] * 2 and not steered.equal(plain)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["magnitude", "probe", "full-batch"])
def test_replaced_forwards_of_linear_maps_run_and_stay(family, name):
    """As accelerate's hooks and other patches do; here they double a producer's output."""
    model, calibration = prepared(family)
    producer = find_blocks(model)[-1].producers[0]
    own = producer.forward

    def doubled(self, x):
        return 2 * own(x)

    before = logits(model, *BATCHES[0])
    producer.forward = types.MethodType(doubled, producer)
    try:
        dense = logits(model, *BATCHES[0])
        assert not dense.equal(before)
        state = snapshot(model)
        with attach(model, ALL[name], RATIO, calibration=calibration):
            assert logits(model, *BATCHES[0]).isfinite().all()
        state.assert_untouched()
        assert producer.__dict__["forward"].__func__ is doubled
        assert logits(model, *BATCHES[0]).equal(dense)
    finally:
        del producer.__dict__["forward"]
    assert logits(model, *BATCHES[0]).equal(before)


def test_calibration_prepared_before_serves_a_model_with_hooks():
    model = dense_model("llama-gqa")
    calls = []
    model.model.layers[4].mlp.register_forward_hook(lambda *_: calls.append(1))
    prepare(model, "probe", RATIO, token_ids(4, 16), batch_size=2)
    assert len(calls) == 2, "calibration is the model's own pass"
