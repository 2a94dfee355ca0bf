"""How much the grouping of requests changes the accuracy of a dynamic method, and that of no static one.

    python benchmarks/task_batches.py        (three minutes on two cores)

Probe Pruning chooses units anew for every batch, so each answer depends on the other requests in its batch.
The same items run with several batch sizes and both orders. Prints the accuracy and the share of items whose
answer differs from that of the first line.
"""

import probeprune
from probeprune.data.corpora import load_corpus
from probeprune.data.windows import calibration_windows
from probeprune.evaluation.tasks import TaskSettings, evaluate_task
from probeprune.model.machine import cache_dir

TASK, ITEMS, RATIO = "arc_easy", 60, 0.2
METHODS = ("wanda-sp", "probe")
GROUPINGS = ((16, "length"), (16, "given"), (4, "length"), (4, "given"), (1, "given"))


def main() -> None:
    loaded = probeprune.load_model("smollm2-135m")
    windows = calibration_windows(load_corpus("c4"), loaded.tokenizer, count=128, length=512, seed=0)
    prepared = probeprune.prepare(loaded.model, METHODS, RATIO, windows, cache=cache_dir() / "statistics")
    for method in METHODS:
        first = None
        for batch_size, order in GROUPINGS:
            with probeprune.attach(loaded.model, method, RATIO, calibration=prepared):
                found = evaluate_task(
                    loaded.model,
                    loaded.tokenizer,
                    TASK,
                    TaskSettings(limit=ITEMS, batch_size=batch_size, order=order),
                )
            hits = found.correct_norm or found.correct
            first = first or hits
            changed = sum(a != b for a, b in zip(first, hits, strict=True)) / len(hits)
            print(
                f"{method:<9} {TASK}, {ITEMS} items, batches of {batch_size:>2}, {order:<6} order: "
                f"{found.value:.1%} ± {found.error:.1%}, {changed:.1%} differ",
                flush=True,
            )


if __name__ == "__main__":
    main()
