"""Blocks are found by one record a family; what cannot be permuted in place is refused with a reason."""

import pytest
import torch
from tiny import FAMILIES
from torch import nn

from probeprune.errors import UsageError
from probeprune.model.blocks import find_blocks


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


def test_unsupported_model_says_what_is_near_and_how_to_add():
    model = FAMILIES["llama"]()
    for model_type, near in (("llama5", r" \(nearest: llama\)"), ("bert", "")):
        model.config.model_type = model_type
        words = (
            rf"'{model_type}' .*families{near}; `probeprune models` lists.*Family record in probeprune/model"
        )
        with pytest.raises(UsageError, match=words):
            find_blocks(model)


def test_unknown_unit_kinds_are_refused():
    with pytest.raises(UsageError, match="unknown unit kind"):
        find_blocks(FAMILIES["llama"](), "heads")  # type: ignore[arg-type]


def test_weights_that_two_modules_use_are_refused():
    model = FAMILIES["llama"]()
    model.model.layers[3].mlp.up_proj.weight = model.model.layers[2].mlp.up_proj.weight
    with pytest.raises(UsageError, match=r"layers.2.mlp is tied to another module or shares its memory"):
        find_blocks(model)


def test_overlapping_memory_is_refused():
    model = FAMILIES["llama"]()
    gate, up = model.model.layers[1].mlp.gate_proj, model.model.layers[1].mlp.up_proj
    up.weight = nn.Parameter(gate.weight.data[:])
    assert up.weight is not gate.weight
    with pytest.raises(UsageError, match="shares its memory"):
        find_blocks(model)


def test_quantised_and_wrapped_weights_are_refused():
    class Quantised(nn.Linear):
        pass

    model = FAMILIES["llama"]()
    model.model.layers[1].mlp.up_proj = Quantised(48, 100, bias=False)
    with pytest.raises(UsageError, match=r"up_proj is a test_blocks\.Quantised.*unquantised"):
        find_blocks(model)


@pytest.mark.parametrize(
    ("family", "index", "units", "width", "unit_parameters"),
    [
        ("llama", 1, 100, 1, 3 * 48),
        ("llama-bias", 1, 100, 1, 3 * 48 + 2),  # gate and up have a bias entry a channel, down has not
        ("opt", 1, 100, 1, 2 * 48 + 1),
        ("gemma2", 1, 100, 1, 3 * 48),
        ("llama-bias", 0, 2, 24, 64 * 48 + 40),
        ("qwen2", 0, 2, 24, 64 * 48 + 40),
        ("qwen3", 0, 2, 24, 64 * 48),
    ],
)
def test_units_of_mlps_and_of_linear_maps_with_biases(family, index, units, width, unit_parameters):
    block = find_blocks(FAMILIES[family]())[index]
    assert (block.units, block.unit_width, block.unit_parameters) == (units, width, unit_parameters)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_norm_reads_the_residual_and_the_entry_what_the_norm_gives(family):
    # The probe is chosen by the norm's input: the wrong norm of a sandwich would choose by something else.
    model = FAMILIES[family]()
    for block in find_blocks(model):
        layer = model.get_submodule(block.name.rpartition(".")[0])
        seen: dict[str, torch.Tensor] = {}

        def note(name, seen=seen):
            def hook(module, args, kwargs):
                seen[name] = (args[0] if args else kwargs["hidden_states"]).detach()

            return hook

        hooks = [
            layer.register_forward_pre_hook(note("layer"), with_kwargs=True),
            block.entry.register_forward_pre_hook(note("entry"), with_kwargs=True),
            # A block that adds nothing: what is left of the stream behind it is its residual.
            block.consumer.register_forward_hook(lambda _, args, out: torch.zeros_like(out)),
            layer.register_forward_hook(lambda _, a, out, s=seen: s.update(out=out.detach())),
        ]
        if block.norm is not None:
            hooks.append(block.norm.register_forward_pre_hook(note("residual"), with_kwargs=True))
            hooks.append(block.norm.register_forward_hook(lambda _, a, out, s=seen: s.update(normed=out)))
        with torch.no_grad():
            model(torch.arange(12).view(2, 6))
        for h in hooks:
            h.remove()
        if family == "opt-post-norm":
            assert block.norm is None
            if block.kind == "attention":
                assert seen["entry"].equal(seen["layer"])
        else:
            parallel = family == "gpt-neox"  # both blocks read the layer's input
            residual = seen["layer" if block.kind == "attention" or parallel else "out"]
            torch.testing.assert_close(seen["residual"].view_as(residual), residual)
            assert seen["entry"].equal(seen["normed"])


def test_a_view_nested_behind_another_is_refused_too():
    # One flat parameter with views at its start and further on: sorted by address, the second view's
    # neighbour is the first view, not the flat parameter it overlaps.
    model = FAMILIES["llama"]()
    flat = nn.Parameter(torch.randn(20000))
    model.register_parameter("flat", flat)
    model.model.norm.weight = nn.Parameter(flat.data[48:96])
    model.model.layers[1].mlp.up_proj.weight = nn.Parameter(flat.data[4800:9600].view(100, 48))
    with pytest.raises(UsageError, match="shares its memory"):
        find_blocks(model)


def test_a_tied_language_model_head_is_no_obstacle():
    # Embedding and head are in no block: most small models tie them.
    model = FAMILIES["llama"]()
    model.lm_head.weight = model.model.embed_tokens.weight
    assert len(find_blocks(model)) == 10


def test_integer_weights_are_refused():
    model = FAMILIES["opt"]()
    fc1 = model.model.decoder.layers[2].fc1
    fc1.weight = nn.Parameter(torch.zeros(100, 48, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UsageError, match=r"layers\.2\.fc1 .*not a plain floating-point"):
        find_blocks(model)
