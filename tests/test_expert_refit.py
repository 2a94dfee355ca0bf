"""The refit of experts: against whole models in float64, expert by expert, and against MLPs."""

import copy
import threading
import warnings
from typing import Any

import pytest
import tiny_experts
import torch
from refitting import explicit
from test_experts import formula
from test_processes import Together
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

from probeprune import Refit, attach, compose, find_blocks, prune
from probeprune.algebra.elimination import LOOKS, eliminate
from probeprune.algebra.least_squares import FLOOR, Gram
from probeprune.calibration import expert_refit, footprints, gradient_footprints, stored, unfinished
from probeprune.calibration.expert_refit import SCARCE
from probeprune.calibration.fitting import best_fit
from probeprune.calibration.refit import RefitRequest, refit
from probeprune.calibration.sensitivity import sensitivities
from probeprune.errors import Notice, UsageError
from probeprune.model.experts import Stack, find_stacks
from probeprune.model.families import find_family
from probeprune.model.footprint import Batch, Rehearsal
from probeprune.preparation import Preparation
from probeprune.strategies.pruned_block import Cut

WINDOWS = torch.randint(3, 120, (10, 24), generator=torch.Generator().manual_seed(5))
STATIC = compose("best-static", name="static", skip_layers=0, compensation=Refit(sensitivity=2))

pytestmark = [
    pytest.mark.filterwarnings("ignore:no token of the calibration text"),
    pytest.mark.filterwarnings("ignore:no head of this model can go"),
]


def some(stack: Stack) -> torch.Tensor:
    """Channels of each expert, others for each, 8 less than there are."""
    g = torch.Generator().manual_seed(stack.layer)
    keep = stack.width - 8
    rows = [torch.randperm(stack.width, generator=g)[:keep].sort().values for _ in range(stack.experts)]
    return torch.stack(rows)


def cuts(kept: dict) -> dict[str, Cut]:
    """Cuts to these units, or to so many that the refit chooses."""
    return {n: Cut(k) if isinstance(k, int) else Cut(k.shape[-1], k) for n, k in kept.items()}


def watched(model: nn.Module, stack: Stack) -> dict:
    """What the experts of a layer are given, what they add together, and the layer's output."""
    seen: dict = {}
    hooks = [
        stack.module.register_forward_hook(lambda _, args, out: seen.update(given=args, added=out)),
        stack.root.register_forward_hook(
            lambda _, args, out: seen.update(out=out[0] if isinstance(out, tuple) else out)
        ),
    ]
    with torch.no_grad():
        model(input_ids=WINDOWS)
    for hook in hooks:
        hook.remove()
    added = seen["added"]
    if stack.record.scales_input:
        added = added.view(stack.experts, -1, stack.hidden_size).sum(0)
    return {"given": seen["given"], "added": added.flatten(0, -2), "out": seen["out"].flatten(0, -2)}


def routed(stack: Stack, given: tuple) -> list[list[tuple[int, torch.Tensor, float, float]]]:
    """By expert: the token, its input, its weight and the sum of the weights of its experts."""
    found: list[list] = [[] for _ in range(stack.experts)]
    if stack.record.scales_input:
        for e, rows in enumerate(given[0].view(stack.experts, -1, stack.hidden_size)):
            found[e] = [(t, x, 1.0, float(stack.per_token)) for t, x in enumerate(rows) if x.any()]
        return found
    x, index, weights = given
    for t in range(len(x)):
        for e, w in zip(index[t].tolist(), weights[t].tolist(), strict=True):
            found[e].append((t, x[t], w, float(weights[t].sum())))
    return found


def wide(model: nn.Module) -> Any:
    """A copy in float64, which transformers' kernels for experts do not know."""
    model = copy.deepcopy(model).double()
    model.config._experts_implementation = "eager"
    return model


def zeroed(stack: Stack, expert: int, units: torch.Tensor, weight=None, bias=None) -> None:
    """Give an expert this `down_proj`, zero for all other channels."""
    own = stack.matrix("down_proj", expert)
    with torch.no_grad():
        kept = own[:, units].clone() if weight is None else weight
        own.zero_()
        own[:, units] = kept
        if bias is not None:
            stack.module.down_proj_bias[expert] = bias


