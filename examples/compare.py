"""Perplexity of the dense model and of three methods at 20 %, from one calibration."""

import probeprune
from probeprune.data.corpora import load_corpus
from probeprune.data.windows import calibration_windows, evaluation_windows
from probeprune.evaluation.perplexity import perplexity

loaded = probeprune.load_model("smollm2-135m")
model, tokenizer = loaded.model, loaded.tokenizer
windows = calibration_windows(load_corpus("c4"), tokenizer, count=16, length=256, seed=0)
held_out = evaluation_windows(load_corpus("wikitext2"), tokenizer, length=256, limit=4)

methods = ["wanda-sp", "flap", "probe"]
prepared = probeprune.prepare(model, methods, [0.2], windows)
print(f"{'dense':<10} {perplexity(model, held_out, batch_size=4).value:8.2f}")
for name in methods:
    with probeprune.attach(model, name, ratio=0.2, calibration=prepared):
        print(f"{name:<10} {perplexity(model, held_out, batch_size=4).value:8.2f}")
