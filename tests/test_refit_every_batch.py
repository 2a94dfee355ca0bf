"""Methods that keep their units and refit MLPs at every batch: against least squares and masked models."""

from dataclasses import replace

import pytest
import torch
from refitting import WINDOWS, consumers_of, following, logits, refitted_dense, watched
from tiny import FAMILIES, token_ids

from probeprune import Compensation, Once, Probe, Refit, RefitEveryBatch, UsageError, attach, find_blocks
from probeprune.algebra.least_squares import FLOOR
from probeprune.preparation import Preparation
from probeprune.strategies.refit_every_batch import SAMPLE

ORDERS = [(family, "obs") for family in FAMILIES]
ORDERS += [(family, order) for family in ("llama-gqa", "opt") for order in ("wanda-sp", "flap", "magnitude")]
"""Families, and orders by importance of the units that stay."""


@pytest.mark.parametrize(("family", "importance"), ORDERS)
def test_a_method_that_follows_the_batch_refits_its_mlps_and_leaves_no_trace(family, importance):
    """The model under it is the dense one with other units' columns at zero and the weights shown."""
    model = FAMILIES[family]()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    method = following(importance=importance)
    preparation = Preparation(model, WINDOWS)
    consumers = preparation.statistics(method, 0.4).consumers
    mlps = {b.name for b in find_blocks(model) if b.kind == "mlp"}
    assert {n for n, c in consumers.items() if c.inverse is not None} == mlps & consumers.keys()
    outputs = []
    with attach(model, method, 0.4, calibration=preparation) as handle:
        assert {b.name for b in handle.probed[0]} == mlps & consumers.keys()
        for ids in (token_ids(4, 12, seed=5), token_ids(4, 12, seed=6), token_ids(4, 12, seed=5)):
            outputs.append(logits(model, ids))
            want = logits(refitted_dense(family, handle), ids)
            torch.testing.assert_close(outputs[-1], want, rtol=1e-3, atol=1e-3)
            assert all(
                k.units == tuple(consumers[k.name].units.tolist())
                for k in handle.kept_units()
                if k.name in consumers
            )
    assert outputs[0].equal(outputs[2]), "no batch leaves anything to the next"
    with attach(model, replace(method, when=Once()), 0.4, calibration=preparation):
        assert (logits(model, token_ids(4, 12, seed=5)) - outputs[0]).abs().max() > 1e-3
    after = model.state_dict()
    assert before.keys() == after.keys() and all(v.equal(after[k]) for k, v in before.items())
    # What it was attached with is as it was: weights shown are copies.
    again = consumers_of(model, method, 0.4)
    assert all(
        c.units.equal(again[n].units) and c.weight.equal(again[n].weight) for n, c in consumers.items()
    )


def test_a_batch_that_overflows_is_an_error_and_the_next_one_is_not():
    model, method = FAMILIES["llama"](), following()
    preparation = Preparation(model, WINDOWS)
    with attach(model, method, 0.4, calibration=preparation) as handle:
        before = logits(model, token_ids())
        norm = handle.probed[0][0].norm.weight
        own = norm.detach().clone()
        with torch.no_grad():
            norm.fill_(float("inf"))
        with pytest.raises(FloatingPointError, match="refit of"):
            logits(model, token_ids())
        with torch.no_grad():
            norm.copy_(own)
        assert logits(model, token_ids()).equal(before)


