"""The gain of each part of the best recipes: alone, all together, and each left out.

Run: .venv/bin/python benchmarks/ablation.py [--windows 24] [--ratio 0.4] [--only NAME ...]

SmolLM2-135M-Instruct, float32. Prints one line per variant: perplexity over the dense model's, on C4
windows that nothing was fitted to (by which the parts were chosen), on held-out C4 and on WikiText-2, 8
windows of 512 each, in one batch and, where it makes a difference, one by one; FLOPs over the dense model's
in that batch; and the seconds to prune. Continues after a kill. About 2 minutes per variant on one core with
24 calibration windows.
"""

import argparse
import json
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import probeprune
from probeprune import METHODS, Method, Probe, RefitEveryBatch, with_pays
from probeprune.calibration.statistics import Statistics
from probeprune.data.corpora import load_corpus
from probeprune.data.windows import calibration_windows, evaluation_windows
from probeprune.evaluation.perplexity import perplexity
from probeprune.model.blocks import find_blocks
from probeprune.model.cost import blocks_flops
from probeprune.model.machine import cache_dir
from probeprune.plan import widths
from probeprune.preparation import Preparation

LENGTH, TESTED = 512, 8
BEST, DYNAMIC = METHODS["best-static"], with_pays("best-dynamic", "always")
FOLLOWING = RefitEveryBatch(replace(RefitEveryBatch().probe, pays="always"))


def best(how: Mapping[str, Any] | None = None, **changes: Any) -> Method:
    """`best-static` with some fields changed."""
    assert BEST.refit is not None
    return replace(BEST, compensation=replace(BEST.refit, **(how or {})), **changes)


def following(share: float = FOLLOWING.share, **changes: Any) -> Method:
    """`best-dynamic` with another share of the batch and some fields of its probe changed."""
    return best(when=RefitEveryBatch(replace(FOLLOWING.probe, **changes), share))


DENSE_INPUTS = {"sequential": False, "share": 0.0}
VARIANTS: dict[str, Method] = {
    "best-dynamic": DYNAMIC,
    "- picked by residual importance": following(pick="residual"),
    "- the published probe": best(when=RefitEveryBatch(Probe())),
    "- twice the tokens": following(tokens=1 / 32, min_size=256),
    "- share 0.2 for the batch": following(share=0.2),
    "- share 0.5 for the batch": following(share=0.5),
    "best-static": BEST,
    "- ordered by ppsp": best(importance="ppsp"),
    "- refitted to dense inputs": best(DENSE_INPUTS),
    "- damping of every block's own choice": best({"damping": (0.1, 0.3, 1.0, 3.0)}),
    "- without sensitivities": best({"sensitivity": 0}),
    "- share 0 of the gathered error": best({"share": 0.0}),
    "- share 0.5": best({"share": 0.5}),
    "- share 1": best({"share": 1.0}),
    "- no layer left dense": best(skip_layers=0),
    "- widths by damage": best(allocation="damage"),
    "- widths by damage, same FLOPs": best(allocation="damage", budget="flops"),
    "- so, no layer left dense": best(allocation="damage", budget="flops", skip_layers=0),
    "- heads leave from every group alike": best(unit_kind="balanced"),
    "ppsp, ordered once": METHODS["ppsp"],
    "ppsp, refitted to dense inputs": best(DENSE_INPUTS, importance="ppsp"),
    "elimination, refitted to dense inputs": best(DENSE_INPUTS | {"sensitivity": 0}),
    "probe": METHODS["probe"],
    "full-batch": METHODS["full-batch"],
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--ratio", type=float, default=0.4)
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    options = parser.parse_args()
    loaded = probeprune.load_model("smollm2-135m", dtype="float32")
    model, tokenizer = loaded.model, loaded.tokenizer
    drawn = calibration_windows(
        load_corpus("c4"), tokenizer, count=options.windows + TESTED, length=LENGTH, seed=0
    )
    windows = drawn[: options.windows]
    texts = {"choice": drawn[options.windows :]} | {
        name: evaluation_windows(load_corpus(corpus), tokenizer, length=LENGTH)[::20][:TESTED]
        for name, corpus in (("c4", "c4-held-out"), ("wikitext", "wikitext2"))
    }
    options.out.mkdir(parents=True, exist_ok=True)
    lines = options.out / f"{options.ratio:g}-{options.windows}.jsonl"
    done = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    known = {row["variant"]: row for row in done}
    for name in ("dense", *options.only):
        if name not in known:
            known[name] = {"variant": name, **measure(model, name, options.ratio, windows, texts)}
            with lines.open("a") as file:
                file.write(json.dumps(known[name]) + "\n")
        show(known[name], known["dense"])


def measure(
    model: Any, name: str, ratio: float, windows: torch.Tensor, texts: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    """Losses by text, in one batch and one by one; FLOPs per token; and the seconds that pruning took."""
    method, cache = VARIANTS.get(name, METHODS["dense"]), cache_dir() / "statistics"
    if method.budget == "flops":  # the FLOPs that uniform widths save
        blocks = find_blocks(model)
        whole, left = (
            blocks_flops(blocks, kept, 1, LENGTH)
            for kept in ([b.units for b in blocks], widths(BEST, ratio, blocks, [], Statistics()))
        )
        ratio = 1 - left / whole
    # Made to follow batches, so that static and dynamic variants share their refits.
    preparation = Preparation(model, windows, batch_size=8, cache=cache, following=True)
    preparation.statistics(METHODS["ppsp"], ratio)  # moments are not part of the time
    started = time.perf_counter()
    preparation.statistics(method, ratio)
    seconds = time.perf_counter() - started
    losses: dict[str, float] = {}
    flops: dict[int, float] = {}
    for batch in (TESTED, 1):
        if batch == 1 and not method.when.every_batch:
            continue
        for text, ids in texts.items():
            with probeprune.attach(model, method, ratio, calibration=preparation):
                found = perplexity(model, ids, batch_size=batch)
            losses[f"{text}/{batch}"], flops[batch] = math.log(found.value), found.flops_per_token
    return {"losses": losses, "flops": flops[TESTED], "seconds": seconds}


def show(row: Mapping[str, Any], dense: Mapping[str, Any]) -> None:
    """One line of the table."""
    cells = [f"{row['variant']:<42}"]
    for key, loss in row["losses"].items():
        cells.append(f"{key} {math.exp(loss - dense['losses'][key.split('/')[0] + f'/{TESTED}']):.3f}")
    print(
        "  ".join(cells), f"  FLOPs {row['flops'] / dense['flops']:.1%}  {row['seconds']:.0f} s", flush=True
    )


if __name__ == "__main__":
    main()
