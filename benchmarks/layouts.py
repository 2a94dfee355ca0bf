"""The quality cost of one width for all layers: the `uniform` layout against `per-layer`, by method.

Run: .venv/bin/python benchmarks/layouts.py   (about 15 minutes on 2 cores)

Perplexity on the first 24 WikiText-2 windows of 512, 128 C4 windows of 512 for statistics, exact budgets.
"""

import probeprune
from probeprune import compose, with_equal_widths
from probeprune.data.corpora import load_corpus
from probeprune.data.windows import calibration_windows, evaluation_windows
from probeprune.evaluation.perplexity import perplexity
from probeprune.model.machine import cache_dir

RATIOS = (0.2, 0.4)


def main() -> None:
    loaded = probeprune.load_model("smollm2-135m")
    text = evaluation_windows(load_corpus("wikitext2"), loaded.tokenizer, length=512, limit=24)
    windows = calibration_windows(load_corpus("c4"), loaded.tokenizer, count=128, length=512, seed=0)
    for name in ("ppsp", "wanda-sp", "flap", "llm-pruner"):
        ways = {
            "per-layer": compose(name),
            "per-layer, none skipped": compose(name, skip_layers=0),
            "uniform, multiples of 1": with_equal_widths(name),
            "uniform, multiples of 64": compose(with_equal_widths(name), round_to=64),
        }
        prepared = probeprune.prepare(
            loaded.model, list(ways.values()), RATIOS, windows, cache=cache_dir() / "statistics"
        )
        for ratio in RATIOS:
            for what, method in ways.items():
                with probeprune.attach(loaded.model, method, ratio, calibration=prepared) as handle:
                    result = perplexity(loaded.model, text, batch_size=12)
                    print(
                        f"{name:<12}{ratio:.0%}  {what:<26} removed {handle.removed_share:.1%}  "
                        f"perplexity {result.value:8.2f}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
