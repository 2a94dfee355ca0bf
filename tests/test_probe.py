"""The probe sees the real mask and the real positions; its choice is never padding."""

import math

import pytest
import torch
from tiny import FAMILIES, activations, padded

from probeprune.algebra.moments import History, Moments, Tokens
from probeprune.errors import UsageError
from probeprune.model.blocks import find_blocks
from probeprune.model.passes import find_decoder
from probeprune.model.shadow import Shadow
from probeprune.strategies.probe import (
    FUSIONS,
    Probe,
    Selection,
    choose,
    fused_energy,
    probe_energy,
    probe_size,
    restrict,
    run_ahead,
)

SIDES = ("none", "left", "right")
OWN = (0, 1, 3, 50)


# -- how many, which -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "tokens", "shape", "size"),
    [
        (0.05, 0.5, (20, 1024), (1, 512)),
        (0.05, 0.5, (21, 1023), (2, 512)),  # both round up
        (0.05, 0.5, (1, 1), (1, 1)),
        (0.05, 0.5, (1, 3), (1, 2)),  # min_tokens
        (1.0, 1.0, (7, 9), (7, 9)),
        (0.5, 0.07, (3, 100), (2, 7)),  # 0.07 * 100 is 7, in floating point a hair more
        (0.55, 0.5, (200, 4), (110, 2)),
    ],
)
def test_size_of_the_probe(samples, tokens, shape, size):
    assert probe_size(Probe(samples=samples, tokens=tokens), *shape) == size


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((16, 512), (16, 8)),
        ((16, 640), (16, 10)),
        ((3, 512), (3, 43)),
        ((1, 512), (1, 128)),
        ((2, 20), (2, 20)),
    ],
)
def test_a_probe_of_all_samples_has_a_least_size(shape, size):
    assert probe_size(Probe(tokens=1 / 64, samples=1.0, min_size=128), *shape) == size


@pytest.mark.parametrize(("share", "columns"), [(1.0, [*range(8)]), (0.5, [1, 3, 5, 7]), (0.25, [2, 6])])
def test_evenly_spaced_probes_look_at_no_residual(share, columns):
    probe = Probe(tokens=share, samples=0.5, pick="even")
    for residual in (torch.zeros(4, 8, 3), torch.randn(4, 8, 3).exp()):
        chosen = choose(residual, Tokens(4, 8), probe)
        assert chosen.tokens.tolist() == columns and chosen.samples.tolist() == [1, 3]
    with pytest.raises(UsageError, match="unknown pick 'odd'"):
        Probe(pick="odd")


@pytest.mark.parametrize(("length", "kept"), [(20, True), (22, False)])
def test_the_sink_stays_in_short_probes_only(length, kept):
    residual = torch.ones(3, length, 4)
    residual[:, 0] = 1e-3  # never chosen for its own sake
    assert (choose(residual, Tokens(3, length), Probe()).tokens[0] == 0) == kept


@pytest.mark.parametrize("junk", [1e6, math.nan, math.inf])
@pytest.mark.parametrize("side", ["left", "right"])
def test_whatever_stands_in_padding_is_not_seen(side, junk):
    # Some attention kernels leave NaN in rows that are all padding.
    valid = torch.ones(4, 8, dtype=torch.bool)
    valid[0, :5] = valid[2, :3] = False
    valid = valid if side == "left" else valid.flip(1)
    residual = torch.rand(4, 8, 4, generator=torch.Generator().manual_seed(0))
    probe = Probe(tokens=0.4, samples=0.4)
    tokens = Tokens(4, 8, valid)
    want = choose(residual.masked_fill(~valid[..., None], 0), tokens, probe)
    got = choose(residual.masked_fill(~valid[..., None], junk), tokens, probe)
    assert (got.tokens.tolist(), got.samples.tolist()) == (want.tokens.tolist(), want.samples.tolist())
    z = torch.rand(2, len(want.tokens), 5)
    padding = ~valid[want.samples][:, want.tokens][..., None]
    assert probe_energy(z.masked_fill(padding, junk), want, tokens).isfinite().all()