def slow(model: nn.Module, kept: dict, how: Refit, added: bool) -> dict:
    """Whole models in float64, once a layer; least squares of each expert on its tokens."""
    dense, pruned, fitted = wide(model), wide(model), {}
    for stack, twin in zip(find_stacks(dense), find_stacks(pruned), strict=True):
        units = kept[stack.name]
        want, now = watched(dense, stack), watched(*(pruned, twin) if how.sequential else (dense, stack))
        lacking = want["added"] - now["added"]
        if how.share and added and want["out"].shape == want["added"].shape:  # no space of their own
            lacking += how.share * (want["out"] - want["added"] - now["out"] + now["added"])
        for e, own in enumerate(routed(twin, now["given"])):
            if not own:
                zeroed(twin, e, units[e])
                fitted[stack.name, e] = stack.matrix("down_proj", e)[:, units[e]], None
                continue
            z, t, w = [], [], []
            for token, x, weight, total in own:
                coupled, out = formula(stack, e, x)
                z.append(coupled[units[e]])
                t.append(out + lacking[token] / total)
                w.append(weight**2)
            damping = how.damping[0] * (1 + SCARCE * units.shape[1] / len(own))
            fitted[stack.name, e] = weighted(stack, e, units[e], z, t, w, damping)
        for e in range(stack.experts):
            weight, bias = fitted[stack.name, e]
            zeroed(twin, e, units[e], weight, bias)
    return fitted


def weighted(stack: Stack, e: int, units: torch.Tensor, z: list, t: list, w: list, damping: float):
    """Damped least squares by LAPACK, tokens weighted; with a bias, around weighted means."""
    zs, ts, ws = torch.stack(z), torch.stack(t), torch.tensor(w, dtype=torch.float64)
    z_mean, t_mean = ws @ zs / ws.sum(), ws @ ts / ws.sum()
    if stack.record.biases:
        zs, ts = zs - z_mean, ts - t_mean
    root = ws.sqrt()[:, None]
    weight, _ = explicit(stack.matrix("down_proj", e)[:, units], None, root * zs, root * ts, damping)
    return weight, (t_mean - weight @ z_mean if stack.record.biases else None)


@pytest.mark.parametrize(
    ("name", "share"),
    [
        *((name, 0.85) for name in tiny_experts.CONFIGS),
        *((n, s) for n in ("gpt_oss", "llama4_text") for s in (0.0, None)),
    ],
)
def test_a_refit_is_what_whole_models_give_expert_by_expert(name, share, monkeypatch):
    if share == 0.85:  # a few experts at a time
        monkeypatch.setattr(expert_refit, "AT_ONCE", 3 * 4 * 16 * (16 + 32))
    how = Refit(damping=(1e-2,), share=share or 0.0, sequential=share is not None)
    model = tiny_experts.build(name)().float()
    kept = {s.name: some(s) for s in find_stacks(model)}
    before = {n: p.clone() for n, p in model.state_dict().items()}
    got = refit(model, RefitRequest(cuts(kept)), WINDOWS, how, batch_size=4)
    assert all(p.equal(before[n]) for n, p in model.state_dict().items())
    want = slow(model, kept, how, not find_family(model).norm_last)
    assert got.keys() == kept.keys()
    for (stack, e), (weight, bias) in want.items():
        torch.testing.assert_close(got[stack].weight[e].double(), weight, rtol=2e-2, atol=3e-3)
        if bias is not None:
            torch.testing.assert_close(got[stack].bias[e].double(), bias, rtol=2e-2, atol=2e-2)
    assert all(c.error < c.error_before and c.damping == 1e-2 for c in got.values())
    assert all(c.units.equal(kept[n]) for n, c in got.items())


def twins(experts: int) -> tuple[nn.Module, nn.Module]:
    """A model with MLPs, and one with so many equal experts in their place, of which each token gets one."""
    shape = {**tiny_experts.SHAPE, "intermediate_size": 24}
    torch.manual_seed(0)
    dense = AutoModelForCausalLM.from_config(Qwen3Config(**shape), attn_implementation="eager").eval()
    more = {"num_experts": experts, "num_experts_per_tok": 1, "moe_intermediate_size": 24}
    config = Qwen3MoeConfig(**shape, **more, norm_topk_prob=True)
    sparse = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for p in dense.parameters():
            if p.ndim > 1:
                p.normal_(std=0.3)
        sparse.load_state_dict(dense.state_dict(), strict=False)
        for layer, own in zip(sparse.model.layers, dense.model.layers, strict=True):
            layer.mlp.experts.gate_up_proj[:] = torch.cat([own.mlp.gate_proj.weight, own.mlp.up_proj.weight])
            layer.mlp.experts.down_proj[:] = own.mlp.down_proj.weight
    return dense, sparse


