"""Which experts leave: by what the layer has lost then, others taking over and rescaled."""

import copy

import pytest
import tiny_experts
import torch
from test_expert_refit import wide
from tiny import close

from probeprune import UsageError, compose, prune
from probeprune.algebra.leaving import DAMPING, leaving_order
from probeprune.calibration import leaving
from probeprune.calibration.leaving import exchange_moment, route
from probeprune.calibration.routed import routed_moments
from probeprune.calibration.statistics import Statistics
from probeprune.model.experts import Stack, find_stacks
from probeprune.plan import expert_scores
from probeprune.surgery import cut

WINDOWS = torch.randint(3, 60, (4, 12), generator=torch.Generator().manual_seed(3))
REFIT = compose(
    "wanda-sp",
    name="order",
    skip_layers=0,
    blocks=("experts",),
    experts="expert",
    expert_importance="refit",
)


def moment_of(changes: torch.Tensor, terms: torch.Tensor) -> torch.Tensor:
    """From changes and terms (tokens, d, n)."""
    both = torch.cat([changes, terms], 2).flatten(0, 1)
    return both.T @ both / len(changes)


def error(changes: torch.Tensor, terms: torch.Tensor, gone: list[int]) -> float:
    """The error when these terms have left, written out, by LAPACK."""
    n = terms.shape[2]
    kept = [f for f in range(n) if f not in gone]
    lost = changes[:, :, gone].sum(2).flatten()
    own = terms[:, :, kept].flatten(0, 1)
    strength = (DAMPING * own.square().sum(0)).sqrt().diag()
    rows, wanted = torch.cat([own, strength]), torch.cat([lost, torch.zeros(len(kept)).double()])
    scales = torch.linalg.lstsq(rows, wanted[:, None]).solution[:, 0]
    return float((wanted - rows @ scales).square().sum()) / len(changes)


def test_terms_leave_in_the_order_that_a_search_finds():
    g = torch.Generator().manual_seed(0)
    changes, terms = (torch.randn(40, 3, 6, generator=g, dtype=torch.float64) for _ in range(2))
    changes += terms * torch.rand(6, generator=g)  # partly what leaves
    order, damages = leaving_order(moment_of(changes, terms))
    gone: list[int] = []
    worst = 0.0
    for step in range(5):
        errors = {e: error(changes, terms, [*gone, e]) for e in range(6) if e not in gone}
        best = min(errors, key=errors.__getitem__)
        gone.append(best)
        worst = max(worst, errors[best])
        assert int(order[step]) == best
        assert float(damages[step]) == pytest.approx(worst, rel=1e-6)
    assert sorted(order.tolist()) == list(range(6)) and (damages.diff() >= 0).all()


def test_terms_that_are_zero_leave_first_and_equal_ones_together():
    g = torch.Generator().manual_seed(0)
    terms = torch.randn(40, 3, 5, generator=g, dtype=torch.float64)
    terms[..., 3] = 0
    terms[..., 1] = terms[..., 0]  # either makes up for the other
    order, damages = leaving_order(moment_of(terms, terms))
    assert order[:2].tolist() == [3, 0]
    assert damages[0] < 1e-9 and damages[1] < 1e-2 * damages[2]
    order, damages = leaving_order(torch.zeros(8, 8))
    assert order.tolist() == [0, 1, 2, 3] and not damages.any()


def added(stack: Stack, x: torch.Tensor) -> torch.Tensor:
    """What the experts of a layer add for some inputs, by the model's own code."""
    made: list[torch.Tensor] = []
    hook = stack.module.register_forward_hook(lambda _, args, out: made.append(out.clone()))
    with torch.no_grad():
        stack.entry(x[None])
    hook.remove()
    out = made[0]
    return out.view(-1, *x.shape).sum(0) if stack.record.scales_input else out.view(x.shape)


