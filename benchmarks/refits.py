"""What a least-squares refit gains: static orders without it, fitted to the dense model, and in sequence.

Run: .venv/bin/python benchmarks/refits.py [--windows 96] [--methods wanda-sp,ppsp] [--ratios 0.2,0.4]

One line a method, ratio and refit: perplexity on text to choose by (C4 windows that nothing is fitted to), on
WikiText-2 and on held-out C4 (12 windows of 512 each), the seconds it took, the mean error of the blocks'
outputs on the windows held out, before and after, and the process's peak memory.
"""

import argparse
import resource
import time
from dataclasses import replace

import probeprune
from probeprune import Refit
from probeprune.data import calibration_windows, evaluation_windows, load_corpus
from probeprune.evaluation.perplexity import perplexity
from probeprune.models import cache_dir
from probeprune.surgery import method_consumers, method_saliences

LENGTH, TESTED, BATCH = 512, 12, 8
BASES = {
    name: probeprune.compose(base, name=name, compensation="none", **changes)
    for name, base, changes in (
        ("wanda-sp", "wanda-sp", {}),
        ("ppsp", "ppsp", {}),
        ("flap-uniform", "flap", {"allocation": "uniform"}),
        ("llm-pruner", "llm-pruner", {}),
    )
}
REFITS = {
    "none": None,
    "dense activations": Refit(sequential=False, share=0.0),
    "sequential, share 0": Refit(share=0.0),
    "sequential, share 0.5": Refit(share=0.5),
    "sequential, share 1": Refit(share=1.0),
    "sequential, share 0.5, bias": Refit(share=0.5, bias=True),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--windows", type=int, default=96)
    parser.add_argument("--methods", default=",".join(BASES))
    parser.add_argument("--ratios", default="0.2,0.4")
    parser.add_argument("--refits", default=",".join(str(i) for i in range(len(REFITS))), help="by number")
    options = parser.parse_args()
    loaded = probeprune.load_model("smollm2-135m", dtype="float32")
    model, tokenizer = loaded.model, loaded.tokenizer
    drawn = calibration_windows(
        load_corpus("c4"), tokenizer, count=options.windows + TESTED, length=LENGTH, seed=0
    )
    windows = drawn[: options.windows]
    texts = {"choice": drawn[options.windows :]} | {
        name: evaluation_windows(load_corpus(name), tokenizer, length=LENGTH, limit=TESTED)
        for name in ("wikitext2", "c4-held-out")
    }
    cache = cache_dir() / "statistics"
    known = probeprune.calibrate(model, windows, batch_size=BATCH, cache=cache)
    wanted = [list(REFITS.items())[int(i)] for i in options.refits.split(",")]
    for base in (BASES[name] for name in options.methods.split(",")):
        if base.needs_gradients:
            known = replace(known, saliences=method_saliences(model, base, windows, cache=cache))
        for ratio in map(float, options.ratios.split(",")):
            for label, how in wanted:
                method, statistics, started, error = base, known, time.perf_counter(), ""
                if how is not None:
                    method = probeprune.compose(base, compensation="least-squares", refit=how)
                    found = method_consumers(
                        model, method, ratio, windows, statistics=known, batch_size=BATCH
                    )
                    statistics = replace(known, consumers=found)
                    before, after = (
                        sum(values) / len(found)
                        for values in zip(*((c.error_before, c.error) for c in found.values()), strict=True)
                    )
                    error = f", error {before:.3f} -> {after:.3f}"
                seconds = time.perf_counter() - started
                with probeprune.attach(model, method, ratio, statistics=statistics):
                    figures = {n: perplexity(model, t, batch_size=BATCH).value for n, t in texts.items()}
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
                shown = ", ".join(f"{name} {value:.2f}" for name, value in figures.items())
                print(
                    f"{base.name} {ratio:.0%}, {label}: {shown}; {seconds:.0f} s{error}, {peak:.1f} GiB",
                    flush=True,
                )


if __name__ == "__main__":
    main()
