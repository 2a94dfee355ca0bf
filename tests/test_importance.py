"""Importances against their formulas and at their edges, and the units that stay by them."""

import math

import pytest
import torch
from tiny import FAMILIES

from probeprune.model.blocks import find_blocks
from probeprune.strategies.allocation import choose_units
from probeprune.strategies.importance import IMPORTANCES, ColumnNorms, Evidence


def test_weights_in_half_precision_are_scored_in_float32():
    # Squares and fourth powers lose most of their digits in bfloat16, and the order with them.
    block = find_blocks(FAMILIES["llama-gqa"]().to(torch.bfloat16))[1]
    w = block.consumer.weight.detach().double()
    norms = ColumnNorms.of(block)
    for got, want in [
        (norms.absolute, w.abs().sum(0)),
        (norms.squared, (w**2).sum(0)),
        (norms.quartic, (w**4).sum(0).sqrt()),
    ]:
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)
    magnitude = IMPORTANCES["magnitude"].score(Evidence(block, norms))
    rows = sum((m.linear.weight.detach().double() ** 2).sum(1 - m.axis) for m in block.members)
    torch.testing.assert_close(magnitude.double(), rows.sqrt(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("name", IMPORTANCES)
def test_an_importance_needs_no_more_than_its_row_says(name, kind):
    # `needs` decides whether calibration is asked for at all.
    block = find_blocks(FAMILIES["llama-gqa"]())[kind]
    row = IMPORTANCES[name]
    if row.ordered_by_refit:  # the order is made there, not by a score (test_refit.py)
        assert row.score is None and row.needs == {"consumers"}
        return
    needed = {}
    if "moments" in row.needs:
        needed = {"energy" if row.from_batch else "variance": torch.rand(block.width)}
    if "saliences" in row.needs:
        needed["saliences"] = tuple(torch.rand(block.units) for _ in block.members)
    if "gates" in row.needs:
        needed["gates"] = torch.rand(block.units)
    scores = IMPORTANCES[name].score(Evidence(block, ColumnNorms.of(block), **needed))
    assert scores.shape == (block.units,) and scores.dtype == torch.float32
    assert scores.isfinite().all() and scores.unique().numel() == block.units


def test_standardising_scores_without_spread_gives_no_nan():
    # A block whose channels never fluctuate: 0 / 0 in the standardisation.
    block = find_blocks(FAMILIES["opt"]())[0]
    evidence = Evidence(block, ColumnNorms.of(block), variance=torch.zeros(block.width))
    assert IMPORTANCES["flap"].score(evidence).equal(torch.zeros(block.units))


@pytest.mark.parametrize("keep", [2, 4, 6])
@pytest.mark.parametrize("units", ["group", "balanced", "query"])
def test_choice_against_sorting_with_ties_to_the_lower_id(units, keep):
    block = find_blocks(FAMILIES["llama-gqa"](), units)[0]
    keep = min(keep, block.units)
    parts = block.kv_heads if units == "balanced" else 1
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        scores = torch.randint(0, 3, (block.units,), generator=g).float()  # mostly ties
        size = block.units // parts
        slow: list[int] = []
        for part in range(parts):
            ids = range(part * size, (part + 1) * size)
            slow += sorted(ids, key=lambda u: (-float(scores[u]), u))[: keep // parts]
        assert choose_units(scores, keep, block).tolist() == sorted(slow)


@pytest.mark.parametrize("units", ["group", "query"])
@pytest.mark.parametrize("kind", [0, 1])
def test_importances_against_their_formulas(kind, units):
    block = find_blocks(FAMILIES["llama-bias"](), units)[kind]
    g = torch.Generator().manual_seed(3)
    e = torch.rand(block.width, generator=g) * 10
    variance = torch.rand(block.width, generator=g)
    evidence = Evidence(block, ColumnNorms.of(block), energy=e, variance=variance)
    w = block.consumer.weight.detach().double()
    d, width = w.shape[0], block.unit_width
    raw = [float(variance[j]) * sum(float(w[i, j]) ** 2 for i in range(d)) for j in range(block.width)]
    mean = sum(raw) / len(raw)
    std = math.sqrt(sum((x - mean) ** 2 for x in raw) / len(raw))
    got = {name: IMPORTANCES[name].score(evidence) for name in ("ppsp", "wanda-sp", "flap", "magnitude")}
    for u in range(block.units):
        own = range(u * width, (u + 1) * width)
        ppsp = math.sqrt(sum((float(e[j]) * float(w[i, j]) ** 2) ** 2 for j in own for i in range(d)))
        wanda = sum(math.sqrt(e[j]) * sum(abs(float(w[i, j])) for i in range(d)) for j in own)
        flap = sum((raw[j] - mean) / std for j in own) / width
        squares = 0.0
        for m in block.members:
            part = m.linear.weight.detach().double().narrow(m.axis, u * m.width, m.width)
            squares += float((part**2).sum())
        slow = {"ppsp": ppsp, "wanda-sp": wanda, "flap": flap, "magnitude": math.sqrt(squares)}
        for name, value in slow.items():
            assert float(got[name][u]) == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_random_depends_on_seed_and_block_alone():
    blocks = find_blocks(FAMILIES["llama"]())
    norms = ColumnNorms.of(blocks[0])
    torch.manual_seed(1)
    one = IMPORTANCES["random"].score(Evidence(blocks[0], norms, seed=1))
    torch.manual_seed(2)
    assert IMPORTANCES["random"].score(Evidence(blocks[0], norms, seed=1)).equal(one)
    assert not IMPORTANCES["random"].score(Evidence(blocks[0], norms, seed=2)).equal(one)
    assert not IMPORTANCES["random"].score(Evidence(blocks[2], norms, seed=1)).equal(one)


def test_ties_go_to_the_lower_id():
    block = find_blocks(FAMILIES["llama"]())[1]
    scores = torch.ones(100)
    scores[70] = 2
    assert choose_units(scores, 4, block).tolist() == [0, 1, 2, 70]
