"""What the widths that engines like cost in quality: MLP widths in multiples of 32 to 256, and equal heads.

    python benchmarks/rounding.py --method wanda-sp      (5 minutes on 2 cores; best-static takes an hour)

Perplexity on the first 24 WikiText-2 windows of 512, after pruning on 32 C4 windows of 512.
"""

import argparse

import probeprune
from probeprune import compose, with_equal_heads, with_equal_widths
from probeprune.data.corpora import load_corpus
from probeprune.data.windows import calibration_windows, evaluation_windows
from probeprune.evaluation.perplexity import perplexity
from probeprune.model.machine import cache_dir

MULTIPLES = (1, 32, 64, 128, 256)


def main() -> None:
    """Print one line a way of rounding and ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", default="wanda-sp", help="a method that prunes once")
    parser.add_argument("--ratios", default="0.2,0.4")
    options = parser.parse_args()
    loaded = probeprune.load_model("smollm2-135m", dtype="float32")
    text = evaluation_windows(load_corpus("wikitext2"), loaded.tokenizer, length=512, limit=24)
    windows = calibration_windows(load_corpus("c4"), loaded.tokenizer, count=32, length=512, seed=0)
    print(f"dense perplexity {perplexity(loaded.model, text, batch_size=12).value:.2f}", flush=True)
    name = options.method
    ways = {f"MLP widths in multiples of {m}": compose(name, round_to=m) for m in MULTIPLES}
    ways["the same heads in all layers"] = with_equal_heads(name)
    ways["one width for all layers"] = with_equal_widths(name)
    for ratio in map(float, options.ratios.split(",")):
        for what, method in ways.items():
            with probeprune.attach(
                loaded.model, method, ratio, calibration=windows, cache=cache_dir() / "statistics"
            ) as handle:
                result = perplexity(loaded.model, text, batch_size=12)
                print(
                    f"{name} {ratio:.0%}  {what:<30} removed {handle.removed_share:.1%}  "
                    f"perplexity {result.value:8.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
