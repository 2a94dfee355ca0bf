"""The runtime: what a pruned pass computes, what it chooses, and that nothing of it stays behind."""

from contextlib import contextmanager

import pytest
import torch
from tiny import FAMILIES, PROBING, Given, close, kept, masked, padded, token_ids
from transformers import DynamicCache

from probeprune import METHODS, Probe, UsageError, attach, compose
from probeprune.algebra.moments import History
from probeprune.calibration.collecting import calibrate
from probeprune.calibration.statistics import Statistics
from probeprune.model.blocks import find_blocks
from probeprune.model.passes import find_decoder
from probeprune.preparation import Preparation
from probeprune.prepare import statistics_for
from probeprune.runtime.block import BlockRuntime
from probeprune.strategies.probe_every_batch import ProbeEveryBatch

SIDES = ("none", "left", "right")
DYNAMIC = (PROBING, "full-batch")
PARALLEL = compose("probe", name="parallel", when=ProbeEveryBatch(Probe(parallel=True)))


def moments_of(model, calibration):
    """Moments of the dense model, by block name."""
    return statistics_for(model, METHODS["ppsp"], 0.3, calibration).moments


def logits(model, ids, mask):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits[mask.bool()]


@pytest.mark.parametrize(
    "method", ["wanda-sp", "ppsp", "magnitude", "random", "probe-reuse", PARALLEL, *DYNAMIC]
)
def test_a_pruned_pass_is_the_dense_one_masked(calibrated, method):
    model, calibration = calibrated
    before = {n: p.clone() for n, p in model.named_parameters()}
    inputs = [padded(side) for side in SIDES] + [padded("none", batch=1), padded("none", length=40)]
    dense = [logits(model, *i) for i in inputs]
    got, chosen = [], []
    with attach(model, method, 0.3, calibration=calibration) as handle:
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
    model, calibration = calibrated
    inputs = padded("left")
    dense = logits(model, *inputs)
    for method in ("dense", "flap", *DYNAMIC):
        with attach(model, method, 0.0, calibration=calibration):
            assert logits(model, *inputs).equal(dense)


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


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_runs_beside_is_what_would_run_in_turn(family, side, monkeypatch):
    # A probe beside the block before takes masks and positions from an earlier layer. Here it waits for its
    # turn instead, and takes what its own layer is given.
    model = FAMILIES[family]()
    calibration = token_ids(6, 16, seed=9)
    inputs = padded(side)
    with attach(model, PARALLEL, 0.3, calibration=calibration) as handle:
        logits(model, *inputs)
        want = handle.kept_units()
    probe, stale = BlockRuntime._probe, {}

    def in_turn(self, residual, x, kwargs, norm="in turn"):
        if norm != "in turn":  # not now
            stale[self.block.name] = residual
            self.current.ahead = ""
        elif self.block.name in stale:
            residual = stale[self.block.name]
            probe(self, residual, residual, kwargs, self.block.norm)
        else:
            probe(self, residual, x, kwargs)

    monkeypatch.setattr(BlockRuntime, "_probe", in_turn)
    with attach(model, PARALLEL, 0.3, calibration=calibration) as handle:
        logits(model, *inputs)
        assert handle.kept_units() == want
        pruned = [r.block for r in handle.runtimes]
    late = len({handle.current.layer_type(b) for b in pruned if b.kind == "attention"})
    assert len(stale) == len(pruned) - late, "the first attention of each type of layer alone waits"


def test_a_probe_starts_in_front_of_the_block_before_and_is_waited_for(llama):
    # The order in which a GPU is given its work, told by a queue that only writes down.
    model, calibration = llama
    log = []

    class Queue:
        def __init__(self, name):
            self.name = name

        @contextmanager
        def run(self, read):
            log.append(("starts", self.name))
            yield

        def join(self):
            log.append(("joins", self.name))

    with attach(model, PARALLEL, 0.3, calibration=calibration) as handle:
        names = [r.block.name for r in handle.runtimes]
        hooks = []
        for r in handle.runtimes:
            r.side_stream = Queue(r.block.name)

            def enter(*_: object, r=r) -> None:
                if True:
                    log.append(("runs", r.block.name))

            hooks.append(r.block.entry.register_forward_pre_hook(enter))
        logits(model, *padded("left"))
        for hook in hooks:
            hook.remove()
    want = []
    for name, following in zip(names, [*names[1:], None], strict=True):
        want += [("joins", name)] * (name != names[0])
        want += [("starts", following)] * (following is not None)
        want.append(("runs", name))
    assert log == want