def test_columns_and_sequences_of_padding_alone_come_last():
    valid = torch.ones(4, 10, dtype=torch.bool)
    valid[:, :4], valid[1] = False, False
    got = choose(torch.ones(4, 10, 3), Tokens(4, 10, valid), Probe(tokens=0.6, samples=0.75))
    assert got.tokens.tolist() == [4, 5, 6, 7, 8, 9] and got.samples.tolist() == [0, 2, 3]


def test_equal_residuals_go_to_the_lower_index():
    got = choose(torch.ones(6, 12, 3), Tokens(6, 12), Probe(samples=0.5))
    assert got.tokens.tolist() == [0, 1, 2, 3, 4, 5] and got.samples.tolist() == [0, 1, 2]


def test_residuals_in_half_precision_do_not_overflow():
    residual = torch.full((2, 6, 64), 3e4, dtype=torch.float16)  # their norm is 2.4e5
    residual[:, 3] = 4e4
    residual[:, 5] = 3.5e4
    assert choose(residual, Tokens(2, 6), Probe(tokens=0.3, keep_first_below=0)).tokens.tolist() == [3, 5]


# -- run ahead -----------------------------------------------------------------------------------


def record(model, blocks, ids, mask):
    """One dense pass; for each block its input `X`, its keyword arguments and `z`."""
    seen: dict[str, list] = {b.name: [] for b in blocks}
    hooks = []
    for b in blocks:

        def entered(module, args, kwargs, to=seen[b.name]):
            kwargs = dict(kwargs)
            x = args[0] if args else kwargs.pop("hidden_states")
            to += [x.view(*ids.shape, -1), kwargs]

        def consumed(module, args, to=seen[b.name]):
            to.append(args[0].view(*ids.shape, -1))

        hooks.append(b.entry.register_forward_pre_hook(entered, with_kwargs=True))
        hooks.append(b.consumer.register_forward_pre_hook(consumed))
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    for h in hooks:
        h.remove()
    return seen


def tapped(block, x, kwargs) -> torch.Tensor:
    """The consumer's input when the block runs on `x`."""
    seen: list[torch.Tensor] = []
    hook = block.consumer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        block.run(x, **kwargs)
    hook.remove()
    return seen[0].view(*x.shape[:2], -1)


def blind_to(kwargs, hidden: list[int], length: int):
    """The same arguments with some keys hidden from every query; a missing mask is the causal one."""
    mask = kwargs.get("attention_mask")
    if mask is None:
        mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    mask = mask.clone()
    mask[..., hidden] = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return {**kwargs, "attention_mask": mask}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_probe_is_the_whole_block_that_cannot_see_the_other_tokens(family, attention, side):
    # Nothing of the reference is cut: full masks and full positions, keys outside the probe hidden.
    if (family, attention) == ("gemma2", "sdpa"):
        pytest.skip("transformers runs Gemma 2 with eager attention only (its soft cap)")
    model = FAMILIES[family]()
    model.set_attn_implementation(attention)
    blocks = find_blocks(model)
    ids, mask = padded(side)
    seen = record(model, blocks, ids, mask)
    part = Selection(torch.tensor([1, 3]), torch.tensor([0, 3, 4, 9, 14, 15, 20, 23]))
    others = [s for s in range(24) if s not in part.tokens.tolist()]
    real = mask.bool()[part.samples][:, part.tokens]
    shown = False
    for block in blocks:
        x, kwargs, z = seen[block.name]
        with torch.no_grad():
            everything = run_ahead(Shadow(block), x, Selection(torch.arange(4), torch.arange(24)), kwargs)
            got = run_ahead(Shadow(block), x, part, kwargs)
        torch.testing.assert_close(everything.view(4, 24, -1)[mask.bool()], z[mask.bool()])
        blind = blind_to(kwargs, others, 24) if block.kind == "attention" else kwargs
        want = tapped(block, x, blind)[part.samples][:, part.tokens]
        torch.testing.assert_close(got[real], want[real], rtol=1e-4, atol=1e-5)
        shown |= bool((got - z[part.samples][:, part.tokens])[real].abs().max() > 0.1)
    assert shown, "hiding tokens changed nothing: this test shows nothing"


