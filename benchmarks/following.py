"""Where following the batch pays, and where not: `best-dynamic` over `best-static`, by content of the batch.

Run: .venv/bin/python benchmarks/following.py [--ratio 0.4] [--out runs/following]
About 20 minutes on 2 cores with a cached refit for the ratio; 8 more without.

Three texts, at increasing distance from the calibration text: other documents of C4, WikiText-2, and the
Python source of the standard library. Each has 6 topics (documents, or segments of the text) of 4 windows of
256 tokens. The same windows are run alone, with those of their own topic, or mixed with other topics, so only
the choice differs; and the beginnings of the topics are run at 128 to 1024 tokens, one per batch. "All known"
probes
with the whole batch: it costs more than the dense model and shows about how much following can gain. In the
last rows, the first 512 tokens of a topic are a prompt to choose on, or to refit to, and the next 512, which
the method has not seen, are scored. SmolLM2-135M-Instruct, float32, calibrated on 128 windows of C4, seed 0.
Continues after a kill.
"""

import argparse
import json
import statistics
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

import probeprune
from probeprune import METHODS, Method, Probe, RefitEveryBatch, compose, with_pays
from probeprune.algebra.moments import Moments
from probeprune.calibration.collecting import calibrate
from probeprune.data.corpora import load_corpus
from probeprune.data.windows import calibration_windows, evaluation_windows, tokenize
from probeprune.evaluation.perplexity import perplexity
from probeprune.model.loading import LoadedModel
from probeprune.model.machine import cache_dir
from probeprune.preparation import Preparation
from probeprune.report.paired import paired_bootstrap

TOPICS, WINDOWS, LENGTH = 6, 4, 256
LENGTHS = (128, 512, 1024)
CONTINUED = "second half, chosen on the first"
TEXTS = ("C4, held out", "WikiText-2", "Python")
BEST = with_pays("best-dynamic", "always")
METHODS_BY_NAME: dict[str, Method] = {
    "dense": METHODS["dense"],
    "ordered once (ppsp)": METHODS["ppsp"],
    "probe": METHODS["probe"],
    "best-static": METHODS["best-static"],
    "best-dynamic": BEST,
    "all known": compose(BEST, when=RefitEveryBatch(Probe(tokens=1.0, samples=1.0))),
}
OVER = {
    "probe": "ordered once (ppsp)",
    "best-dynamic": "best-static",
    "all known": "best-static",
}
"""The baseline of each dynamic method: the same without following."""


