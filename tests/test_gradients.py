"""Saliences against gradients written out in float64; an overflow is an error, not an arbitrary cut."""

from dataclasses import replace

import pytest
import torch
from tiny import FAMILIES, OPT_SHAPE, SHAPE, Given, lively, snapshot, token_ids
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, Phi3Config, Phi3ForCausalLM

from probeprune import Gradients, attach, compose, find_blocks, prune
from probeprune.calibration import gradients
from probeprune.calibration.backward import backward_by_layer
from probeprune.calibration.gradients import saliences
from probeprune.calibration.statistics import Statistics
from probeprune.errors import UsageError
from probeprune.plan import static_scores
from probeprune.strategies.criteria import Settled, lora_matrices

WINDOWS = token_ids(3, 12, seed=5)
CRITERIA = ["param_first", "vectorize", "param_second", "param_mix"]


def two_layers(family: str):
    torch.manual_seed(0)
    if family == "opt":
        model = OPTForCausalLM(OPTConfig(**{**OPT_SHAPE, "num_hidden_layers": 2}, word_embed_proj_dim=48))
    else:
        heads = {} if family == "llama-gqa" else {"num_key_value_heads": 6}
        # No multiple of the paper's head size of 128 or rotary base of 10000.
        model = LlamaForCausalLM(
            LlamaConfig(
                **{**SHAPE, **heads, "num_hidden_layers": 2},
                rope_parameters={"rope_type": "default", "rope_theta": 5e5},
            )
        )
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


def by_hand(model, criterion: str) -> dict[str, torch.Tensor]:
    """The gradient-based criterion of every weight of every linear map, elementwise, in float64."""
    model = model.double()
    weights = {
        n: m.weight for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "head" not in n
    }
    per_sample = []
    for window in WINDOWS:
        scores = model(input_ids=window[None]).logits[0]
        loss = cross_entropy(scores[:-1], window[1:])
        per_sample.append(dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True)))
    result = {}
    for name, w in weights.items():
        w = w.detach()
        g = sum(s[name] for s in per_sample) / len(per_sample)
        a = sum(s[name] ** 2 for s in per_sample) / len(per_sample)
        result[name] = {
            "param_first": w * g,
            "vectorize": w * g,
            "param_second": w * a * w,
            "param_mix": w * g - 0.5 * w * a * w,
        }[criterion]
    return result


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("family", ["llama", "llama-gqa", "opt"])
def test_taylor_against_autograd_written_out(family, criterion):
    model = two_layers(family)
    got = saliences(model, WINDOWS, criterion)
    elements = by_hand(two_layers(family), criterion)
    blocks = find_blocks(model)
    assert set(got) == {m.name for b in blocks for m in b.members}
    method = compose(
        "llm-pruner", importance=criterion, gradients=Gradients(windows=3, length=12), skip_layers=0
    )
    for block in blocks:
        attention = block.kind == "attention"
        expected = torch.zeros(block.units, dtype=torch.float64)
        for unit in range(block.units):
            # Exactly q, k, v rows and o columns of a group; gate, up (fc1) rows and down (fc2) columns.
            for path, s in elements.items():
                if not path.startswith(block.name.removesuffix(".mlp")):
                    continue
                leaf = path.rpartition(".")[2]
                if attention and leaf in ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj"):
                    wide = leaf in ("q_proj", "o_proj", "out_proj")
                    width = block.head_dim * (block.group_size if wide else 1)
                elif not attention and leaf in ("gate_proj", "up_proj", "down_proj", "fc1", "fc2"):
                    width = 1
                else:
                    continue
                own = slice(unit * width, (unit + 1) * width)
                part = s[:, own].T if leaf in ("o_proj", "out_proj", "down_proj", "fc2") else s[own]
                for row in part:
                    expected[unit] += row.sum().abs() if criterion == "vectorize" else row.abs().sum()
        scores = static_scores(method, block, Statistics(saliences=got))
        torch.testing.assert_close(scores.double(), expected, rtol=1e-3, atol=1e-7)


def test_reductions_over_the_members_of_a_group():
    model = two_layers("llama")
    got = saliences(model, WINDOWS)
    block = find_blocks(model)[1]
    parts = torch.stack([got[m.name] for m in block.members])
    for reduction, expected in (
        ("sum", parts.sum(0)),
        ("mean", parts.sum(0) / 3),
        ("max", parts.max(0).values),
        ("prod", parts[0] * parts[1] * parts[2]),
    ):
        method = compose("llm-pruner", gradients=Gradients(reduction=reduction))
        scores = static_scores(method, block, Statistics(saliences=got))
        torch.testing.assert_close(scores, expected)


