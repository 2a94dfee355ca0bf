"""Budgets are hit, and the published counts come out of the published rule."""

import pytest
import torch
from tiny import FAMILIES
from transformers import LlamaConfig, LlamaForCausalLM

from probeprune.errors import UsageError
from probeprune.model.blocks import find_blocks
from probeprune.strategies.allocation import (
    ALLOCATIONS,
    Request,
    even,
    global_threshold,
    nominal,
    nominal_kept,
    removed_share,
    uniform,
)


def meta_llama(**shape):
    with torch.device("meta"):
        return find_blocks(LlamaForCausalLM(LlamaConfig(**shape)), "query")


@pytest.fixture(scope="module")
def llama_7b():
    return meta_llama(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)


@pytest.mark.parametrize(
    ("ratio", "heads", "channels", "llm_pruner"),
    # 0.22, 0.44 and 0.66 of 32 heads and 11008 channels, in Probe Pruning's and in LLM-Pruner's code.
    [(0.2, 7, 2421, 2422), (0.4, 14, 4843, 4844), (0.6, 21, 7265, 7266)],
)
def test_nominal_counts_at_the_papers_shape(llama_7b, ratio, heads, channels, llm_pruner):
    request = Request(llama_7b, ratio, skip_layers=3)
    kept = nominal(request)  # r' = ratio * 32 / 29, to two decimals
    assert kept[:6] == [32, 11008] * 3
    assert set(kept[6::2]) == {32 - heads} and set(kept[7::2]) == {11008 - channels}
    kept = nominal_kept(request)
    assert set(kept[6::2]) == {32 - heads} and set(kept[7::2]) == {11008 - llm_pruner}


def test_a_share_that_is_whole_is_not_cut_short_by_rounding():
    # 0.2 * 30 / 27 * 9 is 2; in floating point it is a hair less. To two decimals (0.22) it is one head.
    blocks = meta_llama(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    assert uniform(Request(blocks, 0.2, skip_layers=3))[6] == 7
    assert nominal(Request(blocks, 0.2, skip_layers=3))[6] == 8


@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.4, 0.6])
@pytest.mark.parametrize("units", ["group", "balanced", "query"])
def test_exact_budget_is_hit_to_one_channel(units, ratio):
    blocks = find_blocks(FAMILIES["llama-gqa"](), units)
    kept = uniform(Request(blocks, ratio, skip_layers=1))
    assert removed_share(blocks, kept) == pytest.approx(ratio, abs=144 / sum(b.parameters for b in blocks))
    assert kept[:2] == [blocks[0].units, blocks[1].units]


def test_widths_come_in_multiples(llama_7b):
    kept = uniform(Request(llama_7b, 0.2, skip_layers=3, round_to=64))
    assert all(k % 64 == 0 for k in kept[1::2])
    total = sum(b.parameters for b in llama_7b)
    # The last MLP alone is off by at most half a step: those before it are made up for.
    assert abs(removed_share(llama_7b, kept) - 0.2) * total <= 32 * 3 * 4096
    up = nominal(Request(llama_7b, 0.2, skip_layers=3, round_to=64))
    assert set(up[7::2]) == {8640}, "8587 rounded up, as in the research code"
    # Never wider than the block is, where its width is no multiple.
    blocks = find_blocks(FAMILIES["llama"]())
    little = Request(blocks, 0.01, round_to=64)
    assert max(uniform(little)[1::2]) <= 100
    assert max(nominal(little)[1::2]) == 100


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.4, 0.6])
@pytest.mark.parametrize("round_to", [1, 64])
def test_even_gives_all_layers_one_width(llama_7b, ratio, round_to):
    kept = even(Request(llama_7b, ratio, round_to=round_to))
    assert len(set(kept[::2])) == len(set(kept[1::2])) == 1
    assert kept[0] == 32 - int(ratio * 32 + 1e-9) and kept[1] % round_to == 0
    total = sum(b.parameters for b in llama_7b)
    assert abs(removed_share(llama_7b, kept) - ratio) * total <= 32 * round_to / 2 * 3 * 4096 + 1


def test_even_needs_equal_layers_and_none_skipped(llama_7b):
    with pytest.raises(UsageError, match="skip_layers=0"):
        even(Request(llama_7b, 0.2, skip_layers=3))
    model = FAMILIES["llama"]()
    with torch.no_grad():
        model.model.layers[2].mlp = (
            type(model)(LlamaConfig(**{**model.config.to_dict(), "intermediate_size": 60}))
            .model.layers[0]
            .mlp
        )
    with pytest.raises(UsageError, match="differ in width"):
        even(Request(find_blocks(model), 0.2))


@pytest.mark.parametrize("kind", ["attention", "mlp"])
@pytest.mark.parametrize("allocate", [uniform, even, nominal])
def test_one_kind_of_block_alone_can_be_pruned(allocate, kind):
    blocks = find_blocks(FAMILIES["llama"]())
    kept = allocate(Request(blocks, 0.1, kinds=(kind,)))
    for block, k in zip(blocks, kept, strict=True):
        assert (k < block.units) == (block.kind == kind)
    # In whole heads (uniform: 0.1 of all is 9 of 30 heads' parameters) the ratio is met as near as they go.
    if kind == "mlp" or allocate is uniform:
        step = max(b.unit_parameters for b in blocks if b.kind == kind)
        total = sum(b.parameters for b in blocks)
        assert abs(removed_share(blocks, kept) - 0.1) * total <= step * (
            5 if allocate is not uniform else 0.5
        )
    with pytest.raises(UsageError, match="at most"):
        allocate(Request(blocks, 0.9, kinds=(kind,)))