def test_one_expert_is_refitted_as_the_mlp_in_its_place(monkeypatch):
    monkeypatch.setattr(expert_refit, "SCARCE", 0.0)
    dense, sparse = twins(1)
    stacks, blocks = find_stacks(sparse), find_blocks(dense)
    mlps = [b for b in blocks if b.kind == "mlp"]
    heads = {b.name: torch.tensor([1]) for b in blocks if b.kind == "attention" and b.layer == 1}
    own = [dict(sensitivities(m, WINDOWS[:4])) for m in (dense, sparse)]
    for s, b in zip(stacks, mlps, strict=True):
        torch.testing.assert_close(own[1][s.name], own[0][b.name], rtol=1e-3, atol=1e-6)
    wanted, found = (
        refit(m, RefitRequest(cuts({**{p.name: 16 for p in parts}, **heads}), metrics=metrics), WINDOWS)
        for m, parts, metrics in ((dense, mlps, own[0]), (sparse, stacks, own[1]))
    )
    for s, b in zip(stacks, mlps, strict=True):
        one, other = found[s.name], wanted[b.name]
        assert one.units[0].equal(other.units) and one.damping == other.damping
        torch.testing.assert_close(one.weight[0], other.weight, rtol=1e-3, atol=1e-4)
        assert one.error == pytest.approx(other.error, rel=1e-3)
        assert one.error_before == pytest.approx(other.error_before, rel=1e-3)


