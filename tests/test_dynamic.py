"""The runtime: what a pruned pass computes, what it chooses, and that nothing of it stays behind."""

import pytest
import torch
from tiny import FAMILIES, masked, padded, token_ids

from probeprune import Probe, UsageError, attach, calibrate, compose
from probeprune.blocks import find_blocks
from probeprune.passes import find_decoder
from probeprune.statistics import History

SIDES = ("none", "left", "right")
DYNAMIC = ("probe", "full-batch")


@pytest.fixture(scope="module", params=list(FAMILIES))
def calibrated(request):
    """A model and its statistics, from windows shorter than the sequences it will see."""
    model = FAMILIES[request.param]()
    return model, calibrate(model, token_ids(6, 16, seed=9), batch_size=4)


@pytest.fixture(scope="module")
def llama():
    model = FAMILIES["llama-gqa"]()
    return model, calibrate(model, token_ids(6, 16, seed=9), batch_size=4)


def logits(model, ids, mask):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits[mask.bool()]


def close(got, want) -> None:
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def kept(handle):
    return [(b, k.units) for b, k in zip(handle.blocks, handle.kept_units(), strict=True)]


@pytest.mark.parametrize("method", ["wanda-sp", "ppsp", "magnitude", "random", *DYNAMIC])
def test_a_pruned_pass_is_the_dense_one_masked(calibrated, method):
    model, statistics = calibrated
    before = {n: p.clone() for n, p in model.named_parameters()}
    inputs = [padded(side) for side in SIDES] + [padded("none", batch=1), padded("none", length=40)]
    dense = [logits(model, *i) for i in inputs]
    got, chosen = [], []
    with attach(model, method, 0.3, statistics=statistics) as handle:
        assert handle.removed_share == pytest.approx(0.3, abs=0.005)
        for i in inputs:
            got.append(logits(model, *i))
            chosen.append(kept(handle))
    for pruned, choice, i, whole in zip(got, chosen, inputs, dense, strict=True):
        with masked(choice):
            close(pruned, logits(model, *i))
        assert (pruned - whole).abs().max() > 0.01 * whole.abs().max()
    assert all(p.equal(before[n]) for n, p in model.named_parameters())
    assert all(logits(model, *i).equal(whole) for i, whole in zip(inputs, dense, strict=True))


def test_keeping_everything_is_dense(calibrated):
    model, statistics = calibrated
    inputs = padded("left")
    dense = logits(model, *inputs)
    for method in ("dense", "flap", *DYNAMIC):
        with attach(model, method, 0.0, statistics=statistics):
            assert logits(model, *inputs).equal(dense)


@pytest.mark.parametrize("side", SIDES)
def test_a_probe_of_everything_without_history_is_full_batch(calibrated, side):
    model, statistics = calibrated
    everything = compose("probe", probe=Probe(tokens=1.0, samples=1.0, fusion="none"))
    choices = []
    for method in (everything, "full-batch"):
        with attach(model, method, 0.3, statistics=statistics) as handle:
            logits(model, *padded(side))
            choices.append(handle.kept_units())
    assert choices[0] == choices[1]


@pytest.mark.parametrize("side", SIDES)
def test_full_batch_keeps_what_the_whole_batch_asks_for(calibrated, side):
    # The first pruned block sees the dense model's input, so its choice follows from a dense pass alone.
    model, statistics = calibrated
    ids, mask = padded(side)
    blocks = find_blocks(model)
    block = next(b for b in blocks if b.layer == 3 and b.kind == "attention")
    seen = []
    hook = block.consumer.register_forward_pre_hook(lambda _, args: seen.append(args[0].double()))
    logits(model, ids, mask)
    hook.remove()
    z = seen[0].view(4, 24, -1) * mask[..., None]
    columns = mask.sum(0).clamp_min(1)
    energy = ((z**2).sum(0) / columns[:, None]).sum(0)
    w = block.consumer.weight.detach().double()
    channel = (energy[None] * w**2).square().sum(0)
    score = channel.view(block.units, -1).sum(1).sqrt()
    with attach(model, "full-batch", 0.3, statistics=statistics) as handle:
        logits(model, ids, mask)
        got = next(k for k in handle.kept_units() if k.name == block.name)
    best = score.argsort(descending=True)[: len(got.units)].sort().values
    assert list(got.units) == best.tolist()


