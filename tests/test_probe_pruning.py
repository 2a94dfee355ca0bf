"""Probe Pruning: what it chooses, against slow versions, and what history does."""

import pytest
import torch
from tiny import (
    FAMILIES,
    PARALLEL,
    PROBING,
    SIDES,
    close,
    kept,
    logits,
    lost_means_added,
    masked,
    moments_of,
    padded,
    token_ids,
)

from probeprune import Probe, attach, compose
from probeprune.model.blocks import find_blocks
from probeprune.preparation import Preparation
from probeprune.strategies.probe_every_batch import ProbeEveryBatch


@pytest.mark.parametrize("side", SIDES)
def test_a_probe_of_everything_without_history_is_full_batch(calibrated, side):
    model, calibration = calibrated
    everything = compose(
        "probe", when=ProbeEveryBatch(Probe(reuse=0, tokens=1.0, samples=1.0), fusion="none")
    )
    choices = []
    for method in (everything, "full-batch"):
        with attach(model, method, 0.3, calibration=calibration) as handle:
            logits(model, *padded(side))
            choices.append(handle.kept_units())
    assert choices[0] == choices[1]


@pytest.mark.parametrize("side", SIDES)
def test_full_batch_keeps_what_the_whole_batch_asks_for(calibrated, side):
    # The first pruned block sees the dense model's input, so its choice follows from a dense pass alone.
    model, calibration = calibrated
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
    with attach(model, "full-batch", 0.3, calibration=calibration) as handle:
        logits(model, ids, mask)
        got = next(k for k in handle.kept_units() if k.name == block.name)
    best = score.argsort(descending=True)[: len(got.units)].sort().values
    assert list(got.units) == best.tolist()


@pytest.mark.parametrize("probing", [PROBING, PARALLEL], ids=["in turn", "parallel"])
@pytest.mark.parametrize("family", ["llama-gqa", "gemma3", "opt", "gpt-neox"])
@pytest.mark.parametrize("side", SIDES)
def test_probe_of_an_mlp_against_a_slow_version(family, side, probing):
    # One MLP alone is pruned (the last), so all in front of it is dense: residual, probe, fusion, scores,
    # choice and the history afterwards are computed again in float64 from a dense pass. In parallel, the
    # residual is the one in front of attention, and the probe sees nothing of what attention adds to it.
    model = FAMILIES[family]()
    calibration = token_ids(6, 16, seed=9)
    ids, mask = padded(side)
    *_, attention, block = find_blocks(model)
    seen: dict[str, torch.Tensor] = {}
    source = attention if probing is PARALLEL else block
    hooks = [
        source.norm.register_forward_pre_hook(lambda _, a: seen.update(r=a[0])),
        block.consumer.register_forward_pre_hook(lambda _, a: seen.update(z=a[0].double())),
    ]
    logits(model, ids, mask)
    for h in hooks:
        h.remove()
    real = mask.bool()
    r, z = seen["r"].view(4, 24, -1), seen["z"].view(4, 24, -1)
    probed: list[torch.Tensor] = []
    hook = block.consumer.register_forward_pre_hook(lambda _, a: probed.append(a[0].double()))
    with torch.no_grad():
        block.run(block.norm(r))
    hook.remove()
    u = r.double().norm(dim=-1) * real
    columns = sorted(sorted(range(24), key=lambda s: -float(u[:, s].norm()))[:12])
    sample = max(range(4), key=lambda b: float(u[b, columns].norm()))
    moments = moments_of(model, calibration)[block.name]
    history = moments.energy[0].double() / float(moments.tokens[0])
    e = torch.zeros(block.width, dtype=torch.float64)
    for s in columns:
        if real[sample, s]:
            p = probed[0][sample, s] ** 2
            e += (p**2 + history**2) / (p + history).clamp_min(1e-300)  # ReLU has dead channels
    score = e * (block.consumer.weight.detach().double() ** 4).sum(0).sqrt()

    layers = block.layer
    method = compose(probing, allocation="nominal", skip_layers=layers)
    ratio = 0.3 / (layers + 1)
    with attach(model, method, ratio, calibration=calibration) as handle:
        runtime = handle.runtimes[-1]
        assert runtime.block.name == block.name
        # Attention in that layer comes before the MLP: leave it whole.
        for r in handle.runtimes[:-1]:
            r.pruned.width = r.block.units
        logits(model, ids, mask)
        units = runtime.pruned.partition.kept_units
        best = score.argsort(descending=True)[: len(units)].sort().values
        assert units.tolist() == best.tolist()
        moved = history.clone()
        moved[best] += 0.01 * ((z[real] ** 2).mean(0)[best] - history[best])
        in_order = torch.empty(block.width, dtype=torch.float64)
        in_order[runtime.pruned.partition.channels] = runtime.follower.history.energy[0].double()
    torch.testing.assert_close(in_order, moved, rtol=1e-4, atol=1e-6)


