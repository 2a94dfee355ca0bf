"""The least-squares refit: against LAPACK's least squares, slow obvious versions, and files on disk."""

from dataclasses import replace

import pytest
import torch
from tiny import FAMILIES, token_ids
from transformers import AutoModelForCausalLM

from probeprune import Probe, Refit, attach, calibrate, compose, find_blocks, prune, save, with_equal_widths
from probeprune.algebra.elimination import LOOKS, eliminate
from probeprune.algebra.least_squares import FLOOR, Gram, solve, squared_error
from probeprune.calibration.refit import refit
from probeprune.calibration.sensitivity import sensitivities
from probeprune.calibration.statistics import Statistics
from probeprune.errors import UsageError
from probeprune.runtime.block import SAMPLE
from probeprune.surgery import method_consumers

WINDOWS = token_ids(24, 24, seed=3)


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def refitting(base="wanda-sp", how=None, **changes):
    options = {"skip_layers": 1, "compensation": "least-squares", "refit": how or Refit(), **changes}
    return compose(base, name="refitted", **options)


# -- the arithmetic ----------------------------------------------------------------------------


def explicit(weight, bias, z, t, damping):
    """Damped least squares by LAPACK in float64: the damping as rows of its own under the data."""
    z, t, weight = z.double(), t.double(), weight.double()
    if bias is not None:
        z_mean, t_mean = z.mean(0), t.mean(0)
        z, t = z - z_mean, t - t_mean
    squares = (z**2).sum(0)
    rows = torch.cat([z, (damping * squares.clamp_min(FLOOR * squares.median())).sqrt().diag()])
    lacks = torch.cat([t - z @ weight.T, torch.zeros(z.shape[1], len(weight), dtype=torch.float64)])
    fitted = weight + torch.linalg.lstsq(rows, lacks).solution.T
    return fitted, None if bias is None else t_mean - fitted @ z_mean


def data(seed=0, tokens=300, k=12, d=5):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(tokens, k, generator=g) @ torch.randn(k, k, generator=g) + 3
    weight, bias = torch.randn(d, k, generator=g), torch.randn(d, generator=g)
    t = torch.randn(tokens, d, generator=g) + z @ torch.randn(k, d, generator=g) - 2
    return z, t, weight, bias


def streamed(z, t, part=70):
    gram = Gram(z.shape[1], t.shape[1])
    for start in range(0, len(z), part):
        gram.update(z[start : start + part], t[start : start + part])
    return gram