@pytest.mark.parametrize("family", ["llama-gqa", "gemma3", "opt"])
@pytest.mark.parametrize("side", SIDES)
def test_probe_of_an_mlp_against_a_slow_version(family, side):
    # One MLP alone is pruned (the last), so all in front of it is dense: residual, probe, fusion, scores,
    # choice and the history afterwards are computed again in float64 from a dense pass.
    model = FAMILIES[family]()
    statistics = calibrate(model, token_ids(6, 16, seed=9), batch_size=4)
    ids, mask = padded(side)
    block = find_blocks(model)[-1]
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        block.norm.register_forward_pre_hook(lambda _, a: seen.update(r=a[0].double())),
        block.consumer.register_forward_pre_hook(lambda _, a: seen.update(z=a[0].double())),
    ]
    logits(model, ids, mask)
    for h in hooks:
        h.remove()
    real = mask.bool()
    u = seen["r"].view(4, 24, -1).norm(dim=-1) * real
    z = seen["z"].view(4, 24, -1)
    columns = sorted(sorted(range(24), key=lambda s: -float(u[:, s].norm()))[:12])
    sample = max(range(4), key=lambda b: float(u[b, columns].norm()))
    moments = statistics.moments[block.name]
    history = moments.energy[0].double() / float(moments.tokens[0])
    e = torch.zeros(block.width, dtype=torch.float64)
    for s in columns:
        if real[sample, s]:
            p = z[sample, s] ** 2
            e += (p**2 + history**2) / (p + history).clamp_min(1e-300)  # ReLU has dead channels
    score = e * (block.consumer.weight.detach().double() ** 4).sum(0).sqrt()

    layers = block.layer
    method = compose("probe", allocation="nominal", skip_layers=layers)
    ratio = 0.3 / (layers + 1)
    with attach(model, method, ratio, statistics=statistics) as handle:
        runtime = handle._runtimes[-1]
        assert runtime.block.name == block.name
        # Attention in that layer comes before the MLP: leave it whole.
        for r in handle._runtimes[:-1]:
            r.keep = r.block.units
        logits(model, ids, mask)
        units = runtime.partition.kept_units
        best = score.argsort(descending=True)[: len(units)].sort().values
        assert units.tolist() == best.tolist()
        moved = history.clone()
        moved[best] += 0.01 * ((z[real] ** 2).mean(0)[best] - history[best])
        in_order = torch.empty(block.width, dtype=torch.float64)
        in_order[runtime.partition.channels] = runtime.history.energy[0].double()
    torch.testing.assert_close(in_order, moved, rtol=1e-4, atol=1e-6)


def test_attaching_moves_no_ones_history():
    model = FAMILIES["llama"]()
    statistics = calibrate(model, token_ids(4, 16), batch_size=4)
    state = {n: {k: v.clone() for k, v in m.state().items()} for n, m in statistics.moments.items()}
    with attach(model, "probe", 0.3, statistics=statistics):
        logits(model, *padded("none"))
    for name, moments in statistics.moments.items():
        assert all(v.equal(state[name][k]) for k, v in moments.state().items())
    assert isinstance(History(next(iter(statistics.moments.values())), 0.9).energy, torch.Tensor)


def test_flap_bias_is_what_the_formula_says(calibrated):
    model, statistics = calibrated
    inputs = padded("right")
    with attach(model, "flap", 0.3, statistics=statistics) as handle:
        choice, got = kept(handle), logits(model, *inputs)
    hooks = []
    for block, units in choice:
        gone = torch.ones(block.units)
        gone[list(units)] = 0
        lost = statistics.moments[block.name].mean * gone.repeat_interleave(block.unit_width)
        bias = block.consumer.weight.detach() @ lost
        hooks.append(block.consumer.register_forward_hook(lambda _, a, out, b=bias: out + b))
    with masked(choice):
        close(got, logits(model, *inputs))
    for h in hooks:
        h.remove()


