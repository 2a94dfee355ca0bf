"""Result lines of a run that never took place: methods, ratios, seeds, texts, tasks, cost, units, a failure.

Figures are random, so no two are equal and one in the wrong place is noticed.
"""

import json
import math
import random
from functools import cache
from pathlib import Path
from typing import Any

from probeprune import report
from probeprune.methods import METHODS
from probeprune.stages import STAGES

MODEL = "smollm2-135m"
STATIC = ("wanda-sp", "flap", "llm-pruner", "loraprune", "llm-pruner+lora")
DYNAMIC = ("probe", "full-batch")
RATIOS = (0.2, 0.4)
SEEDS = (0, 1, 2)
TEXTS = {"wikitext2": 48, "c4-valid": 32}
TASKS = {
    "boolq": ("acc", 0.62),
    "piqa": ("acc_norm", 0.68),
    "hellaswag": ("acc_norm", 0.43),
    "winogrande": ("acc", 0.53),
    "arc_easy": ("acc_norm", 0.55),
    "arc_challenge": ("acc_norm", 0.29),
    "openbookqa": ("acc_norm", 0.34),
}
HURTS = {
    "full-batch": 0.9, "probe": 1.15, "llm-pruner+lora": 1.3, "wanda-sp": 1.6, "flap": 1.9, "loraprune": 2.2,
    "llm-pruner": 2.5,
}  # fmt: skip
COMMON = {
    "dtype": "float32",
    "device": "cpu",
    "threads": 2,
    "versions": {"probeprune": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
}


def rows(
    seeds: tuple[int, ...] = SEEDS, items: int = 200, layers: int = 30, model: str = MODEL
) -> list[dict[str, Any]]:
    """The lines, in the order of a run: dense once, then every method, ratio and seed."""
    draw = random.Random(0)
    made = _subject(draw, model, "dense", 0.0, 0, items, layers)
    for name in (*STATIC, *DYNAMIC):
        for ratio in RATIOS:
            for seed in seeds:
                made += _subject(draw, model, name, ratio, seed, items, layers)
    failed = _head(model, "ppsp", 0.4, 0) | {"kind": "failure", "key": "ppsp", "task": "boolq"}
    del failed["training"], failed["removed_share"]
    return [*made, failed | {"error": "the model's loss is NaN or infinite; try another dtype."}]


def perplexity_row(name: str, ratio: float, seed: int, losses: list[float], **more: Any) -> dict[str, Any]:
    """A line of perplexity on those windows."""
    spread = math.sqrt(sum((x - sum(losses) / len(losses)) ** 2 for x in losses) / (len(losses) - 1))
    value = math.exp(sum(losses) / len(losses))
    return (
        _head(more.pop("model", MODEL), name, ratio, seed)
        | {
            "task": "wikitext2",
            "metric": "perplexity",
            "value": value,
            "standard_error": value * spread / math.sqrt(len(losses)),
            "losses": losses,
            "windows": len(losses),
            "length": 512,
            "batch_size": 16,
        }
        | COMMON
        | more
    )


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    """As a run writes them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def _head(model: str, name: str, ratio: float, seed: int) -> dict[str, Any]:
    trains = name.endswith("+lora")
    training = {
        "corpus": "c4", "steps": 120, "best_step": 120, "tokens": 120 * 8 * 256, "seconds": 801.5,
        "batch_size": 8, "length": 256, "learning_rate": 3e-4,
    }  # fmt: skip
    return {
        "kind": "result",
        "model": model,
        "name": name,
        "method": METHODS[name].record() | {"seed": seed},
        "ratio": ratio,
        "seed": seed,
        "calibration": None if name == "dense" else {"corpus": "c4", "windows": 128, "length": 512},
        "training": training if trains else None,
        "removed_share": ratio,
    }


def _subject(
    draw: random.Random, model: str, name: str, ratio: float, seed: int, items: int, layers: int
) -> list[dict[str, Any]]:
    hurt = 0.0 if name == "dense" else HURTS[name] * (1.2 * ratio + 3 * ratio**2.5) + draw.gauss(0, 0.02)
    probing = {"probe": 0.012, "full-batch": 0.39}.get(name, 0.0)
    flops = 2.1e8 * (1 - 0.85 * ratio + probing)
    made = []
    for text, windows in TEXTS.items():
        common = random.Random(text)  # the same windows are hard for every method
        losses = [common.gauss(3.3, 0.35) + hurt * (1 + draw.gauss(0, 0.15)) for _ in range(windows)]
        more: dict[str, Any] = {"units": _units(draw, name, ratio, layers)} if text == "wikitext2" else {}
        if name == "dense":
            more = {}
        made.append(
            perplexity_row(
                name,
                ratio,
                seed,
                [round(x, 6) for x in losses],
                task=text,
                model=model,
                flops_per_token=flops * (1 + 0.01 * seed),
                probe_flops_share=probing,
                tokens=windows * 512,
                seconds=windows * 0.9,
                tokens_per_second=600 * (1 + 0.6 * ratio) + draw.random(),
                peak_memory=int(2.9e9 + 1e8 * draw.random()),
                **more,
            )
        )
    for task, (main, accuracy) in TASKS.items():
        common = random.Random(task)
        right = accuracy - 0.08 * min(hurt, 2)
        correct = "".join(
            str(int((common.random() if draw.random() < 0.7 else draw.random()) < right))
            for _ in range(items)
        )
        value = correct.count("1") / items
        error = math.sqrt(value * (1 - value) / (items - 1))
        made.append(
            _head(model, name, ratio, seed)
            | {
                "task": task, "metric": "accuracy", "value": value, "standard_error": error, "items": items,
                "protocol": "harness", "metrics": {main: {"value": value, "standard_error": error}},
                "main": main, "correct": correct, "batch_size": 16, "order": "length",
            }
            | COMMON
        )  # fmt: skip
    made.append(_head(model, name, ratio, seed) | _cost(draw, name, ratio, probing) | COMMON)
    return [row | {"key": f"{name} {ratio} {seed} {row['task']}"} for row in made]


def _cost(draw: random.Random, name: str, ratio: float, probing: float) -> dict[str, Any]:
    speedup = 1.0 if name == "dense" else 1 / (1 - 0.75 * ratio + 1.4 * probing + draw.uniform(0, 0.03))
    # Every stage takes another share, and all of them the probe's work and 2 %.
    parts = {stage.name: 2.0**-i for i, stage in enumerate(STAGES)}
    whole = sum(parts.values())
    stages = {name: part / whole * (probing + 0.02) for name, part in parts.items()} if probing else {}

    def phase(value: float) -> dict[str, Any]:
        return {
            "seconds": 8 / value,
            "tokens_per_second": 1000 * value,
            "speedup": value,
            "speedup_range": [0.96 * value, 1.03 * value],
        }

    return {
        "task": "cost", "metric": "cost", "value": speedup, "standard_error": None,
        "prefill": phase(speedup), "decode": phase(1 + (speedup - 1) / 2),
        "batch_size": 16, "length": 512, "new_tokens": 64, "rounds": 5,
        "peak_memory": int(3.2e9 + 1e8 * draw.random()), "memory_over_dense": 1.0 + 0.05 * draw.random(),
        "kv_cache_bytes_per_token": int(46080 * (1 - ratio)), "kv_cache_share": 1 - ratio,
        "parameters": [134_515_008, int(134_515_008 * (1 - 0.8 * ratio))], "calibration_seconds": 41.2,
        "stages": stages, "flops_share": 1 - 0.85 * ratio + probing,
    }  # fmt: skip


def _units(draw: random.Random, name: str, ratio: float, layers: int) -> list[dict[str, Any]]:
    dynamic, found = name in DYNAMIC, []
    for layer in range(layers):
        for kind, of, count in (("attention", 9, 9), ("mlp", 1536, 64)):
            gone = 0.0 if layer < 3 else ratio
            if dynamic and gone:
                often = [min(max(draw.gauss(1 - gone, 0.4), 0), 1) for _ in range(count)]
            else:
                often = [float(draw.random() > gone) for _ in range(count)]
            if kind == "mlp":
                often.sort(reverse=True)
            found.append(
                {
                    "name": f"layers.{layer}.{kind}", "layer": layer, "kind": kind, "of": of,
                    "kept": round(of * (1 - gone)), "batches": 3 if dynamic else 1,
                    "frequency": [round(f, 3) for f in often],
                    "changed": round(draw.uniform(0.02, 0.3), 4) if dynamic and gone else 0.0,
                }
            )  # fmt: skip
    return found


ROWS = rows(items=120, layers=6)


def lines(**wanted: Any) -> list[dict[str, Any]]:
    """Those of `ROWS` that have these values."""
    return [r for r in ROWS if all(r.get(k) == v for k, v in wanted.items())]


def only(**wanted: Any) -> dict[str, Any]:
    """The one of `ROWS` that has these values."""
    (row,) = lines(**wanted)
    return row


@cache
def summary() -> Any:
    """The summary of `ROWS`."""
    (made,) = report.summarise(ROWS)
    return made


def entry(summary: Any, name: str, ratio: float) -> Any:
    """The summary's entry of that method and ratio."""
    (found,) = (e for e in summary.entries if e.name == name and e.ratio == ratio)
    return found