@pytest.mark.parametrize("name", ["qwen2_moe", "gpt_oss", "llama4_text"])
def test_elimination_leaves_what_it_would_on_the_tokens_of_each_expert(name):
    how = Refit(damping=(0.1,))
    model = tiny_experts.build(name)()
    stack = find_stacks(model)[0]
    metrics = sensitivities(model, WINDOWS[:4])
    got = refit(model, RefitRequest(cuts({stack.name: 8}), metrics=metrics), WINDOWS, how)[stack.name]
    again = refit(model, RefitRequest(cuts({stack.name: got.units})), WINDOWS, how)[stack.name]
    torch.testing.assert_close(got.weight, again.weight, rtol=1e-3, atol=1e-4)
    double = wide(model)
    twin = find_stacks(double)[0]
    for e, own in enumerate(routed(twin, watched(double, twin)["given"])):
        pairs = [formula(twin, e, x) for _, x, _, _ in own]
        gram = Gram(stack.width, stack.hidden_size)
        z, t = (torch.stack([p[i] for p in pairs]) for i in range(2))
        gram.update(z, t, torch.tensor([w**2 for _, _, w, _ in own]))
        assert gram.tokens == len(own)
        moment = gram.zz.double() / gram.count
        if not stack.record.biases:
            moment += torch.outer(gram.z_mean, gram.z_mean)
        diagonal = moment.diagonal().clone()
        damping = 0.1 * (1 + SCARCE * stack.width / len(own))
        moment += damping * diagonal.clamp_min(FLOOR * diagonal.median()).diag()
        # The targets are what it gives already: the fitted weight is its own.
        order = eliminate(
            moment,
            twin.matrix("down_proj", e),
            metric=metrics[stack.name].double(),
            at_once=max(stack.width // LOOKS, 1),
        ).order
        assert sorted(order[-8:].tolist()) == got.units[e].tolist()


def test_an_expert_without_tokens_stays_as_it_is_and_is_named():
    model = tiny_experts.build("qwen3_moe")()
    stack = find_stacks(model)[0]
    few = WINDOWS[:1, :3]
    seen: set[int] = set()
    hook = stack.module.register_forward_pre_hook(lambda _, a: seen.update(a[1].flatten().tolist()))
    with torch.no_grad():
        model(few)
    hook.remove()
    unseen = sorted({*range(8)} - seen)
    assert unseen
    with pytest.warns(Notice, match=f"routed to experts {', '.join(map(str, unseen))} of .* not refitted"):
        got = refit(model, RefitRequest(cuts({stack.name: 8})), few)[stack.name]
    for e in range(8):
        own = stack.matrix("down_proj", e)[:, got.units[e]]
        assert got.weight[e].equal(own) == (e in unseen)
        squares = [stack.matrix(n, e).square() for n in ("gate_up_proj", "down_proj")]
        norms = squares[0].sum(1).view(2, -1).sum(0) + squares[1].sum(0)
        if e in unseen:
            assert got.units[e].tolist() == sorted(norms.argsort(descending=True)[:8].tolist())


def test_few_tokens_change_an_expert_little():
    """With one token, an error on it is not fitted away."""
    g = torch.Generator().manual_seed(0)
    z, t, weight = (torch.randn(*s, generator=g) for s in ((1, 200), (1, 6), (6, 200)))
    gram = Gram(200, 6)
    gram.update(z, t, torch.tensor([0.3]))
    one = best_fit(gram, Gram(0, 0), weight, False, [0.3 * (1 + SCARCE * 200 / 1)])
    change = (one.weight - weight) @ torch.randn(200, 1000, generator=g)
    assert float(change.norm()) < 0.5 * float((t.T - weight @ z.T).norm()) * 1000**0.5


def test_pooled_weighted_moments_are_those_of_all_tokens():
    g = torch.Generator().manual_seed(0)
    z, t, w = (
        torch.randn(9, 4, generator=g) + 5,
        torch.randn(9, 3, generator=g) - 4,
        torch.rand(9, generator=g),
    )
    whole, twice = Gram(4, 3), Gram(4, 3)
    whole.update(z, t, w)
    mean = w.double() @ z.double() / w.double().sum()
    torch.testing.assert_close(whole.z_mean.double(), mean, rtol=1e-5, atol=1e-6)
    centred = z.double() - mean
    torch.testing.assert_close(whole.zz.double(), centred.T @ (w.double()[:, None] * centred))
    twice.update(z[:4], t[:4], w[:4])
    twice.update(z[4:], t[4:], w[4:])
    parts = [Gram(4, 3) for _ in range(3)]
    parts[0].update(z[:4], t[:4], w[:4])
    parts[1].update(z[4:], t[4:], w[4:])
    together = Together(3)
    threads = [threading.Thread(target=p.pool, args=(together.add_up,)) for p in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for gram in (twice, *parts):
        assert gram.tokens == 9
        for name in ("z_mean", "t_mean", "zz", "tz", "tt"):
            torch.testing.assert_close(getattr(gram, name), getattr(whole, name))
        assert gram.count == pytest.approx(whole.count)


def test_an_attached_refit_of_experts_is_the_cut_and_leaves_no_trace():
    for name in ("qwen2_moe", "gpt_oss", "llama4_text"):
        model = tiny_experts.build(name)()
        before = {n: p.clone() for n, p in model.state_dict().items()}
        smaller = copy.deepcopy(model)
        done = prune(smaller, STATIC, 0.3, calibration=WINDOWS)
        lost = {k.name: k for k in done.kept if k.kind == "experts"}
        assert all(len(k.units) < k.of and k.name in done.refits for k in lost.values())
        with attach(model, STATIC, 0.3, calibration=WINDOWS) as handle, torch.no_grad():
            assert model(WINDOWS).logits.equal(smaller(WINDOWS).logits)
            assert handle.kept_units() == list(done.kept)
        assert all(p.equal(before[n]) for n, p in model.state_dict().items())


def test_a_refit_beats_the_same_channels_without_it_on_other_text():
    model = tiny_experts.build("mixtral")()
    text, other = (
        torch.randint(3, 120, (n, 24), generator=torch.Generator().manual_seed(n)) for n in (80, 20)
    )
    with torch.no_grad():
        dense = model(other).logits
    errors = {}
    for name, changes in {"wanda-sp": {}, "refitted": {"compensation": Refit()}, "best-static": {}}.items():
        smaller = copy.deepcopy(model)
        base = "wanda-sp" if name == "refitted" else name
        prune(smaller, compose(base, skip_layers=0, blocks=("experts",), **changes), 0.3, calibration=text)
        with torch.no_grad():
            errors[name] = float((smaller(other).logits - dense).square().mean())
    assert errors["best-static"] < errors["refitted"] < errors["wanda-sp"]


def test_damping_is_chosen_for_each_expert_on_the_windows_held_out():
    model = tiny_experts.build("mixtral")()
    stack = find_stacks(model)[0]
    cut = RefitRequest(cuts({stack.name: some(stack)}))
    how = Refit(damping=(1e-3, 0.3, 100.0), held_out=0.3)
    got = refit(model, cut, WINDOWS, how)[stack.name]
    fixed = [refit(model, cut, WINDOWS, Refit(damping=(d,)))[stack.name].weight for d in how.damping]
    fixed.append(torch.stack([stack.matrix("down_proj", e)[:, u] for e, u in enumerate(some(stack))]))
    for e in range(stack.experts):
        apart = [float((got.weight[e] - w[e]).abs().max()) for w in fixed]
        assert min(apart) < 1e-3 * max(apart), "one of the candidates on all windows, or as it was"
    assert got.error < got.error_before and got.damping in how.damping


def work(model, cache=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Notice)
        found = Preparation(model, WINDOWS, batch_size=4, cache=cache).statistics(STATIC, 0.3)
    return stored.CODECS["consumers"].pack(found.consumers)


def test_a_refit_of_experts_that_was_stopped_goes_on_at_its_layer(tmp_path, monkeypatch):
    monkeypatch.setattr(unfinished, "EVERY", 0.0)
    monkeypatch.setattr(unfinished, "COST", 0.0)

    def watch(model, stop=None):
        passes: list[int] = []

        def hook(number):
            passes.append(number)
            if len(passes) == stop:
                raise KeyboardInterrupt

        for number, layer in enumerate(model.model.layers):
            layer.register_forward_pre_hook(lambda *_, number=number: hook(number))
        return passes

    model = tiny_experts.build("qwen2_moe")()
    passes = watch(model)
    whole = work(model, tmp_path / "whole")
    model = tiny_experts.build("qwen2_moe")()
    watch(model, len(passes) - 5)
    with pytest.raises(KeyboardInterrupt):
        work(model, tmp_path / "cache")
    model = tiny_experts.build("qwen2_moe")()
    rest = watch(model)
    found = work(model, tmp_path / "cache")
    assert 5 < len(rest) < len(passes) / 2 and rest == passes[-len(rest) :]
    assert found[1] == whole[1] and found[0].keys() == whole[0].keys()
    assert all(t.equal(whole[0][n]) for n, t in found[0].items())


def test_whole_experts_are_not_refitted_and_consumers_have_to_fit():
    model = tiny_experts.build("mixtral")()
    method = compose(STATIC, experts="expert", blocks=("experts",))
    with pytest.raises(UsageError, match="a refit makes up for channels of experts, not for whole ones"):
        prune(model, method, 0.2, calibration=WINDOWS)
    prepared = Preparation(model, WINDOWS)
    statistics = prepared.statistics(STATIC, 0.3)
    stack = find_stacks(model)[0]
    with pytest.raises(UsageError, match=f"no consumer of {stack.name} refitted to the units it keeps"):
        statistics.check_consumer(stack, stack.width, None)


def test_memory_counts_moments_of_as_many_experts_as_are_there_at_once(monkeypatch):
    with torch.device("meta"):
        config = Qwen3MoeConfig(
            **{**tiny_experts.SHAPE, "hidden_size": 64, "moe_intermediate_size": 256},
            num_experts=8,
            num_experts_per_tok=2,
        )
        model = AutoModelForCausalLM.from_config(config)
    rehearsal = Rehearsal(model, torch.float32, torch.device("cpu"))
    widths = [b.units - 128 if isinstance(b, Stack) else b.units for b in rehearsal.parts]
    one = 4 * 256 * (256 + 64)
    works = {}
    for at_once in (8, 2):
        monkeypatch.setattr(expert_refit, "AT_ONCE", at_once * one)
        (phase,), made = footprints.consumers(rehearsal, Batch(2, 12), 4, Refit(), widths, True)
        works[at_once] = phase.work
        assert made == 2 * 8 * 64 * 128 * 4 and phase.sets == 4
    assert works[8] - works[2] == 6 * one
    _, sensitive = gradient_footprints.sensitivities(rehearsal, 2, 12)
    assert sensitive == 2 * 2 * 4 * 64 * 64, "of the attention's output and that of the experts"