@pytest.mark.parametrize("method", ["wanda-sp", "probe"])
def test_generation_with_a_cache_is_that_of_the_masked_model(calibrated, method):
    model, statistics = calibrated
    ids, mask = padded("left")
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": 127}
    with attach(model, method, 0.3, statistics=statistics) as handle:
        got = model.generate(ids, attention_mask=mask, **options)
        choice = kept(handle)
    with masked(choice):
        assert model.generate(ids, attention_mask=mask, **options).equal(got)


def test_a_cache_from_elsewhere_is_refused(llama):
    model, statistics = llama
    with torch.no_grad():
        cache = model(token_ids(), use_cache=True).past_key_values
        with (
            attach(model, "probe", 0.3, statistics=statistics),
            pytest.raises(UsageError, match="KV cache was not filled"),
        ):
            model(token_ids(4, 1), past_key_values=cache)


def test_an_exception_in_a_pass_leaves_the_model_restorable(llama):
    model, statistics = llama
    before = {n: p.clone() for n, p in model.named_parameters()}
    inputs = padded("left")
    dense = logits(model, *inputs)
    norm = find_decoder(model).layers[4].post_attention_layernorm
    with pytest.raises(ZeroDivisionError), attach(model, "probe", 0.3, statistics=statistics):
        hook = norm.register_forward_hook(lambda *_: 1 / 0)
        logits(model, *inputs)
    hook.remove()
    assert all(p.equal(before[n]) for n, p in model.named_parameters())
    assert logits(model, *inputs).equal(dense)


def test_overflow_is_an_error_that_names_the_block(llama):
    model, statistics = llama
    layer = find_decoder(model).layers[3].mlp.up_proj
    with torch.no_grad():
        layer.weight[5] *= 1e30
    with (
        pytest.raises(FloatingPointError, match=r"layers\.3\.mlp"),
        attach(model, "probe", 0.3, statistics=statistics),
    ):
        logits(model, *padded("none"))
    with torch.no_grad():
        layer.weight[5] /= 1e30


def test_misuse_is_refused_with_a_reason(llama):
    model, statistics = llama
    with attach(model, "wanda-sp", 0.3, statistics=statistics) as handle:
        with pytest.raises(UsageError, match="already"):
            attach(model, "random", 0.3)
        handle.detach()
        handle.detach()
    with pytest.raises(UsageError, match="needs statistics"):
        attach(model, "probe", 0.3)
    with pytest.raises(UsageError, match="another model"):
        attach(FAMILIES["opt"](), "probe", 0.3, statistics=statistics)
    with pytest.raises(UsageError, match="outside"):
        attach(model, "random", 1.0)
    with pytest.raises(UsageError, match="did you mean 'probe'"):
        attach(model, "prob", 0.3)
    with pytest.raises(UsageError, match="cannot be scored from a probe"):
        compose("probe", importance="flap")
    with pytest.raises(UsageError, match="must lie in"):
        Probe(tokens=0)
    model.train()
    with pytest.raises(UsageError, match=r"model.eval\(\)"):
        attach(model, "random", 0.3)
    model.eval()
    with attach(model, "probe", 0.3, statistics=statistics), pytest.raises(UsageError, match="eval"):
        model.train()
        logits(model, *padded("none"))
    model.eval()


def test_two_models_at_once_do_not_meet(llama):
    model, statistics = llama
    other = FAMILIES["qwen3"]()
    inputs = padded("none")
    with attach(model, "probe", 0.3, statistics=statistics):
        alone = logits(model, *inputs)
    with attach(model, "probe", 0.3, statistics=statistics), attach(other, "random", 0.2):
        logits(other, *inputs)
        assert logits(model, *inputs).equal(alone)


@pytest.mark.parametrize(
    "changes", [{"allocation": "global"}, {"compensation": "bias"}, {"units": "balanced"}]
)
def test_compositions_run_and_equal_the_masked_model(llama, changes):
    model, statistics = llama
    inputs = padded("left")
    with attach(model, compose("probe", **changes), 0.3, statistics=statistics) as handle:
        got, choice = logits(model, *inputs), kept(handle)
    if "compensation" not in changes:
        with masked(choice):
            close(got, logits(model, *inputs))
    else:
        with masked(choice):
            assert (got - logits(model, *inputs)).abs().max() > 1e-3, "the bias is missing"
