"""The quality cost of parallel probing: perplexity of `probe` with and without `Probe.parallel`.

Run: .venv/bin/python benchmarks/parallel_probing.py   (about 5 minutes on 2 cores)

The first 24 windows of 512 tokens of WikiText-2, batches of 16. SmolLM2-135M-Instruct, float32, calibrated on
48 windows of C4. Seconds are medians over interleaved rounds; without a GPU nothing overlaps.
"""

import statistics
import time

import probeprune
from probeprune import Probe, compose
from probeprune.data.corpora import load_corpus
from probeprune.data.windows import calibration_windows, evaluation_windows
from probeprune.evaluation.perplexity import perplexity
from probeprune.model.machine import cache_dir
from probeprune.strategies.probe_every_batch import ProbeEveryBatch

WAYS = {p: compose("probe", when=ProbeEveryBatch(Probe(parallel=p))) for p in (False, True)}
RATIOS = (0.2, 0.4)
ROUNDS = 2


def main() -> None:
    loaded = probeprune.load_model("smollm2-135m", dtype="float32")
    windows = calibration_windows(load_corpus("c4"), loaded.tokenizer, count=48, length=256, seed=0)
    prepared = probeprune.prepare(
        loaded.model, list(WAYS.values()), RATIOS, windows, cache=cache_dir() / "statistics"
    )
    text = evaluation_windows(load_corpus("wikitext2"), loaded.tokenizer, length=512)[:24]
    for ratio in RATIOS:
        seconds: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(ROUNDS):
            for parallel, taken in seconds.items():
                with probeprune.attach(loaded.model, WAYS[parallel], ratio, calibration=prepared):
                    start = time.perf_counter()
                    result = perplexity(loaded.model, text, batch_size=16)
                    taken.append(time.perf_counter() - start)
                print(f"{ratio:.0%} parallel={parallel}: {result.value:.2f} ± {result.standard_error:.2f}")
        for parallel, taken in seconds.items():
            print(f"{ratio:.0%} parallel={parallel}: {statistics.median(taken):.1f} s", flush=True)


if __name__ == "__main__":
    main()
