"""A block seen through a window is the dense block with the same units masked, and comes back bit for bit."""

import pytest
import torch
from tiny import FAMILIES, masked, padded, token_ids

from probeprune.blocks import find_blocks
from probeprune.partition import Partition

KINDS = ("group", "balanced", "query")


def some_units(block, seed: int) -> torch.Tensor:
    """A random choice that the block's unit kind allows: more than half of the units, never all."""
    g = torch.Generator().manual_seed(seed)
    if block.kind == "attention" and block.unit_kind == "balanced":
        per_group = max(block.group_size - 1, 1)
        picked = [torch.randperm(block.group_size, generator=g)[:per_group] for _ in range(block.kv_heads)]
        return torch.cat([p + i * block.group_size for i, p in enumerate(picked)]).sort().values
    return torch.randperm(block.units, generator=g)[: max(block.units * 2 // 3, 1)].sort().values


def logits(model, ids, mask):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits[mask.bool()]


def assert_equal_to_rounding(got: torch.Tensor, want: torch.Tensor) -> None:
    """Within 1e-5 of the largest logit."""
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


# transformers runs Gemma 2 with eager attention only (its soft cap).
ATTENTIONS = [(f, a) for f in FAMILIES for a in ("sdpa", "eager") if (f, a) != ("gemma2", "sdpa")]


@pytest.mark.parametrize("units", KINDS)
@pytest.mark.parametrize(("family", "attention"), ATTENTIONS)
def test_window_equals_masked_dense(family, units, attention):
    model = FAMILIES[family]()
    model.set_attn_implementation(attention)
    blocks = find_blocks(model, units)
    before = {n: (p, p.clone()) for n, p in model.named_parameters()}
    attributes = [dict(b.entry.__dict__) for b in blocks]
    inputs = [padded(side) for side in ("none", "left", "right")]
    dense = [logits(model, *i) for i in inputs]
    choice = [(b, some_units(b, i)) for i, b in enumerate(blocks)]
    with masked(choice):
        expected = [logits(model, *i) for i in inputs]
    assert (expected[0] - dense[0]).abs().max() > 0.1, "a mask that changes nothing shows nothing"

    partitions = [Partition(b) for b in blocks]
    for p, (_, units_) in zip(partitions, choice, strict=True):
        p.keep(units_)
    for got, want in zip([logits(model, *i) for i in inputs], expected, strict=True):
        assert_equal_to_rounding(got, want)
    for p in partitions:  # permuted, nothing cut
        p.widen()
    for got, want in zip([logits(model, *i) for i in inputs], dense, strict=True):
        assert_equal_to_rounding(got, want)

    for p in partitions:
        p.restore()
    for name, parameter in model.named_parameters():
        same, value = before[name]
        assert parameter is same and parameter.equal(value), name
    for block, old in zip(blocks, attributes, strict=True):
        assert {k: v for k, v in block.entry.__dict__.items() if not k.startswith("_")} == {
            k: v for k, v in old.items() if not k.startswith("_")
        }


@pytest.mark.parametrize("units", KINDS)
def test_many_swaps_end_where_one_cut_does(units):
    # Errors of bookkeeping add up over batches: choose a hundred times, then compare with a fresh cut.
    model = FAMILIES["llama-bias"]()
    inputs = padded("left")
    blocks = find_blocks(model, units)
    partitions = [Partition(b) for b in blocks]
    for seed in range(100):
        for p in partitions:
            p.keep(some_units(p.block, seed))
    for p in partitions:
        want = some_units(p.block, 99)
        assert p.kept_units.equal(want)
        assert p.order.sort().values.equal(torch.arange(p.block.units))
    got = logits(model, *inputs)
    for p in partitions:
        p.restore()
    with masked([(b, some_units(b, 99)) for b in blocks]):
        assert_equal_to_rounding(got, logits(model, *inputs))


def test_a_swap_moves_only_what_changes_and_takes_followers_along():
    block = find_blocks(FAMILIES["llama-gqa"]())[1]
    partition = Partition(block)
    follower = torch.arange(block.width, dtype=torch.float32)
    partition.followers.append(follower)
    first = torch.arange(0, 60)
    assert partition.keep(first) == 60
    assert partition.keep(first) == 0
    weight = block.consumer.weight.clone()
    changed = torch.cat([torch.arange(3, 60), torch.tensor([70, 80, 90])])
    assert partition.keep(changed) == 3
    assert (block.consumer.weight != weight).any(0).sum() == 3
    assert follower.equal(partition.channels.float())
    assert follower[:60].sort().values.equal(changed.float())


@pytest.mark.parametrize("family", ["llama-gqa", "opt"])
def test_windows_are_views_not_copies(family):
    model = FAMILIES[family]()
    for block in find_blocks(model):
        full = {id(m.linear): m.linear.weight for m in block.members}
        Partition(block).keep(torch.arange(block.units)[1:])
        for m in block.members:
            window = m.linear.weight
            assert window.untyped_storage().data_ptr() == full[id(m.linear)].untyped_storage().data_ptr()
            assert window.shape[m.axis] == full[id(m.linear)].shape[m.axis] - m.width


def test_bias_is_added_once_whatever_the_number_of_calls():
    model = FAMILIES["opt"]()
    block = find_blocks(model)[1]
    own = block.consumer.bias.clone()
    partition = Partition(block)
    for _ in range(3):
        partition.add_bias(torch.ones(48))
    torch.testing.assert_close(block.consumer.bias, own + 1)
    partition.restore()
    assert block.consumer.bias.equal(own)


def test_inference_mode_may_cut_and_restore():
    model = FAMILIES["qwen3"]()
    before = logits(model, token_ids(), torch.ones(4, 24, dtype=torch.long))
    partition = Partition(find_blocks(model)[0])
    with torch.inference_mode():
        partition.keep(torch.tensor([1]))
        partition.restore()
    assert logits(model, token_ids(), torch.ones(4, 24, dtype=torch.long)).equal(before)
