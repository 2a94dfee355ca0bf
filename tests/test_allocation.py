"""Budgets are hit, and the published counts come out of the published rule."""

import pytest
import torch
from tiny import FAMILIES
from transformers import LlamaConfig, LlamaForCausalLM

from probeprune.allocation import global_threshold, removed_share, uniform
from probeprune.blocks import find_blocks
from probeprune.errors import UsageError


def meta_llama(**shape):
    with torch.device("meta"):
        return find_blocks(LlamaForCausalLM(LlamaConfig(**shape)), "query")


@pytest.fixture(scope="module")
def llama_7b():
    return meta_llama(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)


def test_nominal_counts_at_the_papers_shape(llama_7b):
    kept = uniform(llama_7b, 0.4, exact=False)  # r' = 0.4 * 32 / 29 = 0.4413...
    assert kept[:6] == [32, 11008] * 3
    assert set(kept[6::2]) == {32 - 14} and set(kept[7::2]) == {11008 - 4858}


def test_a_share_that_is_whole_is_not_cut_short_by_rounding():
    # 0.2 * 30 / 27 * 9 is 2; in floating point it is a hair less.
    blocks = meta_llama(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    assert uniform(blocks, 0.2, exact=False)[6] == 7


@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.4, 0.6])
@pytest.mark.parametrize("units", ["group", "balanced", "query"])
def test_exact_budget_is_hit_to_one_channel(units, ratio):
    blocks = find_blocks(FAMILIES["llama-gqa"](), units)
    kept = uniform(blocks, ratio, skip_layers=1)
    assert removed_share(blocks, kept) == pytest.approx(ratio, abs=144 / sum(b.parameters for b in blocks))
    assert kept[:2] == [blocks[0].units, blocks[1].units]


def test_round_to_rounds_up(llama_7b):
    kept = uniform(llama_7b, 0.2, round_to=64)
    assert all(k % 64 == 0 for k in kept[1::2])
    assert removed_share(llama_7b, kept) <= 0.2
    # Never wider than the block is, where its width is no multiple.
    blocks = find_blocks(FAMILIES["llama"]())
    assert max(uniform(blocks, 0.01, skip_layers=0, round_to=64)[1::2]) == 100


@pytest.mark.parametrize("ratio", [0.1, 0.35])
def test_global_threshold_against_an_obvious_version(ratio):
    blocks = find_blocks(FAMILIES["llama-gqa"](), "query")
    g = torch.Generator().manual_seed(0)
    scores = [torch.randn(b.units, generator=g) for b in blocks]
    kept = global_threshold(blocks, scores, ratio, skip_layers=2)
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


def test_what_cannot_be_is_refused():
    blocks = find_blocks(FAMILIES["llama"]())
    scores = [torch.rand(b.units) for b in blocks]
    for ratio in (-0.1, 1.0, 1.5):
        with pytest.raises(UsageError, match="outside"):
            uniform(blocks, ratio)
    with pytest.raises(UsageError, match="leaves none of the model's 5 layers"):
        uniform(blocks, 0.2, skip_layers=5)
    with pytest.raises(UsageError, match="would remove all units"):
        uniform(blocks, 0.4, skip_layers=3)
    with pytest.raises(UsageError, match="without channels"):
        uniform(find_blocks(FAMILIES["llama-gqa"]()), 0.97, skip_layers=0)
    with pytest.raises(UsageError, match="cannot be reached"):
        global_threshold(blocks, scores, 0.99, skip_layers=0)


def test_nominal_and_exact_at_20_percent_of_the_papers_shape(llama_7b):
    kept = uniform(llama_7b, 0.2, exact=False)  # r' = 0.2 * 32 / 29 = 0.2207
    assert set(kept[6::2]) == {32 - 7} and set(kept[7::2]) == {11008 - 2429}
    for ratio in (0.2, 0.4, 0.6):
        exact = uniform(llama_7b, ratio)
        total = sum(b.parameters for b in llama_7b)
        assert abs(removed_share(llama_7b, exact) - ratio) * total <= 3 * 4096
        assert exact[6::2] == uniform(llama_7b, ratio, exact=False)[6::2]
        assert max(exact[7::2]) - min(exact[7::2]) <= 1, "the same share from every block"


@pytest.mark.parametrize("allocate", [uniform, lambda *a, **k: uniform(*a, **k, exact=False)])
def test_nothing_asked_is_nothing_cut(llama_7b, allocate):
    assert allocate(llama_7b, 0.0) == [b.units for b in llama_7b]
    assert allocate(llama_7b, 0.0, skip_layers=99) == [b.units for b in llama_7b]


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.3])
def test_global_threshold_keeps_balanced_groups_balanced_and_every_block_alive(ratio):
    blocks = find_blocks(FAMILIES["llama-gqa"](), "balanced")
    g = torch.Generator().manual_seed(1)
    scores = [torch.randn(b.units, generator=g) - 100 * (i == 6) for i, b in enumerate(blocks)]
    kept = global_threshold(blocks, scores, ratio, skip_layers=3)
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