@pytest.mark.parametrize("damping", [1e-6, 1e-2, 1.0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_refit_is_lapacks_least_squares(with_bias, damping):
    z, t, weight, bias = data()
    bias = bias if with_bias else None
    got, shift = solve(streamed(z, t), weight, bias, damping)
    want, want_shift = explicit(weight, bias, z, t, damping)
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-4)
    assert (shift is None) == (not with_bias)
    if shift is not None:
        torch.testing.assert_close(shift.double(), want_shift, rtol=1e-3, atol=2e-3)
    # And the error it reports is that of the tokens.
    missed = (t - z @ got.T - (0 if shift is None else shift)).double().square().sum(1).mean()
    assert squared_error(streamed(z, t), got, shift) == pytest.approx(float(missed), rel=1e-3)
    assert missed <= squared_error(streamed(z, t), weight, bias)


def test_moments_merge_exactly_and_a_perfect_weight_stays():
    z, t, weight, bias = data()
    merged = streamed(z[:100], t[:100])
    merged.merge(streamed(z[100:], t[100:]))
    whole = Gram(z.shape[1], t.shape[1])
    whole.update(z, t)
    for name in ("z_mean", "t_mean", "zz", "tz", "tt"):
        torch.testing.assert_close(getattr(merged, name), getattr(whole, name), rtol=1e-4, atol=1e-2)
    perfect = streamed(z, z @ weight.T + bias)
    got, shift = solve(perfect, weight, bias, 1e-2)
    torch.testing.assert_close(got, weight, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(shift, bias, rtol=1e-3, atol=1e-3)


def test_moments_that_cannot_be_factorised_are_an_error():
    with pytest.raises(FloatingPointError, match="factorised"):
        solve(streamed(torch.zeros(8, 3), torch.zeros(8, 2)), torch.ones(2, 3), None, 0.1)
    z = torch.ones(8, 3)
    z[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="factorised"):
        solve(streamed(z, torch.zeros(8, 2)), torch.ones(2, 3), None, 0.1)


# -- on models ---------------------------------------------------------------------------------


def watched(model, block, windows):
    """The residual in front of a block, and its consumer's input and output, of a whole model."""
    seen = {}
    attention = next(b for b in find_blocks(model) if b.layer == block.layer)
    hooks = [
        block.norm.register_forward_pre_hook(lambda _, a: seen.update(residual=a[0])),
        block.consumer.register_forward_hook(lambda _, a, o: seen.update(z=a[0], output=o)),
        attention.consumer.register_forward_hook(lambda _, a, o: seen.update(attention=o)),
    ]
    logits(model, windows)
    for hook in hooks:
        hook.remove()
    if getattr(model.config, "use_parallel_residual", False) and block.kind == "mlp":
        seen["residual"] = seen["residual"] + seen["attention"]  # both are added to one residual
    return seen


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
        weight, own = block.consumer.weight.detach()[:, channels], block.consumer.bias
        fitted[block.name] = weight, bias = explicit(weight, own, z, target, *how.damping)
        with torch.no_grad():
            twin.consumer.weight.zero_()
            twin.consumer.weight[:, channels] = weight
            if bias is not None:
                twin.consumer.bias.copy_(bias)
    return fitted


def some(model):
    """Two thirds of the units of three layers' blocks."""
    g = torch.Generator().manual_seed(0)
    return {
        b.name: torch.randperm(b.units, generator=g)[: max(b.units * 2 // 3, 1)].sort().values
        for b in find_blocks(model)
        if b.layer in (1, 2, 4)
    }


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0, None], ids="share={}".format)
@pytest.mark.parametrize("family", ["llama-gqa", "mistral", "opt", "gpt-neox", "gpt-neox-sequential"])
def test_a_refit_is_what_whole_models_give_block_by_block(family, share):
    how = Refit(damping=(1e-2,), share=share or 0.0, sequential=share is not None)
    model = FAMILIES[family]()
    kept = some(model)
    got = refit(model, kept, WINDOWS, how, batch_size=5)
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
    got = refit(model, counts, WINDOWS, how, metrics=metrics, batch_size=5)
    again = refit(model, {name: c.units for name, c in got.items()}, WINDOWS, how, batch_size=5)
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
    chosen = refit(model, {name: len(u) for name, u in kept.items()}, WINDOWS, how)
    drawn = refit(model, kept, WINDOWS, how)
    assert all(chosen[name].error < drawn[name].error for name in kept)


@pytest.mark.parametrize("importance", ["random", "obs"])
@pytest.mark.parametrize("units", ["group", "balanced"])
@pytest.mark.parametrize("family", FAMILIES)
def test_window_and_cut_and_checkpoint_show_the_refit_and_detaching_leaves_no_trace(
    family, units, importance, tmp_path
):
    model = FAMILIES[family]()
    method = refitting(
        "random", importance=importance, unit_kind=units, how=Refit(damping=(1e-1,), sensitivity=2)
    )
    before, ids = {k: v.clone() for k, v in model.state_dict().items()}, token_ids()
    consumers = method_consumers(model, method, 0.3, WINDOWS, batch_size=8)
    statistics = replace(calibrate(model, WINDOWS[:2]), consumers=consumers)
    plain = replace(method, importance="random", compensation="none", refit=None)
    with attach(model, plain, 0.3):
        without = logits(model, ids)
    with attach(model, method, 0.3, calibration=calibration) as handle:
        attached = logits(model, ids)
        kept = handle.kept_units()
    assert (attached - without).abs().max() > 1e-2
    after = model.state_dict()
    assert before.keys() == after.keys() and all(v.equal(after[k]) for k, v in before.items())
    done = prune(model, method, 0.3, calibration=WINDOWS, batch_size=8)
    assert [k.units for k in done.kept] == [k.units for k in kept]
    torch.testing.assert_close(logits(model, ids), attached, rtol=1e-4, atol=1e-4)
    assert done.record()["refits"].keys() == consumers.keys()
    save(model, tmp_path / "out")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert logits(opened, ids).equal(logits(model, ids))


def following(how=None, **changes):
    """Static units, MLPs refitted at every batch."""
    how = how or Refit(damping=(1e-2,), sensitivity=2)
    options = {"probe": Probe(fusion="none"), **changes}
    return refitting("probe", importance="obs", how=how, **options)


def masked(family, handle):
    """A dense model with the consumers shown under the handle, other units' columns at zero."""
    dense = FAMILIES[family]()
    for block, shown, kept in zip(find_blocks(dense), handle.blocks, handle.kept_units(), strict=True):
        units = torch.tensor(kept.units)
        columns = (units[:, None] * block.unit_width + torch.arange(block.unit_width)).flatten()
        weight, bias = shown.consumer.weight.detach().clone(), shown.consumer.bias
        with torch.no_grad():
            block.consumer.weight.zero_()
            block.consumer.weight[:, columns] = weight
            if bias is not None:
                block.consumer.bias.copy_(bias)
    return dense


@pytest.mark.parametrize("family", FAMILIES)
def test_a_method_that_follows_the_batch_refits_its_mlps_and_leaves_no_trace(family):
    """The model under it is the dense one with other units' columns at zero and the weights shown."""
    model = FAMILIES[family]()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    method = following()
    consumers = method_consumers(model, method, 0.4, WINDOWS)
    mlps = {b.name for b in find_blocks(model) if b.kind == "mlp"}
    assert {n for n, c in consumers.items() if c.inverse is not None} == mlps & consumers.keys()
    outputs = []
    with attach(model, method, 0.4, statistics=Statistics(consumers=consumers)) as handle:
        assert {b.name for b in handle.probed[0]} == mlps & consumers.keys()
        for ids in (token_ids(4, 12, seed=5), token_ids(4, 12, seed=6), token_ids(4, 12, seed=5)):
            outputs.append(logits(model, ids))
            want = logits(masked(family, handle), ids)
            torch.testing.assert_close(outputs[-1], want, rtol=1e-3, atol=1e-3)
            assert all(
                k.units == tuple(consumers[k.name].units.tolist())
                for k in handle.kept_units()
                if k.name in consumers
            )
    assert outputs[0].equal(outputs[2]), "no batch leaves anything to the next"
    with attach(
        model, replace(method, when="once", probe=None), 0.4, statistics=Statistics(consumers=consumers)
    ):
        assert (logits(model, token_ids(4, 12, seed=5)) - outputs[0]).abs().max() > 1e-3
    after = model.state_dict()
    assert before.keys() == after.keys() and all(v.equal(after[k]) for k, v in before.items())
    # What it was attached with is as it was: weights shown are copies.
    again = method_consumers(model, method, 0.4, WINDOWS)
    assert all(
        c.units.equal(again[n].units) and c.weight.equal(again[n].weight) for n, c in consumers.items()
    )


def test_a_batch_that_overflows_is_an_error_and_the_next_one_is_not():
    model, method = FAMILIES["llama"](), following()
    known = Statistics(consumers=method_consumers(model, method, 0.4, WINDOWS))
    with attach(model, method, 0.4, statistics=known) as handle:
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
@pytest.mark.parametrize("family", ["llama-gqa", "opt", "gemma2", "gpt-neox", "phi3"])
def test_what_a_batch_is_refitted_to_is_calibration_and_probe(family, share):
    """Everything is probed, so that its share can be told from outside, and by least squares in float64."""
    model, twin = FAMILIES[family](), FAMILIES[family]()
    damping, ids = 0.3, token_ids(4, 12, seed=5)
    how = Refit(damping=(damping,), sequential=False, share=0.0, sensitivity=0, batch_share=share)
    probe = Probe(tokens=1.0, samples=1.0, fusion="none")
    method = following(how, probe=probe, blocks=("mlp",), skip_layers=0)
    consumers = method_consumers(model, method, 0.3, WINDOWS)
    mlps = [b for b in find_blocks(model) if b.kind == "mlp"]
    given, seen = {}, {}
    with attach(model, method, 0.3, statistics=Statistics(consumers=consumers)) as handle:
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
    known = Statistics(consumers=method_consumers(model, method, 0.4, WINDOWS))
    mask = torch.ones(4, 12, dtype=torch.long)
    mask[1, :5] = mask[3, :2] = 0
    ids, outputs = token_ids(4, 12, seed=5), []
    for padding in (1, 7):
        with attach(model, method, 0.4, statistics=known), torch.no_grad():
            seen = model(input_ids=ids.masked_fill(mask == 0, padding), attention_mask=mask).logits
        outputs.append(seen[mask == 1])
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-4)
    with attach(model, method, 0.4, statistics=known), torch.no_grad():
        other = model(input_ids=ids.roll(1, 0), attention_mask=mask.roll(1, 0)).logits.roll(-1, 0)[mask == 1]
    torch.testing.assert_close(outputs[0], other, rtol=1e-3, atol=1e-3)  # nor does the order of the batch


@pytest.mark.parametrize("family", ["llama-gqa", "opt", "gpt-neox"])
def test_text_goes_on_under_the_weights_its_prompt_was_refitted_to(family):
    model, method = FAMILIES[family](), following()
    known = Statistics(consumers=method_consumers(model, method, 0.4, WINDOWS))
    ids = token_ids(2, 10, seed=5)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with attach(model, method, 0.4, statistics=known) as handle:
        text = model.generate(ids, **options)
        dense = masked(family, handle)
    assert text.equal(dense.generate(ids, **options))


def test_consumers_are_read_back_and_made_anew_for_anything_else(tmp_path):
    model, method = FAMILIES["opt"](), following()
    first = method_consumers(model, method, 0.4, WINDOWS, cache=tmp_path)
    files = set(tmp_path.glob("*.safetensors"))
    again = method_consumers(model, method, 0.4, WINDOWS, cache=tmp_path)
    assert set(tmp_path.glob("*.safetensors")) == files
    assert first.keys() == again.keys()
    for name, consumer in first.items():
        other = again[name]
        assert consumer.record() == other.record()
        assert consumer.weight.equal(other.weight) and consumer.bias.equal(other.bias)
        assert (consumer.inverse is None) == (other.inverse is None)
        if consumer.inverse is not None:
            assert consumer.inverse.equal(other.inverse) and consumer.mean.equal(other.mean)
    for changed in (
        (method, 0.3, WINDOWS),
        (method, 0.4, WINDOWS[:20]),
        (following(Refit(damping=(1e-1,), sensitivity=2)), 0.4, WINDOWS),
    ):
        before = len(list(tmp_path.glob("*.safetensors")))
        method_consumers(model, *changed, cache=tmp_path)
        assert len(list(tmp_path.glob("*.safetensors"))) > before
    broken = max(files, key=lambda f: f.stat().st_size)
    broken.write_bytes(broken.read_bytes()[:1000])
    assert method_consumers(model, method, 0.4, WINDOWS, cache=tmp_path).keys() == first.keys()


def test_a_refit_takes_no_more_windows_than_it_may():
    model, few = FAMILIES["llama"](), refitting(how=Refit(windows=9, damping=(1e-1,)))
    known = calibrate(model, WINDOWS)
    some = method_consumers(model, few, 0.3, WINDOWS, statistics=known)
    same = method_consumers(model, few, 0.3, WINDOWS[:9], statistics=known)
    more = method_consumers(model, refitting(how=Refit(damping=(1e-1,))), 0.3, WINDOWS, statistics=known)
    assert all(c.weight.equal(same[n].weight) and not c.weight.equal(more[n].weight) for n, c in some.items())


def test_damping_is_chosen_on_the_windows_held_out_and_may_be_none():
    model = FAMILIES["opt"]()
    kept = some(model)
    how = Refit(damping=(1e-3, 1e-1, 10.0), sequential=False, share=0.0, held_out=0.25)
    got = refit(model, kept, WINDOWS, how)
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
    few = refit(llama, some(llama), WINDOWS[:4], replace(how, damping=(1e-3,) * 2))
    stays = [c for c in few.values() if c.damping is None]
    assert stays and all(c.error == c.error_before for c in stays)


def test_a_new_bias_only_where_asked_for():
    model = FAMILIES["llama"]()
    assert all(c.bias is None for c in refit(model, some(model), WINDOWS).values())
    added = refit(model, some(model), WINDOWS, Refit(bias=True, damping=(1.0,)))
    assert all(c.bias is not None for c in added.values())


def test_one_width_for_all_layers_stays_a_plain_checkpoint(tmp_path):
    model = FAMILIES["mistral"]()
    method = replace(with_equal_widths("wanda-sp"), compensation="least-squares", refit=Refit())
    prune(model, method, 0.3, calibration=WINDOWS)
    save(model, tmp_path / "out", layout="uniform")
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out")).__name__ == "MistralForCausalLM"


def test_a_failed_refit_names_its_block_and_changes_nothing():
    model = FAMILIES["llama"]()
    block = find_blocks(model)[3]
    with torch.no_grad():
        block.producers[0].weight.zero_()  # a gate that never opens: nothing reaches the consumer
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(FloatingPointError, match=rf"refit of {block.name} failed.*more calibration windows"):
        prune(model, refitting(), 0.3, calibration=WINDOWS)
    assert all(v.equal(before[k]) for k, v in model.state_dict().items())


def test_what_cannot_be_refitted_is_said_in_a_sentence():
    model = FAMILIES["llama"]()
    calibration = WINDOWS
    with pytest.raises(UsageError, match="leaves none to fit"):
        prune(model, refitting(how=Refit(damping=(0.1, 1.0))), 0.3, calibration=WINDOWS[:1])
    with pytest.raises(UsageError, match="no consumer of"):
        attach(model, refitting(), 0.3, calibration=calibration)
    other = method_consumers(model, refitting(), 0.5, WINDOWS, calibration=calibration)
    with pytest.raises(UsageError, match="no consumer of"):
        prune(model, refitting(), 0.3, statistics=replace(statistics, consumers=other))
    with pytest.raises(UsageError, match="refits nothing"):
        method_consumers(model, "wanda-sp", 0.3, WINDOWS, calibration=calibration)
    with pytest.raises(UsageError, match="give refit="):
        compose("wanda-sp", importance="obs")
    with pytest.raises(UsageError, match="no scores"):
        compose(
            "wanda-sp", importance="obs", allocation="global", refit=Refit(), compensation="least-squares"
        )
    for changes in ({"compensation": "least-squares"}, {"refit": Refit()}):
        with pytest.raises(UsageError, match="go together"):
            compose("wanda-sp", **changes)
    with pytest.raises(UsageError, match="is no block"):
        refit(model, {"lm_head": torch.arange(3)}, WINDOWS)
    with pytest.raises(UsageError, match="importance 'obs'"):
        compose("probe", compensation="least-squares", refit=Refit())
    with pytest.raises(UsageError, match="in MLPs alone"):
        following(blocks=("attention",))
    for probe in (Probe(), Probe(fusion="none", refresh=4)):
        with pytest.raises(UsageError, match="nothing to fuse"):
            following(probe=probe)
    for wrong in (
        {"damping": ()},
        {"damping": (0.0,)},
        {"held_out": 1.0},
        {"share": 2.0},
        {"batch_share": 0.0},
        {"windows": 0},
        {"sensitivity": -1},
        {"batch_share": 1.0},
        {"sequential": False},
    ):
        with pytest.raises(UsageError):
            Refit(**wrong)
