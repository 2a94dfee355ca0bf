"""How many first positions of a sequence should keep a history of their own? Quality of `probe` at 40 %.

Run: .venv/bin/python benchmarks/history_positions.py   (about 6 minutes on 2 cores)

Calibrates once with an energy for every position, then pools all but the first `own` positions and measures
perplexity on the first 32 WikiText-2 windows of 512.
"""

import torch

import probeprune
from probeprune.algebra.moments import Moments
from probeprune.calibration.collecting import collecting
from probeprune.data.corpora import load_corpus
from probeprune.data.windows import batches, calibration_windows, evaluation_windows
from probeprune.evaluation.perplexity import perplexity
from probeprune.model.passes import find_decoder

LENGTH = 512


def pooled(moments: Moments, own: int) -> Moments:
    """The same moments, with an energy of their own for the first `own` positions only."""
    state = {name: tensor.clone() for name, tensor in moments.state().items()}
    for name in ("energy", "tokens"):
        rows = state[name]
        state[name] = torch.cat([rows[:own], rows[own:].sum(0, keepdim=True)])
    return Moments.from_state(state)


def main() -> None:
    loaded = probeprune.load_model("smollm2-135m")
    corpus = load_corpus("c4")
    windows = calibration_windows(corpus, loaded.tokenizer, count=64, length=LENGTH, seed=1)
    with collecting(loaded.model, own_positions=LENGTH) as full, torch.inference_mode():
        for batch in batches(windows, 8):
            find_decoder(loaded.model)(input_ids=batch, use_cache=False)
    text = evaluation_windows(load_corpus("wikitext2"), loaded.tokenizer, length=LENGTH, limit=32)
    for own in (LENGTH, 16, 1, 0):
        statistics = probeprune.Statistics({n: pooled(m, own) for n, m in full.moments.items()})
        with probeprune.attach(loaded.model, "probe", ratio=0.4, calibration=calibration):
            result = perplexity(loaded.model, text)
        figure = f"{result.value:.2f} ± {result.standard_error:.2f}"
        print(f"own positions {own:4d}: perplexity {figure}", flush=True)


if __name__ == "__main__":
    main()
