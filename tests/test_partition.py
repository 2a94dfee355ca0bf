"""A block seen through a window is the dense block with the same units masked, and comes back bit for bit."""

import pytest
import torch
from tiny import FAMILIES, masked, padded, token_ids

from probeprune.errors import UsageError
from probeprune.model import partition as partition_module
from probeprune.model.blocks import find_blocks
from probeprune.model.partition import Partition

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
    partition.companions.append(follower)
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
    partition.keep(torch.arange(block.units))
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


@pytest.mark.parametrize("units", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_window_leaves_out_is_what_the_accounts_say(family, units):
    # Ratios and tables are made from these accounts.
    for block in find_blocks(FAMILIES[family](), units)[:2]:

        def visible(block=block):
            # What a producer gives is what is seen of it, wherever its rows lie.
            total = block.consumer.weight.numel()
            total += 0 if block.consumer.bias is None else block.consumer.bias.numel()
            for linear in block.producers:
                out = linear(torch.zeros(linear.in_features)).numel()
                total += out * (linear.in_features + (linear.bias is not None))
            return total

        assert visible() == block.parameters
        partition = Partition(block)
        chosen = some_units(block, 0)
        partition.keep(chosen)
        assert visible() == block.parameters - (block.units - len(chosen)) * block.unit_parameters


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("units", KINDS)
def test_windows_that_change_width_end_where_one_cut_does(units, kind):
    # A window of the old width, or an order laid out for it, would show the wrong units.
    model = FAMILIES["llama-bias"]()
    inputs = padded("right")
    block = find_blocks(model, units)[kind]
    parts = block.kv_heads if (units, block.kind) == ("balanced", "attention") else 1
    size = block.units // parts
    g = torch.Generator().manual_seed(0)
    choices = []
    for width in [size - 1, 1, size, max(size // 2, 1), 1, size - 1]:
        picked = [torch.randperm(size, generator=g)[:width] + part * size for part in range(parts)]
        choices.append(torch.cat(picked).sort().values)
    expected = []
    for choice in choices:
        with masked([(block, choice)]):
            expected.append(logits(model, *inputs))
    partition = Partition(block)
    for choice, want in zip(choices, expected, strict=True):
        partition.keep(choice)
        assert partition.shown == len(choice) and partition.kept_units.equal(choice)
        assert_equal_to_rounding(logits(model, *inputs), want)


def test_swaps_keep_a_balanced_window_balanced():
    # A plain config can describe only as many query heads a group; a swap must not cross groups.
    block = find_blocks(FAMILIES["llama-gqa"](), "balanced")[0]
    partition = Partition(block)
    for seed in range(30):
        partition.keep(some_units(block, seed))
        groups = (partition.order // block.group_size)[: partition.shown]
        assert groups.bincount(minlength=2).tolist() == [2, 2]
        assert groups.tolist() == sorted(groups.tolist()), "the heads of a group are no longer together"


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("units", KINDS)
def test_followers_go_along_at_every_swap_and_come_back(units, kind):
    # The history and FLAP's mean are such tensors: out of step they would score the wrong channels.
    block = find_blocks(FAMILIES["llama-gqa"](), units)[kind]
    partition = Partition(block)
    one = torch.arange(block.width, dtype=torch.float32)
    two = torch.stack([one, -one])
    partition.companions += [one, two]
    for seed in range(10):
        partition.keep(some_units(block, seed))
        assert one.equal(partition.channels.float()) and two.equal(torch.stack([one, -one]))
        front = one[: partition.shown * block.unit_width].view(-1, block.unit_width)
        assert (front[:, 0] / block.unit_width).sort().values.equal(some_units(block, seed).float())
    partition.restore()
    assert one.equal(torch.arange(block.width, dtype=torch.float32))


@pytest.mark.parametrize("units", KINDS)
def test_as_many_units_are_reported_moved_as_came_in(units):
    for block in find_blocks(FAMILIES["llama-gqa"](), units)[:2]:
        partition = Partition(block)
        partition.keep(some_units(block, 0))
        for seed in range(1, 10):
            before, now = set(some_units(block, seed - 1).tolist()), some_units(block, seed)
            assert partition.keep(now) == len(set(now.tolist()) - before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama-bias", "opt"])
def test_half_precision_comes_back_bit_for_bit(family, dtype):
    model = FAMILIES[family]().to(dtype)
    before = {n: (p, p.clone()) for n, p in model.named_parameters()}
    partitions = [Partition(b) for b in find_blocks(model, "query")]
    for seed in range(5):
        for p in partitions:
            p.keep(some_units(p.block, seed))
            p.add_bias(torch.ones(48))
    for p in partitions:
        p.restore()
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[n] is p and after[n].equal(value) for n, (p, value) in before.items())


@pytest.mark.parametrize("family", ["llama-bias", "opt", "qwen2"])
def test_windows_on_biases_are_views_too(family):
    for block in find_blocks(FAMILIES[family]())[:2]:
        full = [linear.bias for linear in block.producers]
        Partition(block).keep(torch.arange(block.units)[1:])
        for linear, bias in zip(block.producers, full, strict=True):
            if bias is not None:
                assert linear.bias.data_ptr() == bias.data_ptr() and len(linear.bias) < len(bias)


def test_attention_that_cannot_be_told_its_heads_is_refused():
    model = FAMILIES["llama-gqa"]()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UsageError, match="unit_kind='group'"):
        Partition(find_blocks(model, "query")[0])
    Partition(find_blocks(model, "group")[0]).keep(torch.tensor([1]))


def test_a_partition_made_in_inference_mode_can_be_undone_outside():
    # What inference mode creates cannot be written outside: weights would stay permuted for good.
    model = FAMILIES["llama-gqa"]()
    block = find_blocks(model)[1]
    before = block.consumer.weight.clone()
    with torch.inference_mode():
        partition = Partition(block)
        partition.keep(some_units(block, 0))
    partition.keep(some_units(block, 1))
    partition.restore()
    assert block.consumer.weight.equal(before)


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("units", KINDS)
def test_an_accelerator_ends_where_a_cpu_does(units, kind, monkeypatch):
    # There as many places are written as could ever change: those that do not must keep what they hold.
    orders, weights = [], []
    for places in (partition_module._places, lambda moved, most: most):
        monkeypatch.setattr(partition_module, "_places", places)
        model = FAMILIES["llama-bias"]()
        block = find_blocks(model, units)[kind]
        partition = Partition(block)
        moved = [int(partition.keep(some_units(block, seed))) for seed in (0, 1, 2, 2)]
        assert moved[-1] == 0
        orders.append([moved, partition.order.tolist()])
        weights.append([m.linear.weight.clone() for m in block.members])
    assert orders[0] == orders[1]
    assert all(a.equal(b) for a, b in zip(*weights, strict=True))
