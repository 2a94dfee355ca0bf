"""What the widths that engines like cost in quality: MLP widths in multiples of 32 to 256, and equal heads.

Run: .venv/bin/python benchmarks/rounding.py   (about half an hour on 2 cores)

Perplexity on the first 24 WikiText-2 windows of 512, after pruning on 32 C4 windows of 512.
"""

import probeprune
from probeprune import compose, with_equal_heads, with_equal_widths
from probeprune.data.corpora import load_corpus
from probeprune.data.windows import calibration_windows, evaluation_windows
from probeprune.evaluation.perplexity import perplexity
from probeprune.model.machine import cache_dir

NAME, RATIO = "best-static", 0.4
MULTIPLES = (1, 32, 64, 128, 256)


def main() -> None:
    loaded = probeprune.load_model("smollm2-135m", dtype="float32")
    text = evaluation_windows(load_corpus("wikitext2"), loaded.tokenizer, length=512, limit=24)
    windows = calibration_windows(load_corpus("c4"), loaded.tokenizer, count=32, length=512, seed=0)
    print(f"dense perplexity {perplexity(loaded.model, text, batch_size=12).value:.2f}", flush=True)
    ways = {f"MLP widths in multiples of {m}": compose(NAME, round_to=m) for m in MULTIPLES}
    ways["the same heads in all layers"] = with_equal_heads(NAME)
    ways["one width for all layers"] = with_equal_widths(NAME)
    for what, method in ways.items():
        with probeprune.attach(
            loaded.model, method, RATIO, calibration=windows, cache=cache_dir() / "statistics"
        ) as handle:
            result = perplexity(loaded.model, text, batch_size=12)
            print(
                f"{NAME} {RATIO:.0%}  {what:<30} removed {handle.removed_share:.1%}  "
                f"perplexity {result.value:8.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