@pytest.mark.parametrize("side", SIDES)
def test_probe_attention_against_one_written_by_hand(side):
    model = FAMILIES["llama-gqa"]()
    block = find_blocks(model)[4]
    ids, mask = padded(side)
    x, kwargs, _ = record(model, [block], ids, mask)[block.name]
    part = Selection(torch.tensor([0, 1, 3]), torch.tensor([2, 8, 9, 16, 22]))
    with torch.no_grad():
        got = run_ahead(Shadow(block), x, part, kwargs).double()
    q, k, v = (linear.weight.detach().double() for linear in block.producers)
    frequencies = 10000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)

    def turned(head, position):  # rotary position embedding, halves paired
        angle = position * frequencies
        a, b = head[:4], head[4:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()])

    checked = 0
    for i, sample in enumerate(part.samples.tolist()):
        # Without position_ids the model counts columns, padding included.
        tokens = [s for s in part.tokens.tolist() if mask[sample, s]]
        for n, s in enumerate(tokens):
            for head in range(6):
                rows, kv = slice(head * 8, head * 8 + 8), slice(head // 3 * 8, head // 3 * 8 + 8)
                query = turned(q[rows] @ x[sample, s].double(), s)
                before = tokens[: n + 1]
                keys = [turned(k[kv] @ x[sample, t].double(), t) for t in before]
                share = torch.stack([query @ key / math.sqrt(8) for key in keys]).softmax(0)
                values = torch.stack([v[kv] @ x[sample, t].double() for t in before])
                column = part.tokens.tolist().index(s)
                torch.testing.assert_close(got[i, column, rows], share @ values, rtol=1e-4, atol=1e-5)
                checked += 1
    assert checked >= 6 * 8


def test_restricting_cuts_what_belongs_to_tokens_and_leaves_the_rest():
    part = Selection(torch.tensor([2]), torch.tensor([0, 5]))
    mask = torch.arange(4 * 6 * 6).view(4, 1, 6, 6)
    cosine = torch.arange(6.0)[None, :, None].expand(1, 6, 3)  # one row for all samples
    sine = torch.arange(24.0).view(4, 6, 1).expand(4, 6, 3)
    cache = object()
    given = {
        "attention_mask": mask,
        "position_embeddings": (cosine, sine),
        "position_ids": torch.arange(24).view(4, 6),
        "cache_position": torch.arange(10, 16),
        "past_key_values": cache,
        "use_cache": True,
        "output_attentions": False,
        "nothing": None,
    }
    before = dict(given)
    cut = restrict(given, part, batch=4)
    assert cut["attention_mask"].tolist() == [[[[72, 77], [102, 107]]]]
    assert [t[..., 0].tolist() for t in cut["position_embeddings"]] == [[[0, 5]], [[12, 17]]]
    assert cut["position_ids"].tolist() == [[12, 17]]
    assert cut["cache_position"].tolist() == [10, 15]
    assert cut["past_key_values"] is None and cut["use_cache"] is False
    assert cut["output_attentions"] is False and cut["nothing"] is None
    assert given.keys() == before.keys() and all(given[k] is before[k] for k in given)
    for odd in (torch.ones(4, 6), object()):
        with pytest.raises(UsageError, match="sdpa or eager"):
            restrict({"attention_mask": odd}, part, batch=4)


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("own_forward", [False, True])
def test_a_probe_runs_nothing_of_others_and_leaves_the_consumer_as_it_was(own_forward, kind):
    # A consumer left in tap mode would hand back z for ever, without an error.
    model = FAMILIES["llama-gqa"]()
    block = find_blocks(model)[kind]
    forward = block.consumer.forward
    if own_forward:  # as accelerate's hooks do
        block.consumer.forward = forward
    hooks = [module.register_forward_hook(lambda *_: 1 / 0) for module in (block.entry, *block.producers)]
    x = torch.rand(2, 5, 48)
    kwargs = {}
    if block.kind == "attention":
        rotary = find_decoder(model).rotary_emb(x, torch.arange(5)[None])
        kwargs = {"position_embeddings": rotary, "attention_mask": None}
    part = Selection(torch.tensor([0]), torch.tensor([1, 3]))
    with torch.no_grad():
        quiet = run_ahead(Shadow(block), x, part, kwargs)
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        assert run_ahead(Shadow(block), x, part, kwargs).equal(quiet)
    assert (block.consumer.__dict__.get("forward") is forward) == own_forward
    z = torch.rand(1, 2, block.width)
    assert block.consumer(z).equal(torch.nn.functional.linear(z, block.consumer.weight))


# -- fusion --------------------------------------------------------------------------------------


def test_the_ends_of_fixed_fusion():
    now, before = torch.rand(3, 4), torch.rand(3, 4)
    assert FUSIONS["fixed"](now, before, 0.0).equal(now)
    assert FUSIONS["fixed"](now, before, 1.0).equal(before)


def test_importance_fusion_follows_the_larger_part():
    # E = (p^2 + h^2) / (p + h): where one part says nothing, the other decides alone.
    some, nothing = torch.rand(3, 4) + 0.1, torch.zeros(3, 4)
    torch.testing.assert_close(FUSIONS["importance"](some, nothing, 0.5), some)
    torch.testing.assert_close(FUSIONS["importance"](nothing, some, 0.5), some)
    torch.testing.assert_close(FUSIONS["importance"](some, 3 * some, 0.5), 2.5 * some)


# -- against loops -------------------------------------------------------------------------------


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    "probe", [Probe(), Probe(tokens=0.4, samples=0.5), Probe(tokens=0.9, samples=1.0, keep_first_below=0)]
)
def test_choice_against_loops(side, probe):
    _, tokens = activations(side)
    r = torch.randn(5, 11, 6, generator=torch.Generator().manual_seed(4))
    r[:, 3] = r[:, 6]  # ties
    u = [[math.sqrt(sum(float(x) ** 2 for x in r[b, s].double())) for s in range(11)] for b in range(5)]
    for b in range(5):
        for s in range(11):
            if tokens.valid is not None and not tokens.valid[b, s]:
                u[b][s] = 0.0
    score = [math.sqrt(sum(u[b][s] ** 2 for b in range(5))) for s in range(11)]
    k = max(math.ceil(probe.tokens * 11), 2)
    if k <= probe.keep_first_below:
        score[next(s for s in range(11) if score[s] > 0)] = math.inf
    columns = sorted(sorted(range(11), key=lambda s: (-round(score[s], 4), s))[:k])
    per_sample = [math.sqrt(sum(u[b][s] ** 2 for s in columns)) for b in range(5)]
    samples = sorted(sorted(range(5), key=lambda b: -per_sample[b])[: math.ceil(probe.samples * 5)])
    got = choose(r, tokens, probe)
    assert (got.tokens.tolist(), got.samples.tolist()) == (columns, samples)


