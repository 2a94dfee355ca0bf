"""Blocks are found by one record a family; what cannot be permuted in place is refused with a reason."""

import pytest
import torch
from tiny import FAMILIES
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from probeprune.blocks import find_blocks
from probeprune.errors import UsageError


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_has_two_blocks_in_the_order_they_run(family):
    model = FAMILIES[family]()
    layers = model.config.num_hidden_layers
    blocks = find_blocks(model)
    assert [(b.layer, b.kind) for b in blocks] == [
        (i, k) for i in range(layers) for k in ("attention", "mlp")
    ]
    ran: list[str] = []
    for b in blocks:
        b.consumer.register_forward_pre_hook(lambda *_, name=b.name: ran.append(name))
    with torch.no_grad():
        model(torch.ones(1, 4, dtype=torch.long))
    assert ran == [b.name for b in blocks]
    # Every parameter of the layers but the norms' belongs to exactly one block.
    total = sum(p.numel() for n, p in model.named_parameters() if ".layers." in n and "norm" not in n)
    assert sum(b.parameters for b in blocks) == total


@pytest.mark.parametrize(
    ("family", "units", "count", "width", "parameters"),
    [
        ("llama-gqa", "group", 2, 24, (24 + 8 + 8 + 24) * 48),
        ("llama-gqa", "balanced", 6, 8, (8 + 8) * 48),
        ("llama-gqa", "query", 6, 8, (8 + 8) * 48),
        ("llama", "query", 6, 8, 4 * 8 * 48),  # without grouping all kinds are one head
        ("opt", "group", 6, 8, 4 * 8 * 48 + 3 * 8),  # biases of q, k, v go, the output's stays
    ],
)
def test_attention_units(family, units, count, width, parameters):
    block = find_blocks(FAMILIES[family](), units)[0]
    assert (block.units, block.unit_width, block.unit_parameters) == (count, width, parameters)


def test_unsupported_model_says_what_is_and_how_to_add():
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=10))
    with pytest.raises(UsageError, match=r"'gpt2'.*llama.*opt.*Family record in probeprune/blocks.py"):
        find_blocks(model)
    with pytest.raises(UsageError, match="unknown unit kind"):
        find_blocks(FAMILIES["llama"](), "heads")  # type: ignore[arg-type]


def test_weights_that_two_modules_use_are_refused():
    model = FAMILIES["llama"]()
    model.model.layers[3].mlp.up_proj.weight = model.model.layers[2].mlp.up_proj.weight
    with pytest.raises(UsageError, match=r"layers.2.mlp is tied to or shares memory"):
        find_blocks(model)


def test_overlapping_memory_is_refused():
    model = FAMILIES["llama"]()
    gate, up = model.model.layers[1].mlp.gate_proj, model.model.layers[1].mlp.up_proj
    up.weight = nn.Parameter(gate.weight.data[:])
    assert up.weight is not gate.weight
    with pytest.raises(UsageError, match="shares memory"):
        find_blocks(model)


def test_quantised_wrapped_and_offloaded_weights_are_refused():
    class Quantised(nn.Linear):
        pass

    model = FAMILIES["llama"]()
    model.model.layers[1].mlp.up_proj = Quantised(48, 100, bias=False)
    with pytest.raises(UsageError, match=r"up_proj is a Quantised.*unquantised"):
        find_blocks(model)

    class Hook:
        offload = True

    model = FAMILIES["llama"]()
    model.model.layers[1].mlp.up_proj._hf_hook = Hook()
    with pytest.raises(UsageError, match="offloaded"):
        find_blocks(model)
