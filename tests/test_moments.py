"""Moments and history against slow versions written from the formulas."""

import pytest
import torch
from tiny import FAMILIES, activations, padded, token_ids

from probeprune.algebra.moments import History, Moments, Tokens, position_sums
from probeprune.calibration.collecting import collect
from probeprune.model.blocks import find_blocks
from probeprune.model.layers import LayerRunner
from probeprune.progress import silent

SIDES = ("none", "left", "right")
OWN = (0, 1, 3, 50)


def real(z: torch.Tensor, tokens: Tokens) -> list[list[list[float]]]:
    """The real tokens of every sample, as float64 lists: [sample][position][channel]."""
    out = []
    for b in range(z.shape[0]):
        columns = range(z.shape[1]) if tokens.valid is None else tokens.valid[b].nonzero().flatten().tolist()
        out.append([z[b, s].double().tolist() for s in columns])
    return out


@pytest.mark.parametrize("own", OWN)
@pytest.mark.parametrize("side", SIDES)
def test_moments_against_loops_merged_in_any_split(side, own):
    z, tokens = activations(side)
    at_once, first, second = Moments(7, own), Moments(7, own), Moments(7, own)
    at_once.update(z, tokens)
    for part, rows in ((first, slice(0, 2)), (second, slice(2, 5))):
        valid = None if tokens.valid is None else tokens.valid[rows]
        part.update(z[rows], Tokens(z[rows].shape[0], 11, valid))
    second.merge(first)
    sequences = real(z, tokens)
    flat = [t for sequence in sequences for t in sequence]
    for m in (at_once, second):
        assert float(m.count) == len(flat) and float(m.samples) == 5
        for j in range(7):
            mean = sum(t[j] for t in flat) / len(flat)
            variance = sum((t[j] - mean) ** 2 for t in flat) / len(flat)
            energy = sum(sum(t[j] ** 2 for t in sequence) for sequence in sequences) / 5
            assert float(m.mean[j]) == pytest.approx(mean, rel=1e-5)
            assert float(m.variance[j]) == pytest.approx(variance, rel=1e-4)
            assert float(m.sample_energy[j]) == pytest.approx(energy, rel=1e-5)
            for s in range(own):
                rows = [q[s][j] ** 2 for q in sequences if len(q) > s]
                assert float(m.energy[s, j]) == pytest.approx(sum(rows), rel=1e-5)
                assert float(m.tokens[s]) == len(rows)


