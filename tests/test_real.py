"""On the real SmolLM2-135M: figures measured independently, and the paper's main claim."""

import pytest

from probeprune import attach
from probeprune.data.corpora import load_corpus
from probeprune.data.windows import calibration_windows, evaluation_windows
from probeprune.evaluation.perplexity import perplexity
from probeprune.model.blocks import find_blocks
from probeprune.model.machine import cache_dir
from probeprune.preparation import Preparation

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def text(smollm2):
    return evaluation_windows(load_corpus("wikitext2"), smollm2.tokenizer, length=512, limit=60)


def test_dense_perplexity_is_the_independent_figure(smollm2, text):
    assert perplexity(smollm2.model, text, batch_size=10).value == pytest.approx(29.65, rel=0.005)


def test_probe_beats_wanda_sp_at_40_percent(smollm2, text):
    windows = calibration_windows(load_corpus("c4"), smollm2.tokenizer, count=48, length=256, seed=0)
    before = {n: p.clone() for n, p in smollm2.model.named_parameters()}
    calibration = Preparation(smollm2.model, windows, cache=cache_dir() / "statistics")
    values = {}
    for name in ("wanda-sp", "probe"):
        with attach(smollm2.model, name, ratio=0.4, calibration=calibration) as handle:
            values[name] = perplexity(smollm2.model, text[:16], batch_size=8)
            assert handle.removed_share == pytest.approx(0.4, abs=1e-3)
    assert values["probe"].value + 2 * values["probe"].standard_error < values["wanda-sp"].value
    assert all(p.equal(before[n]) for n, p in smollm2.model.named_parameters())
    assert len(find_blocks(smollm2.model)) == 60
