"""Cost and gain in small batches: perplexity and speed of `probe` at 40 %, by `Probe.reuse`.

Run: .venv/bin/python benchmarks/small_batches.py   (about 6 minutes on 2 cores)

Windows of WikiText-2 from all over the text, so that neighbours come from different articles, in batches
of 1 x 128, 1 x 512 and 16 x 512. Speeds are medians over interleaved rounds, over the dense model's of the
same round. SmolLM2-135M-Instruct, float32, calibrated on 48 windows of C4.
"""

import statistics
import time

import torch

import probeprune
from probeprune import Method, Probe, compose
from probeprune.data.corpora import load_corpus
from probeprune.data.windows import calibration_windows, evaluation_windows
from probeprune.evaluation.perplexity import perplexity
from probeprune.model.machine import cache_dir
from probeprune.strategies.probe_every_batch import ProbeEveryBatch

WAYS: dict[str, Method] = {
    "dense": probeprune.METHODS["dense"],
    "ppsp (ordered once)": probeprune.METHODS["ppsp"],
    **{
        f"probe, reuse={n}": compose("probe", when=ProbeEveryBatch(Probe(reuse=n)))
        for n in (0, 512, 1024, 2048)
    },
    "probe of 5 % of the positions": compose("probe", when=ProbeEveryBatch(Probe(tokens=0.05, reuse=0))),
}
SHAPES = {(1, 128): 32, (1, 512): 8, (16, 512): 16}
"""Batch size, length, and number of windows."""
ROUNDS = 2


def main() -> None:
    loaded = probeprune.load_model("smollm2-135m", dtype="float32")
    windows = calibration_windows(load_corpus("c4"), loaded.tokenizer, count=48, length=256, seed=0)
    prepared = probeprune.prepare(
        loaded.model, list(WAYS.values()), 0.4, windows, cache=cache_dir() / "statistics"
    )
    for (batch, length), count in SHAPES.items():
        text = evaluation_windows(load_corpus("wikitext2"), loaded.tokenizer, length=length)
        text = text[:: len(text) // count][:count]
        seconds: dict[str, list[float]] = {name: [] for name in WAYS}
        quality = {}
        for _ in range(ROUNDS):
            for name, method in WAYS.items():
                with probeprune.attach(loaded.model, method, 0.4, calibration=prepared):
                    start = time.perf_counter()
                    quality[name] = perplexity(loaded.model, text, batch_size=batch).value
                    seconds[name].append(time.perf_counter() - start)
        print(f"\n{batch} x {length}, {count} windows, {torch.get_num_threads()} threads")
        for name in WAYS:
            gain = statistics.median(d / s for d, s in zip(seconds["dense"], seconds[name], strict=True))
            print(f"{name:<32} perplexity {quality[name]:7.2f}   speed-up {gain:.2f}x", flush=True)


if __name__ == "__main__":
    main()