@pytest.mark.parametrize("criterion", [*CRITERIA, "lora-guided"])
def test_a_fused_model_scores_as_the_same_model_in_parts(criterion):
    llama = FAMILIES["llama-gqa"]()
    shape = {k: v for k, v in SHAPE.items()}
    fused = Phi3ForCausalLM(Phi3Config(**shape, pad_token_id=0, eos_token_id=2)).eval()
    state = llama.state_dict()
    for i in range(5):
        at, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        state[f"{at}.qkv_proj.weight"] = torch.cat([state.pop(f"{at}.{x}_proj.weight") for x in "qkv"])
        state[f"{mlp}.gate_up_proj.weight"] = torch.cat(
            [state.pop(f"{mlp}.{x}_proj.weight") for x in ("gate", "up")]
        )
    fused.load_state_dict(state)
    fused.config.rms_norm_eps = llama.config.rms_norm_eps
    for norm in (m for m in fused.modules() if hasattr(m, "variance_epsilon")):
        norm.variance_epsilon = llama.config.rms_norm_eps
    torch.testing.assert_close(fused(WINDOWS).logits, llama(WINDOWS).logits, rtol=1e-4, atol=1e-4)
    parts, whole = saliences(llama, WINDOWS, criterion), saliences(fused, WINDOWS, criterion)
    if criterion == "lora-guided":  # a fused map has one A where three have their own
        assert whole.keys() != parts.keys()
        return
    method = compose("llm-pruner", importance=criterion)
    for a, b in zip(find_blocks(llama), find_blocks(fused), strict=True):
        torch.testing.assert_close(
            static_scores(method, a, Statistics(saliences=parts)),
            static_scores(method, b, Statistics(saliences=whole)),
            rtol=1e-3,
            atol=1e-6,
        )


@pytest.mark.parametrize("family", ["llama", "llama-gqa", "opt"])
def test_lora_guided_is_the_first_steps_criterion(family):
    # LoRA written out: W + B A with B = 0, B's gradient by autograd, |(dB A) W| summed to rows or columns.
    model = two_layers(family)
    settings = Gradients(3, 12, rank=4, draws=2)
    got = saliences(model, WINDOWS, "lora-guided", gradients=settings, seed=7)
    members = {m.name: m for b in find_blocks(model) for m in b.members}
    draws = {n: list(lora_matrices(Settled((), m, m.linear.weight, settings, 7))) for n, m in members.items()}
    expected = {}
    for draw in range(2):
        adapters = {}
        hooks = []
        for name, m in members.items():
            b = torch.zeros(m.linear.out_features, 4, requires_grad=True)
            a = draws[name][draw]
            adapters[name] = (a, b)
            hooks.append(
                m.linear.register_forward_hook(lambda _, args, out, a=a, b=b: out + args[0] @ a.T @ b.T)
            )
        model(input_ids=WINDOWS, labels=WINDOWS).loss.backward()
        for hook in hooks:
            hook.remove()
        for name, m in members.items():
            a, b = adapters[name]
            s = ((b.grad @ a) * m.linear.weight.detach()).abs()
            expected[name] = expected.get(name, 0) + s.sum(1 - m.axis) / 2
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-8)
    # A block's scores: each map's sums over their own norm; q, k and v go together.
    method = compose("loraprune", gradients=settings, skip_layers=0, seed=7)
    block = find_blocks(model)[0]
    total = torch.zeros(block.units)
    for m in block.members:
        units = expected[m.name].view(block.units, m.width).sum(1)
        total += units / units.square().sum().sqrt()
    scores = static_scores(method, block, Statistics(saliences=got))
    torch.testing.assert_close(scores, total, rtol=1e-3, atol=1e-6)
    done = prune(model, method, 0.3, calibration=WINDOWS)
    for kept, pruned in zip(done.kept[::2], find_blocks(model)[::2], strict=True):
        rows = {len(kept.units) * m.width for m in pruned.members}
        assert {m.linear.weight.shape[m.axis] for m in pruned.members} == rows


def test_draws_differ_by_seed_and_map_and_are_reproducible():
    model = two_layers("llama")
    one, again = saliences(model, WINDOWS, "lora-guided"), saliences(model, WINDOWS, "lora-guided")
    other = saliences(model, WINDOWS, "lora-guided", seed=1)
    assert all(one[n].equal(again[n]) for n in one) and not any(one[n].equal(other[n]) for n in one)
    member = find_blocks(model)[0].members[0]
    a, b = (
        next(lora_matrices(Settled((), replace(member, name=name), torch.zeros(5, 9), Gradients(rank=3), 0)))
        for name in ("a", "b")
    )
    assert not a.equal(b) and a.shape == (3, 9) and a.abs().max() <= 1 / 3


def test_kept_sets_are_reproducible():
    method = compose("llm-pruner", gradients=Gradients(3, 12), skip_layers=1)
    sets = [prune(FAMILIES["llama-gqa"](), method, 0.3, calibration=WINDOWS).kept for _ in range(2)]
    assert sets[0] == sets[1]
    other = prune(FAMILIES["llama-gqa"](), method, 0.3, calibration=token_ids(3, 12, seed=6))
    assert other.kept != sets[0], "the text decides"