def exchanged(model: torch.nn.Module, number: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Changes and contributions (tokens, d, experts), each expert cut from a model of its own."""
    stack = find_stacks(model, "expert")[number]
    whole = added(stack, x)
    changes, terms = [], []
    for e in range(stack.experts):
        less = copy.deepcopy(model)
        own = find_stacks(less, "expert")[number]
        if stack.groups > 1:
            own.root.mlp.gate.e_score_correction_bias[e] = float("-inf")
        else:
            cut(less, {own.name: torch.tensor([i for i in range(stack.experts) if i != e])}, experts="expert")
        change = whole - added(find_stacks(less, "expert")[number], x)
        silent = copy.deepcopy(model)
        own = find_stacks(silent, "expert")[number]
        with torch.no_grad():
            for name, p in own.module.named_parameters(recurse=False):
                if name.startswith("down_proj"):
                    p[e] = 0
        terms.append(whole - added(own, x))
        mine = (terms[-1] != 0).any(1)
        if model.config.model_type not in ("qwen2_moe", "phimoe"):  # there other tokens' weights change too
            assert change[~mine].abs().sum() < 1e-9
        changes.append(change * mine[:, None])
    return torch.stack(changes, 2), torch.stack(terms, 2)


@pytest.mark.parametrize("name", ["qwen2_moe", "phimoe", "gpt_oss", "granitemoe", "glm4_moe", "llama4_text"])
def test_changes_are_those_of_models_without_each_expert(name, monkeypatch):
    monkeypatch.setattr(leaving, "TOKENS", 5)
    model = wide(tiny_experts.build(name)())
    before = {n: p.clone() for n, p in model.state_dict().items()}
    x = torch.randn(12, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        got = exchange_moment(find_stacks(model)[0], x)
    assert all(p.equal(before[n]) for n, p in model.state_dict().items())
    close(got.double(), moment_of(*exchanged(model, 0, x)) * len(x))


def inputs_of(model: torch.nn.Module, stack: Stack, ids: torch.Tensor) -> torch.Tensor:
    """What goes to the router and the experts (tokens, d)."""
    seen: list[torch.Tensor] = []
    hook = stack.entry.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(ids)
    hook.remove()
    return seen[0]


def left_error(model: torch.nn.Module, stack: Stack, x: torch.Tensor, kept: torch.Tensor) -> float:
    """Share of error of what a layer's experts add, when these alone are left and have the best scales."""
    whole = added(stack, x).double()
    less = copy.deepcopy(model)
    cut(less, {stack.name: kept}, experts="expert")
    own = find_stacks(less, "expert")[0]
    terms = torch.zeros(*whole.shape, own.experts, dtype=torch.float64)
    with torch.no_grad():
        _, index, weights = route(own, x)
        for e in range(own.experts):
            token, place = (index == e).nonzero(as_tuple=True)
            terms[token, :, e] = (
                own.output(e, own.coupled(e, x[token])) * weights[token, place, None]
            ).double()
    flat = terms.flatten(0, 1)
    scales = torch.linalg.lstsq(flat, whole.flatten()[:, None], driver="gelsd").solution
    return float((whole.flatten() - (flat @ scales)[:, 0]).square().sum() / whole.square().sum())


@pytest.mark.filterwarnings("ignore:no token of the calibration text")
def test_no_other_expert_leaves_less_error_than_the_first():
    """The layer's own error when one leaves, the others rescaled; when more leave, changes do not add up."""
    for name in ("mixtral", "qwen3_moe"):
        model = tiny_experts.build(name)()
        found = routed_moments(model, WINDOWS, exchange=True)
        stack = find_stacks(model, "expert")[0]
        x = inputs_of(model, stack, WINDOWS)
        scores = expert_scores(REFIT, stack, Statistics(routed=found))
        assert scores is not None
        every = torch.arange(stack.experts)
        errors = torch.tensor([left_error(model, stack, x, every[every != e]) for e in every])
        assert errors[scores.argmin()] <= errors.min() + 1e-3


def test_experts_are_cut_by_it_and_kept_statistics_have_to_hold_it():
    model = tiny_experts.build("glm4_moe")()
    smaller = copy.deepcopy(model)
    done = prune(smaller, REFIT, 0.15, calibration=WINDOWS)
    found = routed_moments(model, WINDOWS, exchange=True)
    for stack in find_stacks(model, "expert"):
        scores = expert_scores(REFIT, stack, Statistics(routed=found))
        assert scores is not None and len(scores.unique()) == stack.experts
        own = next(k for k in done.kept if k.name == stack.name)
        halves = scores.view(2, -1).argsort(dim=1, descending=True)[:, : len(own.units) // 2]
        assert list(own.units) == sorted((halves + torch.tensor([[0], [4]])).flatten().tolist())
    plain = routed_moments(model, WINDOWS)
    with pytest.raises(UsageError, match="statistics do not say what each expert's leaving changes"):
        expert_scores(REFIT, stack, Statistics(routed=plain))
