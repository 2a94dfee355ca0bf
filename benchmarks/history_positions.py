"""How many first positions of a sequence should keep a history of their own? Quality of `probe` at 40 %.

Run: .venv/bin/python benchmarks/history_positions.py   (about 8 minutes on 2 cores)

Calibrates on 64 windows of C4 for each number of own positions, and measures perplexity on the first 32
WikiText-2 windows of 512.
"""

import probeprune
from probeprune import ProbeEveryBatch, WindowSource, compose
from probeprune.data.corpora import load_corpus
from probeprune.data.windows import evaluation_windows
from probeprune.evaluation.perplexity import perplexity

LENGTH = 512
WAYS = {n: compose("probe", when=ProbeEveryBatch(own_positions=n)) for n in (LENGTH, 16, 1, 0)}


def main() -> None:
    loaded = probeprune.load_model("smollm2-135m")
    text = WindowSource(load_corpus("c4"), loaded.tokenizer, windows=64, length=LENGTH, seed=1)
    prepared = probeprune.prepare(loaded.model, list(WAYS.values()), 0.4, text, batch_size=8)
    windows = evaluation_windows(load_corpus("wikitext2"), loaded.tokenizer, length=LENGTH, limit=32)
    for own, method in WAYS.items():
        with probeprune.attach(loaded.model, method, 0.4, calibration=prepared):
            result = perplexity(loaded.model, windows)
        figure = f"{result.value:.2f} ± {result.standard_error:.2f}"
        print(f"own positions {own:4d}: perplexity {figure}", flush=True)


if __name__ == "__main__":
    main()