@pytest.mark.parametrize("share", [0.2, 0.6])
@pytest.mark.parametrize(
    ("family", "importance"),
    [(f, "obs") for f in ("llama-gqa", "opt", "gemma2", "gpt-neox", "phi3")]
    + [("llama-gqa", "wanda-sp"), ("opt", "wanda-sp")],
)
def test_what_a_batch_is_refitted_to_is_calibration_and_probe(family, importance, share):
    """Everything is probed, so that its share can be told from outside, and by least squares in float64."""
    model, twin = FAMILIES[family](), FAMILIES[family]()
    damping, ids = 0.3, token_ids(4, 12, seed=5)
    how = Refit(damping=(damping,), sequential=False, share=0.0, sensitivity=0)
    probe = Probe(tokens=1.0, samples=1.0)
    method = following(how, probe, share, importance=importance, blocks=("mlp",), skip_layers=0)
    mlps = [b for b in find_blocks(model) if b.kind == "mlp"]
    given, seen = {}, {}
    with attach(model, method, 0.3, calibration=WINDOWS) as handle:
        hooks = [
            b.entry.register_forward_pre_hook(
                lambda _, a, k, n=b.name: given.update({n: (a, k)}), with_kwargs=True
            )
            for b in mlps
        ] + [b.consumer.register_forward_hook(lambda _, a, o, n=b.name: seen.update({n: o})) for b in mlps]
        logits(model, ids)
        for hook in hooks:
            hook.remove()
        kept = {k.name: torch.tensor(k.units) for k in handle.kept_units()}
    for block in (b for b in find_blocks(twin) if b.kind == "mlp"):
        units, bias = kept[block.name], block.consumer.bias
        before = watched(twin, block, WINDOWS)
        z, t = (before[k].reshape(-1, before[k].shape[-1]).double() for k in ("z", "output"))
        now = {}
        hook = block.consumer.register_forward_hook(lambda _, a, o, now=now: now.update(z=a[0], output=o))
        args, kwargs = given[block.name]
        with torch.no_grad():
            block.run(*args, **kwargs)
        hook.remove()
        own_z, own_t = (now[k].reshape(-1, now[k].shape[-1]).double() for k in ("z", "output"))
        weight = block.consumer.weight.detach().double()[:, units]
        shift, target_shift = (z.mean(0), t.mean(0)) if bias is not None else (0 * z[0], 0 * t[0])
        x, y, own_x, own_y = z - shift, t - target_shift, own_z - shift, own_t - target_shift
        squares = x.square().mean(0)
        strength = damping * squares.clamp_min(FLOOR * squares.median())[units]
        prior = SAMPLE * (1 / share - 1)  # tokens that all of the calibration text counts as
        tokens = (len(x) / prior) ** 0.5
        rows = torch.cat([x[:, units], len(x) ** 0.5 * strength.sqrt().diag(), tokens * own_x[:, units]])
        damped = len(x) ** 0.5 * strength.sqrt()[:, None] * weight.T
        fitted = torch.linalg.lstsq(rows, torch.cat([y, damped, tokens * own_y])).solution
        want = own_x[:, units] @ fitted + target_shift
        got = seen[block.name].reshape(want.shape).double()
        assert (got - want).norm() < 2e-3 * want.norm(), block.name


@pytest.mark.parametrize("family", ["llama-gqa", "opt"])
def test_what_padding_holds_moves_no_refit(family):
    model = FAMILIES[family]()
    method = following(Refit(damping=(1e-1,), sensitivity=2))
    preparation = Preparation(model, WINDOWS)
    mask = torch.ones(4, 12, dtype=torch.long)
    mask[1, :5] = mask[3, :2] = 0
    ids, outputs = token_ids(4, 12, seed=5), []
    for padding in (1, 7):
        with attach(model, method, 0.4, calibration=preparation), torch.no_grad():
            seen = model(input_ids=ids.masked_fill(mask == 0, padding), attention_mask=mask).logits
        outputs.append(seen[mask == 1])
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-4)
    with attach(model, method, 0.4, calibration=preparation), torch.no_grad():
        other = model(input_ids=ids.roll(1, 0), attention_mask=mask.roll(1, 0)).logits.roll(-1, 0)[mask == 1]
    torch.testing.assert_close(outputs[0], other, rtol=1e-3, atol=1e-3)  # nor does the order of the batch


@pytest.mark.parametrize("family", ["llama-gqa", "opt", "gpt-neox"])
def test_text_goes_on_under_the_weights_its_prompt_was_refitted_to(family):
    model, method = FAMILIES[family](), following()
    preparation = Preparation(model, WINDOWS)
    ids = token_ids(2, 10, seed=5)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with attach(model, method, 0.4, calibration=preparation) as handle:
        text = model.generate(ids, **options)
        dense = refitted_dense(family, handle)
    assert text.equal(dense.generate(ids, **options))


@pytest.mark.parametrize("importance", ["wanda-sp", "flap", "magnitude"])
def test_scored_units_are_those_of_the_static_method(importance):
    model = FAMILIES["llama-gqa"]()
    units = []
    for changes in ({}, {"when": Once()}, {"when": Once(), "compensation": Compensation()}):
        method = replace(following(importance=importance), **changes)
        with attach(model, method, 0.4, calibration=WINDOWS) as handle:
            logits(model, token_ids())
            units.append(handle.kept_units())
    assert units[0] == units[1] == units[2]


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 2.0])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(UsageError, match=r"share must be a number in \(0, 1\), not "):
        RefitEveryBatch(share=share)
