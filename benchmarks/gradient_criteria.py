"""Gradient criteria on the embedded model: windows, seeds, second order, LoRAPrune's random rank.

Run: .venv/bin/python benchmarks/gradient_criteria.py   (about 15 minutes on 2 cores)

Perplexity on the first 24 WikiText-2 windows of 512 at 20 % and 40 % of the blocks' parameters; C4.
"""

import probeprune
from probeprune import Gradients, Method, WindowSource, compose
from probeprune.data.corpora import load_corpus
from probeprune.data.windows import evaluation_windows
from probeprune.evaluation.perplexity import perplexity

CASES: list[tuple[str, Method, int]] = [
    *(("llm-pruner, 10 x 64 tokens (as published)", compose("llm-pruner"), seed) for seed in (0, 1, 2)),
    ("10 x 512 tokens", compose("llm-pruner", gradients=Gradients(10, 512)), 0),
    ("64 x 512 tokens", compose("llm-pruner", gradients=Gradients(64, 512)), 0),
    *((c, compose("llm-pruner", importance=c), 0) for c in ("vectorize", "param_second", "param_mix")),
    *(("loraprune, 8 draws of rank 8", compose("loraprune", seed=seed), seed) for seed in (0, 1, 2)),
    ("1 draw (as published)", compose("loraprune", gradients=Gradients(10, 512, draws=1)), 0),
    ("1 draw of rank 576", compose("loraprune", gradients=Gradients(10, 512, draws=1, rank=576)), 0),
    *(
        (f"llm-pruner, {units} units", compose("llm-pruner", unit_kind=units), 0)
        for units in ("balanced", "query")
    ),
]

RATIOS = (0.2, 0.4)


def main() -> None:
    loaded = probeprune.load_model("smollm2-135m")
    text = evaluation_windows(load_corpus("wikitext2"), loaded.tokenizer, length=512, limit=24)
    corpus = load_corpus("c4")
    for what, method, seed in CASES:
        source = WindowSource(corpus, loaded.tokenizer, seed=seed)
        prepared = probeprune.prepare(loaded.model, method, RATIOS, source)
        found = []
        for ratio in RATIOS:
            with probeprune.attach(loaded.model, method, ratio, calibration=prepared):
                found.append(perplexity(loaded.model, text, batch_size=12).value)
        print(f"{what:<45} seed {seed}  20 % {found[0]:8.2f}  40 % {found[1]:8.2f}", flush=True)


if __name__ == "__main__":
    main()