@pytest.mark.parametrize("own", OWN)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("fusion", ["importance", "fixed", "none"])
def test_fused_energy_against_loops(fusion, side, own):
    calibration, calibrated = activations("none", seed=5)
    moments = Moments(7, own)
    moments.update(calibration, calibrated)
    history = History(moments, decay=0.99)
    full, tokens = activations(side, seed=6)
    chosen = Selection(torch.tensor([1, 4]), torch.tensor([2, 3, 7, 10]))
    z = full[chosen.samples][:, chosen.tokens]
    got = fused_energy(z, chosen, tokens, history, fusion, 0.3)
    for j in range(7):
        total = 0.0
        for column in chosen.tokens.tolist():
            now, before = [], []
            for b in chosen.samples.tolist():
                if tokens.valid is None or tokens.valid[b, column]:
                    position = column if tokens.valid is None else int(tokens.valid[b, :column].sum())
                    now.append(float(full[b, column, j]) ** 2)
                    before.append(float(history.energy[min(position, own), j]))
            if not now:  # a column of padding alone says nothing
                continue
            p, h = sum(now) / len(now), sum(before) / len(before)
            total += {"importance": (p * p + h * h) / (p + h), "fixed": 0.7 * p + 0.3 * h, "none": p}[fusion]
        assert float(got[j]) == pytest.approx(total, rel=1e-4)


def test_fusion_of_huge_and_of_no_energy():
    huge, nothing = torch.full((1, 2), 1e30), torch.zeros(1, 2)
    assert FUSIONS["importance"](huge, huge, 0.5).equal(huge)
    assert FUSIONS["importance"](nothing, nothing, 0.5).equal(nothing)