def dense_pass(model, block, ids, mask):
    """What a dense pass gives one block: its input, keyword arguments, residual and `z`, full length."""
    seen: dict = {}

    def entered(module, args, kwargs):
        seen["kwargs"] = dict(kwargs)
        seen["x"] = args[0] if args else seen["kwargs"].pop("hidden_states")

    hooks = [
        block.entry.register_forward_pre_hook(entered, with_kwargs=True),
        block.consumer.register_forward_pre_hook(lambda _, a: seen.update(z=a[0])),
    ]
    if block.norm is not None:
        hooks.append(block.norm.register_forward_pre_hook(lambda _, a: seen.update(residual=a[0])))
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    for h in hooks:
        h.remove()
    seen.setdefault("residual", seen["x"])
    return seen


@pytest.mark.parametrize("side", SIDES)
def test_probe_of_attention_against_a_slow_version(calibrated, side):
    # The first pruned block: all in front of it is dense. The probe's attention is that of the whole block
    # with the keys of all other tokens hidden; the rest is the formulas, in float64.
    model, calibration = calibrated
    ids, mask = padded(side)
    real = mask.bool()
    block = next(b for b in find_blocks(model) if b.layer == 3 and b.kind == "attention")
    seen = dense_pass(model, block, ids, mask)
    u = seen["residual"].double().view(4, 24, -1).norm(dim=-1) * real
    columns = sorted(sorted(range(24), key=lambda s: -float(u[:, s].norm()))[:12])
    samples = sorted(sorted(range(4), key=lambda b: -float(u[b, columns].norm()))[:2])

    visible = seen["kwargs"].get("attention_mask")
    visible = torch.ones(1, 1, 24, 24, dtype=torch.bool).tril() if visible is None else visible.clone()
    hidden = [s for s in range(24) if s not in columns]
    visible[..., hidden] = False if visible.dtype == torch.bool else torch.finfo(visible.dtype).min
    tapped: list[torch.Tensor] = []
    hook = block.consumer.register_forward_pre_hook(lambda _, a: tapped.append(a[0].double()))
    with torch.no_grad():
        block.run(seen["x"], **{**seen["kwargs"], "attention_mask": visible})
    hook.remove()

    moments = moments_of(model, calibration)[block.name]
    history = moments.energy[0].double() / float(moments.tokens[0])
    e = torch.zeros(block.width, dtype=torch.float64)
    for s in columns:
        rows = [tapped[0][b, s] ** 2 for b in samples if real[b, s]]
        if rows:
            p = sum(rows) / len(rows)
            e += (p**2 + history**2) / (p + history)
    w = block.consumer.weight.detach().double()
    score = (e[None] * w**2).square().sum(0).view(block.units, -1).sum(1).sqrt()

    # The mean of the real tokens alone moves history, and in kept channels only.
    probing = compose("probe", when=ProbeEveryBatch(Probe(reuse=0, samples=0.5)))
    with attach(model, probing, 0.3, calibration=calibration) as handle:
        runtime = next(r for r in handle.runtimes if r.block.name == block.name)
        logits(model, ids, mask)
        units = runtime.pruned.partition.kept_units
        in_order = torch.empty(block.width, dtype=torch.float64)
        in_order[runtime.pruned.partition.channels] = runtime.follower.history.energy[0].double()
    best = score.argsort(descending=True)[: len(units)].sort().values
    assert units.tolist() == best.tolist()
    channels = (best[:, None] * block.unit_width + torch.arange(block.unit_width)).flatten()
    z = seen["z"].double().view(4, 24, -1)[real]
    moved = history.clone()
    moved[channels] = 0.99 * history[channels] + 0.01 * (z**2).mean(0)[channels]
    torch.testing.assert_close(in_order, moved, rtol=1e-4, atol=1e-7)