def test_a_batch_after_one_that_broke_beside_is_like_any_other(llama, monkeypatch):
    model, calibration = llama
    moments = moments_of(model, calibration)
    inputs = padded("left")
    with attach(model, PARALLEL, 0.3, calibration=calibration) as handle:
        logits(model, *inputs)
        want = handle.kept_units()
    with attach(model, PARALLEL, 0.3, calibration=calibration) as handle:
        with monkeypatch.context() as broken:
            broken.setattr(handle.runtimes[3].pruned, "cut", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                logits(model, *padded("right"))
        for r in handle.runtimes:  # what the broken batch moved
            fresh = History(moments[r.block.name], 0.99).energy
            r.follower.history.energy[:] = fresh[:, r.pruned.partition.channels]
        logits(model, *inputs)
        assert handle.kept_units() == want


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


@contextmanager
def lost_means_added(choice, moments):
    """What the lost channels give on average, added behind the dense model's consumers."""
    hooks = []
    for block, units in choice:
        gone = torch.ones(block.units)
        gone[list(units)] = 0
        lost = moments[block.name].mean * gone.repeat_interleave(block.unit_width)
        bias = block.consumer.weight.detach() @ lost
        hooks.append(block.consumer.register_forward_hook(lambda _, a, out, b=bias: out + b))
    yield
    for h in hooks:
        h.remove()


def test_flap_bias_is_what_the_formula_says(calibrated):
    model, calibration = calibrated
    inputs = padded("right")
    with attach(model, "flap", 0.3, calibration=calibration) as handle:
        choice, got = kept(handle), logits(model, *inputs)
    moments = moments_of(model, calibration)
    with masked(choice), lost_means_added(choice, moments):
        close(got, logits(model, *inputs))


def test_an_exception_in_a_pass_leaves_the_model_restorable(llama):
    model, calibration = llama
    before = {n: p.clone() for n, p in model.named_parameters()}
    inputs = padded("left")
    dense = logits(model, *inputs)
    norm = find_decoder(model).layers[4].post_attention_layernorm
    with pytest.raises(ZeroDivisionError), attach(model, PROBING, 0.3, calibration=calibration):
        hook = norm.register_forward_hook(lambda *_: 1 / 0)
        logits(model, *inputs)
    hook.remove()
    assert all(p.equal(before[n]) for n, p in model.named_parameters())
    assert logits(model, *inputs).equal(dense)


def test_overflow_is_an_error_that_names_the_block(llama):
    model, calibration = llama
    layer = find_decoder(model).layers[3].mlp.up_proj
    with torch.no_grad():
        layer.weight[5] *= 1e30
    with (
        pytest.raises(FloatingPointError, match=r"layers\.3\.mlp"),
        attach(model, PROBING, 0.3, calibration=calibration),
    ):
        logits(model, *padded("none"))
    with torch.no_grad():
        layer.weight[5] /= 1e30


def test_misuse_is_refused_with_a_reason(llama):
    model, calibration = llama
    with attach(model, "wanda-sp", 0.3, calibration=calibration) as handle:
        with pytest.raises(UsageError, match="already"):
            attach(model, "random", 0.3)
        handle.detach()
        handle.detach()
    with pytest.raises(UsageError, match="needs calibration="):
        attach(model, PROBING, 0.3)
    with pytest.raises(UsageError, match="another model"):
        attach(FAMILIES["opt"](), "probe", 0.3, calibration=calibration)
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
    with attach(model, PROBING, 0.3, calibration=calibration), pytest.raises(UsageError, match="eval"):
        model.train()
        logits(model, *padded("none"))
    model.eval()


def test_two_models_at_once_do_not_meet(llama):
    model, calibration = llama
    other = FAMILIES["qwen3"]()
    inputs = padded("none")
    with attach(model, PROBING, 0.3, calibration=calibration):
        alone = logits(model, *inputs)
    with attach(model, PROBING, 0.3, calibration=calibration), attach(other, "random", 0.2):
        logits(other, *inputs)
        assert logits(model, *inputs).equal(alone)


@pytest.mark.parametrize(
    "changes", [{"allocation": "global"}, {"compensation": "bias"}, {"unit_kind": "balanced"}]
)
def test_compositions_run_and_equal_the_masked_model(llama, changes):
    model, calibration = llama
    inputs = padded("left")
    with attach(model, compose(PROBING, **changes), 0.3, calibration=calibration) as handle:
        got, choice = logits(model, *inputs), kept(handle)
    if "compensation" not in changes:
        with masked(choice):
            close(got, logits(model, *inputs))
    else:
        with masked(choice):
            assert (got - logits(model, *inputs)).abs().max() > 1e-3, "the bias is missing"


# -- the whole pipeline, for attention -----------------------------------------------------------


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


def test_small_batches_share_a_choice_until_enough_tokens_went_by(llama):
    model, calibration = llama
    method = compose("probe", when=ProbeEveryBatch(Probe(reuse=60)))
    batches = [token_ids(2, 12, seed=50 + i) for i in range(8)]  # 24 tokens each
    with attach(model, method, 0.3, calibration=calibration) as handle:
        history = handle.runtimes[-1].follower.history.energy
        swapped, before, seen = [], history.clone(), []
        for ids in batches:
            got = logits(model, ids, torch.ones_like(ids))
            seen.append((ids, got, kept(handle)))
            swapped.append(handle.swapped)
            assert not history.equal(before), "history moves all the same"
            before = history.clone()
    # Tokens since the choice: - 24 48 (72) 24 48 (72) 24
    chosen = [i for i in range(8) if swapped[i] != (swapped[i - 1] if i else -1)]
    assert set(chosen) <= {0, 3, 6} and 3 in chosen
    for ids, got, choice in seen:
        with masked(choice):
            close(got, logits(model, ids, torch.ones_like(ids)))


def test_large_batches_and_prompts_of_a_cache_are_always_probed(llama):
    model, calibration = llama
    with_default, published = [], []
    for method, found in (
        (compose("probe", when=ProbeEveryBatch(Probe(reuse=24))), with_default),
        (PROBING, published),
    ):
        with attach(model, method, 0.3, calibration=calibration) as handle, torch.no_grad():
            for seed in range(4):
                model(token_ids(2, 12, seed=seed))
                found.append(handle.kept_units())
                model(token_ids(1, 5, seed=seed), past_key_values=DynamicCache(config=model.config))
                found.append(handle.kept_units())
    assert with_default == published


def test_what_a_failed_batch_chose_is_not_reused(llama):
    model, calibration = llama
    with attach(
        model, compose("probe", when=ProbeEveryBatch(Probe(reuse=10**6))), 0.3, calibration=calibration
    ) as handle:
        embedded = model.get_input_embeddings()(token_ids())
        with pytest.raises(FloatingPointError), torch.no_grad():
            model(inputs_embeds=torch.full_like(embedded, float("nan")))
        logits(model, *padded("none"))
        first = handle.kept_units()
    with attach(model, PROBING, 0.3, calibration=calibration) as handle:
        logits(model, *padded("none"))
        assert handle.kept_units() == first


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


# -- what a pass may look like -------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("method", DYNAMIC)
def test_prompts_shorter_than_any_probe(calibrated, method, length):
    model, calibration = calibrated
    ids = token_ids(1, length)
    with attach(model, method, 0.3, calibration=calibration) as handle:
        got, choice = logits(model, ids, torch.ones_like(ids)), kept(handle)
    with masked(choice):
        close(got, logits(model, ids, torch.ones_like(ids)))


@pytest.mark.parametrize("units", ["balanced", "query"])
@pytest.mark.parametrize("family", ["llama-gqa", "mistral", "qwen3", "gemma2", "gemma3"])
@pytest.mark.parametrize("side", SIDES)
def test_dynamic_query_heads_in_every_grouped_family(family, units, side):
    # Here attention goes through our own registered function, under the probe too.
    model = FAMILIES[family]()
    calibration = token_ids(6, 16, seed=9)
    inputs = padded(side)
    attributes = [dict(b.entry.__dict__) for b in find_blocks(model)]
    dense = logits(model, *inputs)
    with attach(model, compose(PROBING, unit_kind=units), 0.3, calibration=calibration) as handle:
        logits(model, *padded("none"))
        got, choice = logits(model, *inputs), kept(handle)
    assert any(len(k) < b.units for b, k in choice if b.kind == "attention")
    with masked(choice):
        close(got, logits(model, *inputs))
    assert logits(model, *inputs).equal(dense)
    for block, old in zip(find_blocks(model), attributes, strict=True):
        assert block.entry.config is old["config"]
        assert block.entry.__dict__.keys() == old.keys()


@pytest.mark.parametrize("family", ["llama-gqa", "gemma2", "opt"])
def test_masks_of_other_forms_tell_the_same_padding(family):
    model = FAMILIES[family]()
    calibration = token_ids(6, 16, seed=9)
    ids, mask = padded("left")
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    full = torch.ones(24, 24, dtype=torch.bool).tril()[None, None] & mask[:, None, None].bool()
    additive = torch.zeros(full.shape).masked_fill(~full, torch.finfo(torch.float32).min)
    forms = {"bool": mask.bool(), "float": mask.float()}
    if family != "gemma2":  # a ready-made mask would do away with its sliding window
        forms |= {"four dimensions": full, "additive": additive}
    results = {}
    for name, form in {"integers": mask, **forms}.items():
        with attach(model, PROBING, 0.3, calibration=calibration) as handle, torch.no_grad():
            out = model(ids, attention_mask=form, position_ids=positions).logits[mask.bool()]
            results[name] = (out, handle.kept_units())
    want, units = results.pop("integers")
    for name, (got, chosen) in results.items():
        assert chosen == units, name
        close(got, want)


def test_a_mask_of_ones_is_no_mask(llama):
    model, calibration = llama
    ids = token_ids()
    results = []
    for kwargs in ({}, {"attention_mask": torch.ones_like(ids)}):
        with attach(model, PROBING, 0.3, calibration=calibration), torch.no_grad():
            results.append(model(ids, **kwargs).logits)
    assert results[0].equal(results[1])


def test_embeddings_in_place_of_ids_and_the_decoder_alone(calibrated):
    model, calibration = calibrated
    ids, mask = padded("left")
    with attach(model, PROBING, 0.3, calibration=calibration) as handle:
        want, units = logits(model, ids, mask), handle.kept_units()
    with attach(model, PROBING, 0.3, calibration=calibration) as handle, torch.no_grad():
        embedded = model.get_input_embeddings()(ids)
        got = model(inputs_embeds=embedded, attention_mask=mask).logits[mask.bool()]
        assert handle.kept_units() == units
        close(got, want)
    with attach(model, PROBING, 0.3, calibration=calibration) as handle, torch.no_grad():
        find_decoder(model)(ids, mask)  # by position
        assert handle.kept_units() == units


@pytest.mark.parametrize("method", ["flap", *DYNAMIC])
def test_inference_mode_gives_the_same_as_no_grad(calibrated, method):
    model, calibration = calibrated
    inputs = padded("left")
    before = {n: p.clone() for n, p in model.named_parameters()}
    results = []
    for mode in (torch.no_grad, torch.inference_mode):
        with attach(model, method, 0.3, calibration=calibration):
            for _ in range(2):
                with mode():
                    out = model(*inputs).logits[inputs[1].bool()]
            results.append(out.clone())
    assert results[0].equal(results[1])
    assert all(p.equal(before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("method", ["wanda-sp", "flap", PROBING])
def test_attached_in_inference_mode_and_detached_outside(method):
    # Detaching must not fail: the weights would stay permuted for good.
    model = FAMILIES["llama-gqa"]()
    calibration = token_ids(6, 16, seed=9)
    before = {n: p.clone() for n, p in model.named_parameters()}
    with torch.inference_mode():
        handle = attach(model, method, 0.3, calibration=calibration)
        model(*padded("left"))
    with torch.no_grad():
        model(*padded("right"))
    handle.detach()
    assert all(p.equal(before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize(
    "modes", [(torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)]
)
def test_batches_in_and_out_of_inference_mode_mix(modes):
    # Without calibration the first cut is made by the first batch, in whatever mode that runs.
    model = FAMILIES["llama-gqa"]()
    before = {n: p.clone() for n, p in model.named_parameters()}
    with attach(model, "full-batch", 0.3):
        for seed, mode in enumerate((*modes, *modes)):
            with mode():
                assert model(token_ids(2, 12, seed=seed)).logits.isfinite().all()
    assert all(p.equal(before[n]) for n, p in model.named_parameters())


def test_a_model_without_memory_can_be_attached():
    # Costs of models too large for this machine are counted on the meta device.
    moments = calibrate(FAMILIES["llama-gqa"](), token_ids(6, 16, seed=9))
    with torch.device("meta"):
        model = FAMILIES["llama-gqa"]()
    calibration = Given(model, Statistics(moments))
    shapes: dict[str, tuple[int, ...]] = {}
    with attach(model, PROBING, 0.3, calibration=calibration) as handle, torch.no_grad():
        for b in handle.blocks:
            b.consumer.register_forward_pre_hook(lambda _, a, n=b.name: shapes.update({n: a[0].shape}))
        out = model(torch.ones(2, 9, dtype=torch.long, device="meta")).logits
        assert out.shape == (2, 9, 128) and out.is_meta
        widths = [k * b.unit_width for b, k in zip(handle.blocks, handle.widths, strict=True)]
        assert [shapes[b.name][-1] for b in handle.blocks] == widths
        assert handle.removed_share == pytest.approx(0.3, abs=0.005)
    assert model.model.layers[4].mlp.down_proj.weight.shape == (48, 100)


# -- compensation --------------------------------------------------------------------------------


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


# -- what goes wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", DYNAMIC)
def test_nan_activations_name_the_first_block_and_the_next_batch_works(llama, method, bad):
    model, calibration = llama
    ids, mask = padded("none")
    with attach(model, method, 0.3, calibration=calibration) as handle, torch.no_grad():
        embedded = model.get_input_embeddings()(ids)
        with pytest.raises(FloatingPointError, match=r"layers\.3\.self_attn"):
            model(inputs_embeds=torch.full_like(embedded, bad))
        got, choice = logits(model, ids, mask), kept(handle)
    with masked(choice):
        close(got, logits(model, ids, mask))


@pytest.mark.parametrize("family", ["llama-gqa", "opt"])
@pytest.mark.parametrize("where", ["producer", "consumer"])
def test_a_pass_after_an_exception_is_like_any_other(family, where):
    # In a block, a probe may be running: a consumer left in tap mode, or a block left wide, would show.
    model = FAMILIES[family]()
    calibration = token_ids(6, 16, seed=9)
    inputs = padded("left")
    for block in find_blocks(model)[-2:]:
        with attach(model, PROBING, 0.3, calibration=calibration) as handle:
            linear = block.producers[0] if where == "producer" else block.consumer
            hook = linear.register_forward_pre_hook(lambda *_: 1 / 0, prepend=True)
            with pytest.raises(ZeroDivisionError):
                logits(model, *inputs)
            hook.remove()
            got, choice = logits(model, *inputs), kept(handle)
        with masked(choice):
            close(got, logits(model, *inputs))


def test_attaching_again_gives_the_same_and_a_failed_attach_leaves_nothing(llama):
    model, calibration = llama
    inputs = padded("left")
    hooks = {id(m): len(m._forward_pre_hooks) for m in model.modules()}
    results = []
    for _ in range(2):
        with attach(model, PROBING, 0.3, calibration=calibration):
            results.append(logits(model, *inputs))
        assert {id(m): len(m._forward_pre_hooks) for m in model.modules()} == hooks
        with pytest.raises(UsageError):
            attach(model, PROBING, 0.99, calibration=calibration)
    assert results[0].equal(results[1])


def test_probing_refuses_other_attention_before_anything_is_changed():
    model = FAMILIES["llama-gqa"]()
    calibration = token_ids(6, 16, seed=9)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UsageError, match="sdpa or eager"):
        attach(model, PROBING, 0.3, calibration=calibration)
    model.config._attn_implementation = "sdpa"
    attach(model, PROBING, 0.3, calibration=calibration).detach()
