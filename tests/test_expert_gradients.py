"""Channels of experts by gradients: against gradients of the whole model in float64."""

import copy

import pytest
import tiny_experts
import torch
from test_expert_refit import wide
from torch.nn.functional import cross_entropy

from probeprune import Gradients, compose, prune
from probeprune.calibration import gradient_footprints
from probeprune.calibration.gradients import saliences
from probeprune.calibration.statistics import Statistics
from probeprune.errors import UsageError
from probeprune.model.experts import find_stacks
from probeprune.model.footprint import Rehearsal
from probeprune.plan import expert_scores

WINDOWS = torch.randint(3, 60, (3, 12), generator=torch.Generator().manual_seed(5))
SMALL = Gradients(windows=3, length=12)
FORMULAS = {
    "param_first": lambda w, g, a: (w * g).abs(),
    "param_second": lambda w, g, a: w * a * w,
    "param_mix": lambda w, g, a: (w * g - 0.5 * w * a * w).abs(),
}


def by_hand(model, criterion):
    """By tensor of experts, the criterion of each weight, in float64; a channel's rows and columns last."""
    model = wide(model)
    stacks = find_stacks(model)
    weights = [stack.module._parameters[key] for stack in stacks for key in ("gate_up_proj", "down_proj")]
    samples = []
    for window in WINDOWS:
        logits = model(input_ids=window[None]).logits[0]
        samples.append(torch.autograd.grad(cross_entropy(logits[:-1], window[1:]), weights))
    found = []
    for i, w in enumerate(weights):
        g = sum(s[i] for s in samples) / len(samples)
        a = sum(s[i] ** 2 for s in samples) / len(samples)
        score = FORMULAS[criterion](w.detach(), g, a)
        found.append(score.mT if stacks[0].record.transposed else score)
    return list(zip(stacks, found[::2], found[1::2], strict=True))


@pytest.mark.parametrize(
    ("name", "criterion"),
    [("qwen2_moe", "param_first"), ("gpt_oss", "param_mix"), ("llama4_text", "param_second")],
)
def test_scores_are_those_of_gradients_by_hand(name, criterion):
    model = tiny_experts.build(name)()
    method = compose("llm-pruner", importance=criterion, skip_layers=0, gradients=SMALL)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    found = saliences(model, WINDOWS, criterion, gradients=SMALL, experts=True)
    assert all(p.equal(before[n]) for n, p in model.state_dict().items())
    assert not any(p.grad is not None for p in model.parameters())
    for stack, rows, columns in by_hand(model, criterion):
        own = next(s for s in find_stacks(model) if s.name == stack.name)
        scores = expert_scores(method, own, Statistics(saliences=found))
        rows, columns = rows.sum(2), columns.sum(1)
        assert found[f"{stack.name}.gate_up_proj"].shape == rows.shape
        gate, up = (rows[:, 0::2], rows[:, 1::2]) if stack.record.interleaved else rows.chunk(2, 1)
        want = gate + up + columns
        assert (scores - want).abs().max() <= 2e-4 * want.abs().max()


def test_pruning_by_gradients_takes_channels_of_experts():
    for base in ("llm-pruner", "loraprune"):
        model = tiny_experts.build("mixtral")()
        method = compose(base, skip_layers=0, gradients=SMALL, blocks=("experts",))
        assert method.experts_stay is None
        done = prune(model, method, 0.3, calibration=WINDOWS)
        lost = [k for k in done.kept if k.kind == "experts"]
        assert lost and all(len(k.units) == 16 and len({*k.by_expert}) > 1 for k in lost)


def test_saliences_of_experts_have_to_be_there():
    model = tiny_experts.build("mixtral")()
    stacks = find_stacks(model)
    found = saliences(model, WINDOWS, gradients=SMALL)
    assert not any(s.name in n for n in found for s in stacks)
    with pytest.raises(UsageError, match=f"no saliences that fit {stacks[0].name}.gate_up_proj"):
        Statistics(saliences=found).check(frozenset({"saliences"}), stacks, experts=True)


def test_memory_counts_gradients_of_experts():
    rehearsal = Rehearsal(tiny_experts.build("mixtral")(), torch.float32, torch.device("cpu"))
    works = []
    for experts in (False, True):
        phases = gradient_footprints.saliences(rehearsal, rehearsal, "param_mix", SMALL, experts)
        works.append(next(p.work for p in phases if p.name == "gradients"))
    size = sum(copy.copy(p).numel() for p in rehearsal.stacks_here[0].module.parameters())
    assert works[1] - works[0] > 2 * 4 * size