@pytest.mark.parametrize("ratio", [0.1, 0.35])
def test_global_threshold_against_an_obvious_version(ratio):
    blocks = find_blocks(FAMILIES["llama-gqa"](), "query")
    g = torch.Generator().manual_seed(0)
    scores = [torch.randn(b.units, generator=g) for b in blocks]
    kept = global_threshold(Request(blocks, ratio, skip_layers=2, scores=scores))
    budget = ratio * sum(b.parameters for b in blocks)
    everything = sorted((float(s), i) for i, b in enumerate(blocks) if b.layer >= 2 for s in scores[i])
    slow = [b.units for b in blocks]
    gone = 0
    for _, i in everything:
        if budget - gone < blocks[i].unit_parameters / 2:
            break
        if slow[i] > 1:
            slow[i] -= 1
            gone += blocks[i].unit_parameters
    assert kept == slow
    assert removed_share(blocks, kept) == pytest.approx(ratio, abs=0.01)


@pytest.mark.parametrize(
    ("family", "allocate", "ratio", "skip_layers", "says"),
    [
        ("llama", uniform, -0.1, 3, r"ratio must be a number in \[0, 1\), not -0.1"),
        ("llama", uniform, 1.0, 3, r"ratio must be a number in \[0, 1\), not 1.0"),
        ("llama", uniform, 1.5, 3, r"ratio must be a number in \[0, 1\), not 1.5"),
        ("llama", uniform, 0.2, 5, "leaves none of the model's 5 layers"),
        ("llama", uniform, 0.4, 3, "would remove everything"),
        ("llama-gqa", uniform, 0.97, 0, "without units"),
        ("llama", global_threshold, 0.99, 0, "cannot be reached"),
    ],
)
def test_what_cannot_be_is_refused(family, allocate, ratio, skip_layers, says):
    blocks = find_blocks(FAMILIES[family]())
    scores = [torch.rand(b.units) for b in blocks]
    with pytest.raises(UsageError, match=says):
        allocate(Request(blocks, ratio, skip_layers=skip_layers, scores=scores))


def test_the_same_share_from_every_block(llama_7b):
    for ratio in (0.2, 0.4, 0.6):
        exact = uniform(Request(llama_7b, ratio, skip_layers=3))
        total = sum(b.parameters for b in llama_7b)
        assert abs(removed_share(llama_7b, exact) - ratio) * total <= 3 * 4096
        assert set(exact[6::2]) == {32 - int(ratio * 32 / 29 * 32)}
        assert max(exact[7::2]) - min(exact[7::2]) <= 1


@pytest.mark.parametrize("allocate", [uniform, nominal, nominal_kept])
def test_nothing_asked_is_nothing_cut(llama_7b, allocate):
    assert allocate(Request(llama_7b, 0.0, skip_layers=3)) == [b.units for b in llama_7b]
    assert allocate(Request(llama_7b, 0.0, skip_layers=99)) == [b.units for b in llama_7b]


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.3])
def test_global_threshold_keeps_balanced_groups_balanced_and_every_block_alive(ratio):
    blocks = find_blocks(FAMILIES["llama-gqa"](), "balanced")
    g = torch.Generator().manual_seed(1)
    scores = [torch.randn(b.units, generator=g) - 100 * (i == 6) for i, b in enumerate(blocks)]
    kept = global_threshold(Request(blocks, ratio, skip_layers=3, scores=scores))
    assert kept[:6] == [6, 100] * 3
    assert all(k % 2 == 0 and k >= 2 for k in kept[::2])
    assert kept[6] == 2, "the block with the worst scores goes first, to its last head a group"
    # Rounding up by less than one head a group and block is the only way to miss the ratio.
    slack = (2 * 768 + 144) / sum(b.parameters for b in blocks)
    assert ratio - slack <= removed_share(blocks, kept) <= ratio + slack


def test_removed_share_is_counted_in_parameters():
    blocks = find_blocks(FAMILIES["llama-bias"]())
    kept = [b.units for b in blocks]
    kept[0] -= 1
    kept[3] -= 10
    # One group: 24 q, 8 k, 8 v rows with biases and 24 output columns; a channel: 3 * 48 and two biases.
    removed = (40 * 49 + 24 * 48) + 10 * (3 * 48 + 2)
    whole = 5 * ((48 + 16 + 16) * 49 + 48 * 49 + 2 * 100 * 49 + 48 * 101)
    assert removed_share(blocks, kept) == pytest.approx(removed / whole)


def test_every_allocation_names_others_for_equal_widths_and_for_trying_out():
    for name, row in ALLOCATIONS.items():
        assert ALLOCATIONS[row.equal_widths].equal_widths == row.equal_widths
        assert (row.unmeasured is None) == (not row.needs), name
        if row.unmeasured is not None:
            assert not ALLOCATIONS[row.unmeasured].needs
            assert (row.equal_widths == name) == (ALLOCATIONS[row.unmeasured].equal_widths == row.unmeasured)
