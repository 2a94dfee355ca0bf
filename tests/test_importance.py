"""Importances at their edges, and which units they let stay; their formulas are in test_statistics.py."""

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
    importance = IMPORTANCES[name]
    if importance.ordered_by_refit:  # the order is made there, not by a score (test_refit.py)
        assert importance.score is None and importance.needs == {"consumers"}
        return
    evidence = {
        "moments": {"energy": torch.rand(block.width), "variance": torch.rand(block.width)},
        "saliences": {"saliences": tuple(torch.rand(block.units) for _ in block.members)},
    }
    needed = {field: value for part in importance.needs for field, value in evidence[part].items()}
    if importance.from_batch:  # a batch has energies alone
        del needed["variance"]
    elif name == "flap":
        del needed["energy"]
    scores = importance.score(Evidence(block, ColumnNorms.of(block), **needed))
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