def test_a_mean_far_from_zero_does_not_cancel():
    # Mean 1000, variance 1: mean of squares minus square of mean has no digit left in float32.
    z = torch.randn(4, 500, 3, generator=torch.Generator().manual_seed(0)) + 1000
    m = Moments(3)
    for row in z:
        m.update(row[None], Tokens(1, 500))
    torch.testing.assert_close(
        m.variance, z.double().flatten(0, 1).var(0, correction=0).float(), rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("own", OWN)
@pytest.mark.parametrize("side", SIDES)
def test_history_against_loops(side, own):
    calibration, calibrated = activations("none", seed=1)
    moments = Moments(7, own)
    moments.update(calibration, calibrated)
    history = History(moments, decay=0.9)
    z, tokens = activations(side, seed=2)
    kept = 4
    history.update(z[..., :kept], tokens)
    old, new = real(calibration, calibrated), real(z, tokens)

    def mean(sequences, row, j):
        rows = [q[s][j] ** 2 for q in sequences for s in range(len(q)) if min(s, own) == row]
        return sum(rows) / len(rows) if rows else None

    for row in range(own + 1):
        for j in range(7):
            # A position calibration never saw starts from the mean over all tokens.
            start = mean(old, row, j) or sum(t[j] ** 2 for q in old for t in q) / sum(map(len, old))
            seen = mean(new, row, j)
            moved = start if seen is None or j >= kept else 0.9 * start + 0.1 * seen
            assert float(history.energy[row, j]) == pytest.approx(moved, rel=1e-4), (row, j)


@torch.no_grad()
def collected(model, batches, masks, own):
    """Moments of all blocks on batches of sequences."""
    runner = LayerRunner(model, batches, masks)
    found = {}
    for layer in range(len(runner)):
        here = [b for b in find_blocks(model) if b.layer == layer]
        found |= collect(runner, layer, here, own, silent)
    return found


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_no_statistics(family, side):
    model = FAMILIES[family]()
    ids, mask = padded(side)
    together = collected(model, [ids], [mask], 5)
    rows = [row[real_tokens][None] for row, real_tokens in zip(ids, mask.bool(), strict=True)]
    alone = collected(model, rows, None, 5)
    for name, moments in together.items():
        for key, value in moments.state().items():
            torch.testing.assert_close(value, alone[name].state()[key], rtol=2e-4, atol=2e-4)


def test_sequences_shorter_and_longer_than_the_own_positions_mix():
    statistics = collected(FAMILIES["llama-gqa"](), [token_ids(2, 6), token_ids(2, 20)], None, 10)
    moments = next(iter(statistics.values()))
    assert moments.tokens.tolist() == [4.0] * 6 + [2.0] * 4 + [20.0]


@pytest.mark.parametrize("own", OWN)
def test_merging_in_any_order_and_with_nothing(own):
    # As many processes would: Chan's formula must not care who comes first, or divide by no tokens.
    parts = []
    whole = Moments(7, own)
    whole.merge(Moments(7, own))
    assert not whole.mean.any() and float(whole.count) == 0
    for seed, side in enumerate(("left", "none", "right", "left")):
        part = Moments(7, own)
        part.update(*activations(side, seed))
        whole.update(*activations(side, seed))
        parts.append(part)
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 3, 1, 0]):
        merged = Moments(7, own)
        for i in order:
            merged.merge(parts[i])
        merged.merge(Moments(7, own))
        for key, value in whole.state().items():
            torch.testing.assert_close(merged.state()[key], value, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("own", OWN)
def test_padding_alone_counts_for_nothing(own):
    z, _ = activations("none")
    moments, rest = Moments(7, own), Moments(7, own)
    moments.update(z, Tokens(5, 11, torch.zeros(5, 11, dtype=torch.bool)))
    assert all(not value.any() for value in moments.state().values())
    valid = torch.ones(5, 11, dtype=torch.bool)
    valid[2] = False
    moments.update(z, Tokens(5, 11, valid))
    rest.update(z[[0, 1, 3, 4]], Tokens(4, 11))
    assert float(moments.samples) == 4
    for key, value in rest.state().items():
        torch.testing.assert_close(moments.state()[key], value, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    # 300^2 is beyond float16; 2000 additions are beyond bfloat16.
    z = (torch.randn(2, 1000, 3, generator=torch.Generator().manual_seed(0)) * 10 + 300).to(dtype)
    for own in (0, 4):
        moments = Moments(3, own)
        moments.update(z, Tokens(2, 1000))
        exact = z.double().flatten(0, 1)
        torch.testing.assert_close(moments.mean.double(), exact.mean(0), rtol=1e-5, atol=0)
        torch.testing.assert_close(moments.variance.double(), exact.var(0, correction=0), rtol=1e-4, atol=0)
        energy = (exact**2).sum(0) / 2
        torch.testing.assert_close(moments.sample_energy.double(), energy, rtol=1e-5, atol=0)


def test_history_at_the_positions_of_the_tokens_not_of_the_columns():
    moments = Moments(1, own=3)
    moments.update(torch.tensor([1.0, 2, 3, 4, 5]).view(1, 5, 1), Tokens(1, 5))
    history = History(moments, decay=0.99)
    assert history.energy[:, 0].tolist() == [1, 4, 9, (16 + 25) / 2]
    assert history.at(torch.tensor([0, 2, 4, 99]), None, None)[:, 0].tolist() == [1, 9, 20.5, 20.5]
    # Two sequences padded on the left by 2 and by 0, columns 1, 2 and 4.
    positions = torch.tensor([[0, 0, 2], [1, 2, 4]])
    valid = torch.tensor([[False, True, True], [True, True, True]])
    got = history.at(torch.tensor([1, 2, 4]), positions, valid)[:, 0]
    assert got.tolist() == [4, (1 + 9) / 2, (9 + 20.5) / 2]
    assert history.at(torch.tensor([1]), positions[:1, :1], valid[:1, :1]).tolist() == [[0]]


@pytest.mark.parametrize("side", SIDES)
def test_a_batch_of_several_pieces_sums_as_one_of_one(side):
    # 2**17 entries a piece: 87 tokens of this width, so 600 tokens are seven pieces, the last one short.
    z = torch.randn(3, 200, 1500, dtype=torch.bfloat16)
    valid = torch.ones(3, 200, dtype=torch.bool)
    if side != "none":
        valid[0, slice(None, 90) if side == "left" else slice(110, None)] = False
        z[~valid] = torch.nan
    energy, counts = torch.zeros(1, 1500), torch.zeros(1)
    position_sums(z, Tokens(3, 200, None if side == "none" else valid), energy, counts)
    torch.testing.assert_close(energy[0], z[valid].double().square().sum(0).float())
    assert counts.tolist() == [valid.sum()]
