"""Whether a pruned model is ever slower than the dense one: speed-up by batch size, 40 %, float32.

Run: OMP_NUM_THREADS=1 .venv/bin/python benchmarks/never_slower.py [--quality 16]   (about 10 minutes)

Batches of 1 x 16 to 16 x 512 windows of WikiText-2 go through the decoder (no head) of SmolLM2-135M-Instruct.
In each round every way is attached in turn, warms up on some batches and is timed over several: with
`pays="auto"` not every batch is probed, so the time of all counts. Medians (and range) over rounds of the
dense model's time over the way's, in the time of one core.
"""

import argparse
import statistics
import time
from collections.abc import Mapping

import torch

import probeprune
from probeprune import METHODS, Method, Prepared, compose
from probeprune.data.corpora import load_corpus
from probeprune.data.windows import calibration_windows, evaluation_windows
from probeprune.evaluation.perplexity import perplexity
from probeprune.model.loading import LoadedModel
from probeprune.model.machine import cache_dir
from probeprune.model.passes import find_decoder

RATIO = 0.4
SHAPES = ((1, 16), (1, 64), (1, 128), (1, 512), (4, 512), (16, 512))
"""Batch size and length."""


def probing(name: str, pays: str) -> Method:
    """A dynamic method under a policy."""
    return compose(probeprune.with_pays(name, pays), name=f"{name}, {pays}")


WAYS: dict[str, Method] = {
    "dense": METHODS["dense"],
    "ppsp": METHODS["ppsp"],
    "best-static": METHODS["best-static"],
    **{m.name: m for m in (probing(n, p) for n in ("probe", "best-dynamic") for p in ("always", "auto"))},
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--shapes", default=",".join(f"{b}x{length}" for b, length in SHAPES))
    options.add_argument("--ways", default=";".join(WAYS))
    options.add_argument("--prepared", help="a file that Prepared.save wrote")
    options.add_argument("--quality", type=int, default=0, help="number of windows of each text")
    given = options.parse_args()
    loaded = probeprune.load_model("smollm2-135m", dtype="float32", device="cpu")
    ways = {name: WAYS[name] for name in given.ways.split(";")}
    if given.prepared:
        prepared = probeprune.load_prepared(given.prepared)
    else:
        windows = calibration_windows(load_corpus("c4"), loaded.tokenizer, count=48, length=256, seed=0)
        prepared = probeprune.prepare(
            loaded.model, list(ways.values()), RATIO, windows, cache=cache_dir() / "statistics"
        )
    print(f"{torch.get_num_threads()} threads, {given.rounds} rounds", flush=True)
    for shape in given.shapes.split(","):
        batch, length = map(int, shape.split("x"))
        if given.quality:
            quality(loaded, ways, prepared, batch, length, given.quality)
        else:
            speed(loaded, ways, prepared, batch, length, given.rounds)


def speed(
    loaded: LoadedModel, ways: Mapping[str, Method], prepared: Prepared, batch: int, length: int, rounds: int
) -> None:
    """Time every way on batches of one shape, and print the speed-ups."""
    decoder = find_decoder(loaded.model)
    count = min(max(2048 // (batch * length), 3), 12)
    warm = max(count // 4, 1)
    wanted = (count + warm) * batch
    text = evaluation_windows(load_corpus("wikitext2"), loaded.tokenizer, length=length)
    text = text[:: max(len(text) // wanted, 1)]
    batches = text.repeat(wanted // len(text) + 1, 1)[:wanted].split(batch)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    probed = dict.fromkeys(ways, "")
    for _ in range(rounds):
        for name, method in ways.items():
            attached = probeprune.attach(loaded.model, method, RATIO, calibration=prepared)
            with torch.inference_mode(), attached as handle:
                for ids in batches[:warm]:
                    decoder(input_ids=ids, use_cache=False)
                started = time.process_time()
                for ids in batches[warm:]:
                    decoder(input_ids=ids, use_cache=False)
                seconds[name].append((time.process_time() - started) / count)
                if handle.runtimes:
                    probed[name] = f", probed {handle.probed_batches} of {handle.batches}"
    dense = 1e3 * statistics.median(seconds["dense"])
    print(f"\n{batch} x {length}, {count} batches, dense {dense:.1f} ms")
    for name in ways:
        gains = [d / s for d, s in zip(seconds["dense"], seconds[name], strict=True)]
        gain = statistics.median(gains)
        print(f"  {name:<24} {gain:.3f}x ({min(gains):.3f}-{max(gains):.3f}){probed[name]}", flush=True)


def quality(
    loaded: LoadedModel, ways: Mapping[str, Method], prepared: Prepared, batch: int, length: int, count: int
) -> None:
    """Measure the perplexity of every way on batches of one shape, and print it."""
    for corpus in ("wikitext2", "c4-held-out"):
        text = evaluation_windows(load_corpus(corpus), loaded.tokenizer, length=length)
        text = text[:: max(len(text) // count, 1)][:count]
        print(f"\n{batch} x {length}, {len(text)} windows of {corpus}")
        for name, method in ways.items():
            with probeprune.attach(loaded.model, method, RATIO, calibration=prepared) as handle:
                found = perplexity(loaded.model, text, batch_size=batch)
                probed = f", probed {handle.probed_batches} of {handle.batches}" if handle.runtimes else ""
            print(f"  {name:<24} {found.value:.2f} +- {found.standard_error:.2f}{probed}", flush=True)


if __name__ == "__main__":
    main()