def topics(text: str, loaded: LoadedModel) -> torch.Tensor:
    """Token ids (topics, windows x length)."""
    size = WINDOWS * LENGTH
    if text == "WikiText-2":
        stretches = evaluation_windows(load_corpus("wikitext2"), loaded.tokenizer, length=size)
        return stretches[:: len(stretches) // TOPICS][:TOPICS]
    if text == "Python":
        sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        documents = [source.read_text(errors="replace") for source in sources[:: len(sources) // 40]]
    else:
        documents = load_corpus("c4-held-out")
    found: list[list[int]] = []
    for document in documents:
        if len(found) == TOPICS:
            break
        ids = tokenize(document, loaded.tokenizer)
        if len(ids) >= size:
            found.append(ids[:size])
    return torch.tensor(found)


def arrangements(ids: torch.Tensor) -> Iterator[tuple[str, torch.Tensor, int, list[int]]]:
    """Name, windows in order, batch size, and the index of each window in the first arrangement."""
    windows = ids.reshape(TOPICS * WINDOWS, LENGTH)
    own = list(range(len(windows)))
    yield "alone", windows, 1, own
    yield f"{WINDOWS} of one topic", windows, WINDOWS, own
    mixed = torch.arange(len(windows)).view(TOPICS, WINDOWS).T.flatten()
    yield f"{WINDOWS} of {WINDOWS} topics", windows[mixed], WINDOWS, mixed.tolist()
    yield f"{2 * TOPICS} of {TOPICS} topics", windows[mixed], 2 * TOPICS, mixed.tolist()
    for length in LENGTHS:
        yield f"alone, first {length} tokens", ids[:, :length], 1, list(range(len(ids)))


def measure(results: Path, ratio: float) -> None:
    """Append the lines that are missing in `results`."""
    loaded = probeprune.load_model("smollm2-135m", dtype="float32")
    model, cache = loaded.model, cache_dir() / "statistics"
    windows = calibration_windows(load_corpus("c4"), loaded.tokenizer, count=128, length=512, seed=0)
    preparation = Preparation(model, windows, cache=cache, following=True)
    moments = preparation.statistics(METHODS["ppsp"], ratio).moments
    done = {(row["text"], row["name"], row["method"]) for row in read(results)}
    for text in TEXTS:
        ids = topics(text, loaded)
        distance = distance_of(ids.reshape(-1, LENGTH), model, moments)
        todo = [(*a, m) for a in arrangements(ids) for m in METHODS_BY_NAME]
        todo += [(CONTINUED, ids, 1, [], m) for m in METHODS_BY_NAME]
        for name, arranged, batch, places, method in todo:
            if (text, name, method) in done:
                continue
            row = {"text": text, "name": name, "method": method, "distance": distance}
            with probeprune.attach(model, METHODS_BY_NAME[method], ratio, calibration=preparation):
                if name == CONTINUED:
                    row["losses"], row["flops"] = continuation(model, arranged), None
                else:
                    found = perplexity(model, arranged, batch_size=batch)
                    row["losses"] = [loss for _, loss in sorted(zip(places, found.losses, strict=True))]
                    row["flops"] = found.flops_per_token
            with results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{text}, {name}, {method}: {statistics.fmean(row['losses']):.3f} nats", flush=True)


def continuation(model: Any, ids: torch.Tensor) -> tuple[float, ...]:
    """Loss of the second half of each topic, after the first half as the prompt that a method chooses on."""
    half, losses = ids.shape[1] // 2, []
    with torch.inference_mode():
        for row in ids.split(1):
            prompt = model(input_ids=row[:, :half], use_cache=True)
            rest = model(input_ids=row[:, half:], past_key_values=prompt.past_key_values, use_cache=True)
            loss = torch.nn.functional.cross_entropy(rest.logits[0, :-1].float(), row[0, half + 1 :])
            losses.append(float(loss))
    return tuple(losses)


def distance_of(windows: torch.Tensor, model: Any, moments: Mapping[str, Moments]) -> float:
    """Distance of a text from the calibration text: the median, over MLP channels, of the factor (up or down)
    between their energies."""
    here = calibrate(model, windows, cache=cache_dir() / "statistics")
    ratios = [(energy(here[n]) / energy(m)).log().abs() for n, m in moments.items() if "mlp" in n]
    return float(torch.cat(ratios).median().exp())


def energy(moments: Moments) -> torch.Tensor:
    """Mean of `z^2` per token, by channel."""
    return moments.m2 / moments.count + moments.mean.square()


def read(results: Path) -> list[dict[str, Any]]:
    """The lines measured so far."""
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: perplexity with following over that without, with its 95 % interval; and FLOPs."""
    heads = ["text", "batch", *OVER, "FLOPs: probe", "best-static", "best-dynamic"]
    lines = [f"| {' | '.join(heads)} |", "| --- | --- |" + " ---: |" * (len(heads) - 2)]
    for text, name in dict.fromkeys((row["text"], row["name"]) for row in rows):
        here = {row["method"]: row for row in rows if (row["text"], row["name"]) == (text, name)}
        if here.keys() != METHODS_BY_NAME.keys():
            continue  # incomplete
        found = [paired_bootstrap(here[m]["losses"], here[over]["losses"]) for m, over in OVER.items()]
        cells = [f"{c.factor:.3f} ({c.low:.3f} to {c.high:.3f})" for c in found]
        for m in ("probe", "best-static", "best-dynamic"):
            flops = here[m]["flops"]
            cells.append("" if flops is None else f"{flops / here['dense']['flops']:.1%}")
        lines.append(f"| {text} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ratio", type=float, default=0.4)
    parser.add_argument("--out", type=Path, default=Path("runs/following"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    results = options.out / f"{options.ratio:g}.jsonl"
    measure(results, options.ratio)
    rows = read(results)
    for text in TEXTS:
        away = statistics.fmean(row["distance"] for row in rows if row["text"] == text)
        print(f"{text}: a channel's energy is {away:.2f} times calibration's, or 1 over that (median)")
    print(table(rows))


if __name__ == "__main__":
    main()
