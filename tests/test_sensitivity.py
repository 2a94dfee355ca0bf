"""Sensitivities against a slow version: every label's gradient, weighted by its probability."""

import pytest
import torch
from tiny import token_ids

from probeprune import find_blocks
from probeprune.calibration.sensitivity import FLOOR, sensitivities


def exact(model, ids, block):
    """`E[g g']` over independent labels at every token of one window: gradients of all log-probabilities."""
    seen = {}

    def hook(module, args, output):
        output.retain_grad()
        seen["output"] = output

    handle = block.consumer.register_forward_hook(hook)
    with torch.enable_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0]
        log_p = logits.log_softmax(-1)
        # Labels are independent and their scores have mean zero: cross terms vanish.
        total = 0
        for t in range(len(log_p)):
            for label in range(log_p.shape[1]):
                seen["output"].grad = None
                log_p[t, label].backward(retain_graph=True)
                g = seen["output"].grad[0].double()
                total = total + log_p[t, label].exp().double().detach() * (g.T @ g) / len(log_p)
    handle.remove()
    return total


@pytest.fixture
def small():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=13,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.6,
    )
    return LlamaForCausalLM(config).eval()


def test_drawn_labels_give_the_fisher_information(small):
    ids = torch.randint(13, (1, 5), generator=torch.Generator().manual_seed(1))
    got = sensitivities(small, ids.expand(800, -1))
    assert all(not p.requires_grad or p.grad is None for p in small.parameters())
    for block in find_blocks(small):
        want = exact(small, ids, block)
        want += FLOOR * want.diagonal().mean() * torch.eye(8, dtype=torch.float64)
        difference = (got[block.name].double() - want).norm() / want.norm()
        assert difference < 0.2, block.name


def test_a_small_error_costs_the_divergence_it_predicts(small):
    """An error in the last block's output, at one token: later tokens do not read it."""
    ids = torch.randint(13, (1, 1), generator=torch.Generator().manual_seed(2))
    block = find_blocks(small)[-1]
    fisher = exact(small, ids, block)
    error = torch.randn(8, generator=torch.Generator().manual_seed(3)) * 1e-2
    with torch.no_grad():
        before = small(input_ids=ids).logits[0].double().log_softmax(-1)
        handle = block.consumer.register_forward_hook(lambda _, a, o: o + error)
        after = small(input_ids=ids).logits[0].double().log_softmax(-1)
        handle.remove()
    divergence = float((before.exp() * (before - after)).sum())
    e = error.double()
    assert divergence == pytest.approx(float(e @ fisher @ e) / 2, rel=0.05)


def test_sensitivities_are_read_back_and_leave_the_model_alone(llama, tmp_path):
    model, windows = llama[0], token_ids(3, 12)
    weights = {n: p.clone() for n, p in model.named_parameters()}
    first = sensitivities(model, windows, cache=tmp_path)
    stored = list(tmp_path.glob("*.safetensors"))
    assert len(stored) == 1
    before = stored[0].stat().st_mtime_ns
    again = sensitivities(model, windows, cache=tmp_path)
    assert stored[0].stat().st_mtime_ns == before
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert first.keys() == {b.name for b in find_blocks(model)}
    for n, p in model.named_parameters():
        assert torch.equal(p, weights[n])
        assert p.grad is None


def test_an_overflowing_gradient_names_its_block(llama):
    model = llama[0]
    block = find_blocks(model)[0]
    with torch.no_grad():
        block.consumer.weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="window 0"):
        sensitivities(model, token_ids(2, 8))