def test_every_batch_is_chosen_anew_and_swaps_are_counted(llama):
    # One cut for all batches would pass every test of a single batch.
    model, calibration = llama
    probing = compose("probe", when=ProbeEveryBatch(Probe(reuse=0, samples=1.0), fusion="none"))
    with attach(model, probing, 0.3, calibration=calibration) as handle:
        logits(model, *padded("none"))
        last, swapped, distinct = handle.kept_units(), handle.swapped, set()
        for seed in range(6):
            ids = token_ids(2, 12, seed=50 + seed)
            logits(model, ids, torch.ones_like(ids))
            now = handle.kept_units()
            entered = sum(len(set(a.units) - set(b.units)) for a, b in zip(now, last, strict=True))
            assert handle.swapped - swapped == entered
            last, swapped = now, handle.swapped
            distinct.add(now[-1].units)
    assert len(distinct) > 1


def test_history_decides_where_the_probe_says_little(llama):
    # A history that is kept but never read would leave no other trace than its memory.
    model, calibration = llama
    choices = []
    for share in (0.0, 1.0):
        fixed = compose(
            "probe", when=ProbeEveryBatch(Probe(reuse=0), fusion="fixed", history_share=share, decay=1.0)
        )
        with attach(model, fixed, 0.3, calibration=calibration) as handle:
            runtime = handle.runtimes[-1]
            seen = []
            for seed in range(3):
                ids = token_ids(2, 12, seed=seed)
                logits(model, ids, torch.ones_like(ids))
                seen.append(tuple(runtime.pruned.partition.kept_units.tolist()))
            choices.append(seen)
    assert len(set(choices[0])) > 1, "the probe alone follows the batch"
    assert len(set(choices[1])) == 1, "history alone, never moved, always says the same"


def test_attaching_moves_no_ones_history():
    model = FAMILIES["llama"]()
    calibration = Preparation(model, token_ids(4, 16), batch_size=4)
    before = {
        n: {k: v.clone() for k, v in m.state().items()} for n, m in moments_of(model, calibration).items()
    }
    with attach(model, PROBING, 0.3, calibration=calibration):
        logits(model, *padded("none"))
    for name, moments in moments_of(model, calibration).items():
        assert all(v.equal(before[name][k]) for k, v in moments.state().items())


@pytest.mark.parametrize("family", ["llama-gqa", "llama-bias", "opt"])
def test_bias_of_a_dynamic_method_follows_every_batch(family):
    # The bias of the first cut, or of the batch before, would be that of other units.
    model = FAMILIES[family]()
    calibration = token_ids(6, 16, seed=9)
    inputs = padded("left")
    with attach(model, compose(PROBING, compensation="bias"), 0.3, calibration=calibration) as handle:
        for seed in range(3):
            ids = token_ids(2, 12, seed=seed)
            logits(model, ids, torch.ones_like(ids))
        got, choice = logits(model, *inputs), kept(handle)
    moments = moments_of(model, calibration)
    with masked(choice), lost_means_added(choice, moments):
        close(got, logits(model, *inputs))