def test_the_model_is_left_as_it_was(tmp_path):
    model = two_layers("llama")
    model.lm_head.weight.requires_grad_(False)
    asked = [p.requires_grad for p in model.parameters()]
    with torch.inference_mode():
        first = saliences(model, WINDOWS, cache=tmp_path)
    assert [p.requires_grad for p in model.parameters()] == asked
    assert all(p.grad is None for p in model.parameters())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    calls = []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    second = saliences(model, WINDOWS, cache=tmp_path)
    assert not calls and all(first[n].equal(second[n]) for n in first)
    saliences(model, WINDOWS, "vectorize", cache=tmp_path)
    assert calls, "another criterion is another entry"


@pytest.mark.parametrize("criterion", [*CRITERIA, "lora-guided"])
def test_an_overflow_is_an_error_and_cuts_nothing(criterion):
    model = two_layers("llama").to(torch.float16)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1e5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    method = compose("loraprune" if criterion == "lora-guided" else "llm-pruner", importance=criterion)
    method = compose(method, gradients=Gradients(3, 12), skip_layers=0)
    with pytest.raises(FloatingPointError, match="NaN or infinite; use float32 or bfloat16"):
        prune(model, method, 0.3, calibration=WINDOWS)
    assert all(v.equal(model.state_dict()[k]) or not v.isfinite().all() for k, v in before.items())
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in before.items()}


def test_a_gradient_that_overflows_names_its_map():
    model = two_layers("llama")
    with torch.no_grad():  # the MLP's output is zero, its gradient is not
        model.model.layers[0].mlp.up_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.fill_(3e38)
        model.model.layers[0].mlp.gate_proj.weight.fill_(1e3)
    with pytest.raises(FloatingPointError, match=r"gradient of model.layers.0.mlp.up_proj.* is NaN or inf"):
        saliences(model, WINDOWS)


@pytest.mark.parametrize("criterion", ["param_first", "vectorize", "param_second"])
def test_a_narrow_model_is_differentiated_in_float32(criterion, monkeypatch):
    # One layer: its input is the same in both dtypes.
    config = OPTConfig(**{**OPT_SHAPE, "num_hidden_layers": 1}, word_embed_proj_dim=48)
    make = lively(lambda: OPTForCausalLM(config))
    narrow, same = make().bfloat16(), make().bfloat16().float()
    before, dtypes = snapshot(narrow), set()
    hook = narrow.model.decoder.layers[0].register_forward_hook(
        lambda _, args, out: dtypes.add((args[0].dtype, out.dtype))
    )
    with torch.inference_mode():
        got = saliences(narrow, WINDOWS, criterion)
    hook.remove()
    before.assert_untouched()
    assert dtypes == {(torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)}
    exact = saliences(same, WINDOWS, criterion)
    monkeypatch.setattr(gradients, "backward_by_layer", lambda *a, wide, **k: backward_by_layer(*a, **k))
    rounded = saliences(narrow, WINDOWS, criterion)
    errors = [
        torch.stack([(found[n] - exact[n]).norm() / exact[n].norm() for n in exact]).mean()
        for found in (got, rounded)
    ]
    assert errors[0] < 0.01 and errors[0] < 0.25 * errors[1]


def test_a_narrow_model_is_as_before_where_its_gradients_fail():
    model = two_layers("llama").bfloat16()

    def stop(what, done, total):
        if done == 4:
            raise KeyboardInterrupt

    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        saliences(model, WINDOWS, progress=stop)
    before.assert_untouched()


@pytest.mark.parametrize(
    ("windows", "criterion", "says"),
    [
        (WINDOWS, "param_third", "unknown criterion 'param_third'; did you mean 'param_first'"),
        (WINDOWS[:, :1], "param_first", "at least 2 tokens"),
        (token_ids(1, 200), "param_first", "positions"),
    ],
)
def test_gradients_that_cannot_be_taken_are_refused(windows, criterion, says):
    with pytest.raises(UsageError, match=says):
        saliences(two_layers("llama"), windows, criterion)


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(UsageError, match=r"model.eval\(\)"):
        saliences(two_layers("llama").train(), WINDOWS)


def test_saliences_that_are_missing_or_nan_are_refused():
    model = two_layers("llama")
    with pytest.raises(UsageError, match="no saliences"):
        attach(model, "llm-pruner", 0.2, calibration=Given(model, Statistics()))
    broken = dict(saliences(model, WINDOWS))
    name = next(iter(broken))
    broken[name] = broken[name] * float("nan")
    with pytest.raises(FloatingPointError, match=name):
        attach(model, "llm-pruner", 0.2, calibration=Given(model, Statistics(saliences=broken)))
