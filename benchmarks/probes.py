"""What makes a good probe: perplexity of `probe` at 40 % by signal, budget, fusion and decay.

Run: .venv/bin/python benchmarks/probes.py   (--show only draws existing results)

Windows are from C4 documents that calibration never sees, for choosing, and from WikiText-2, for checking;
both from all over the text, so that the windows of a batch come from different documents. Every configuration
is one line per text in runs/probes/results.jsonl; existing lines are not run again. Prints a Markdown table
of paired differences and draws docs/probes.png. SmolLM2-135M-Instruct, float32, calibrated on 48 windows of
C4.

Signals other than the residual norm are rules to pick a probe that are added to `PICKS` here; the package
itself has none.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import probeprune
from probeprune import METHODS, Method, Probe, ProbeEveryBatch, compose
from probeprune.algebra.moments import Tokens
from probeprune.data.corpora import load_corpus
from probeprune.data.windows import calibration_windows, evaluation_windows
from probeprune.evaluation.perplexity import perplexity
from probeprune.model.loading import LoadedModel
from probeprune.model.machine import cache_dir
from probeprune.model.passes import find_decoder
from probeprune.strategies.probe import PICKS, Selection, by_residual, probe_size

RATIO = 0.4
LENGTH = 256
WINDOWS = 32
"""Two batches of 16: two choices of a probe per text, each of 1 sample at the published 5 %."""
BATCH, SMALL_BATCH = 16, 2
TEXTS = {"c4-held-out": "C4, held out", "wikitext2": "WikiText-2"}
FIGURE = Path(__file__).parents[1] / "docs" / "probes.png"

Choose = Callable[[torch.Tensor, Tokens, Probe], Selection]


@dataclass(frozen=True)
class Configuration:
    """One way to probe, named after its difference from the published one."""

    group: str
    name: str
    method: Method
    signal: str = "residual"
    """The rule to pick the probe: a key of `PICKS` or a signal of this file."""
    batch: int = BATCH
    over: str = "published"
    """Name of the configuration to compare with."""


def probing(probe: Probe | None = None, **changes: Any) -> Method:
    """Probe Pruning with another probe, fusion or decay."""
    return compose("probe", name="probe", when=ProbeEveryBatch(probe or Probe(), **changes))


def picking(method: Method, signal: str) -> Method:
    """The same method with probes picked by another rule."""
    when = method.when
    if not isinstance(when, ProbeEveryBatch):
        return method
    probe = replace(when.probe, pick=signal)
    return compose(method, name=method.name, when=replace(when, probe=probe))


def configurations() -> list[Configuration]:
    """All configurations, the most informative first."""
    same = METHODS["probe"]
    signals = [f"random {seed}" for seed in range(2)] + ["attention", "surprisal", "diversity"]
    fusions: dict[str, dict[str, Any]] = {"no fusion": {"fusion": "none"}}
    for share in (0.25, 0.5, 0.75):
        fusions[f"history's share fixed at {share}"] = {"fusion": "fixed", "history_share": share}
    budgets = [(1, 0.1), (1, 0.25), (1, 1.0), (2, 0.5), (4, 0.5), (4, 1.0), (BATCH, 1 / 32)]
    few: dict[str, Any] = {"batch": SMALL_BATCH, "over": f"decay 0.99, batches of {SMALL_BATCH}"}
    return [
        Configuration("reference", "published", same),
        Configuration("reference", "everything (Full-Batch Probing)", METHODS["full-batch"]),
        Configuration("reference", "nothing (PPsp, ordered once)", METHODS["ppsp"]),
        *(Configuration("signal", name, same, name) for name in signals),
        *(
            Configuration("budget", budget(n, t), probing(Probe(samples=n / BATCH, tokens=t)))
            for n, t in budgets
        ),
        *(Configuration("fusion", name, probing(**changes)) for name, changes in fusions.items()),
        *(
            Configuration("decay", f"decay {d}, batches of {SMALL_BATCH}", probing(decay=d), **few)
            for d in (0.99, 0.9, 1.0)
        ),
    ]


def budget(samples: int, tokens: float) -> str:
    """Name of a probe size in table and results."""
    return f"{samples} of {BATCH} samples, {tokens:.0%} of the positions"


# -- signals: how much each token of a batch should be probed --------------------------------------


def by(importance: Callable[[torch.Tensor], torch.Tensor]) -> Choose:
    """The published rule on another signal: `importance(residual)` is (batch, sequence), not negative."""
    # The norm over a last dimension of 1 is the signal itself.
    return lambda residual, tokens, probe: by_residual(importance(residual)[..., None], tokens, probe)


def diverse(residual: torch.Tensor, tokens: Tokens, probe: Probe) -> Selection:
    """Farthest points among positions, then among samples, by mean direction of the residual."""
    samples, positions = probe_size(probe, *residual.shape[:2])
    x = nn.functional.normalize(residual.float(), dim=-1)
    columns = farthest(x.mean(0), positions)
    return Selection(farthest(x[:, columns].mean(1), samples), columns)


def farthest(points: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of rows of `points`, ascending: the most central one, then repeatedly the one farthest from
    those taken."""
    distances = torch.cdist(points, points)
    taken = [int(distances.sum(1).argmin())]
    while len(taken) < count:
        taken.append(int(distances[taken].amin(0).index_fill(0, torch.tensor(taken), -1).argmax()))
    return torch.tensor(sorted(taken))


@contextmanager
def attention_received() -> Iterator[dict[tuple[int, int], torch.Tensor]]:
    """Attention that each token received in the last attention block, summed over queries, averaged over
    heads, by the (batch, length) of the pass. At the entry of a block, the entry for the whole batch is that
    of the previous block."""
    received: dict[tuple[int, int], torch.Tensor] = {}
    own = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        scores = query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT * query.shape[-1] ** -0.5
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)  # no padding here: causal is all
        weights = scores.masked_fill_(later, -torch.inf).softmax(-1)
        received[query.shape[0], query.shape[2]] = weights.mean(1).sum(1)
        return own(module, query, key, value, mask, **kwargs)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
    try:
        yield received
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = own


def surprisals(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """Loss of the dense model on each token (windows, length); 0 for the first, which nothing predicts."""
    losses = []
    with torch.inference_mode():
        for window in windows.split(1):
            logits = model(input_ids=window, use_cache=False).logits[0, :-1]
            losses.append(nn.functional.cross_entropy(logits.float(), window[0, 1:], reduction="none"))
    return nn.functional.pad(torch.stack(losses), (1, 0))


@contextmanager
def signal_rule(signal: str, model: nn.Module, windows: torch.Tensor) -> Iterator[None]:
    """Make `signal` a row of `PICKS` inside the context. Enter it before attaching a method that uses it."""
    with ExitStack() as stack:
        if signal in PICKS:
            yield
            return
        rule: Choose
        if signal == "diversity":
            rule = diverse
        elif signal == "attention":
            received = stack.enter_context(attention_received())
            rule = by(lambda residual: received[residual.shape[0], residual.shape[1]])
        elif signal == "surprisal":
            waiting, current = list(surprisals(model, windows).split(BATCH)), [torch.empty(0)]

            def next_batch(*_: object) -> None:
                current[:] = [waiting.pop(0)]

            stack.callback(find_decoder(model).register_forward_pre_hook(next_batch).remove)
            rule = by(lambda residual: current[0])
        else:
            generator = torch.Generator().manual_seed(int(signal.removeprefix("random ")))
            rule = by(lambda residual: torch.rand(residual.shape[:2], generator=generator))
        PICKS[signal] = rule
        stack.callback(PICKS.pop, signal)
        yield


# -- measuring --------------------------------------------------------------------------------------


def measure(results: Path, count: int, texts: list[str], only: list[str]) -> None:
    """Append the lines that are missing in `results`: text by text, in the order of `only` if given."""
    done = {(line["name"], line["text"]) for line in read(results)}
    known = {c.name: c for c in configurations()}
    todo = [(known[name], text) for text in texts for name in only or known if (name, text) not in done]
    if not todo:
        return
    loaded = probeprune.load_model("smollm2-135m", dtype="float32")
    windows = calibration_windows(load_corpus("c4"), loaded.tokenizer, count=48, length=512, seed=0)
    methods = [c.method for c, _ in todo]
    prepared = probeprune.prepare(loaded.model, methods, RATIO, windows, cache=cache_dir() / "statistics")
    tokens = {text: spread_windows(text, loaded, count) for text in texts}
    results.parent.mkdir(parents=True, exist_ok=True)
    for c, text in todo:
        start = time.perf_counter()
        with (
            signal_rule(c.signal, loaded.model, tokens[text]),
            probeprune.attach(loaded.model, picking(c.method, c.signal), RATIO, calibration=prepared),
        ):
            found = perplexity(loaded.model, tokens[text], batch_size=c.batch)
        line = {"name": c.name, "text": text, "losses": found.losses, "flops": found.flops_per_token}
        with results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{c.name}, {text}: {found.value:.2f} ({time.perf_counter() - start:.0f} s)", flush=True)


def spread_windows(text: str, loaded: LoadedModel, count: int) -> torch.Tensor:
    """Windows from all over a text."""
    windows = evaluation_windows(load_corpus(text), loaded.tokenizer, length=LENGTH)
    return windows[:: len(windows) // count][:count]


def read(results: Path) -> list[dict[str, Any]]:
    """The lines measured so far."""
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


# -- showing ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A configuration on one text."""

    perplexity: float
    difference: float
    """Increase of perplexity over the baseline, in per cent."""
    error: float
    """Standard error of `difference` over windows (delta method). It does not include the choice of sample,
    for which see `random`."""
    flops: float
    """FLOPs of the decoder over those of the baseline."""


def rows(results: Path) -> dict[tuple[str, str], Row]:
    """By name and text."""
    lines = {(line["name"], line["text"]): line for line in read(results)}
    found = {}
    for c in configurations():
        for text in TEXTS:
            if (c.name, text) in lines and (c.over, text) in lines:
                line, other = lines[c.name, text], lines[c.over, text]
                paired = [a - b for a, b in zip(line["losses"], other["losses"], strict=True)]
                factor = math.exp(statistics.fmean(paired))
                found[c.name, text] = Row(
                    math.exp(statistics.fmean(line["losses"])),
                    100 * (factor - 1),
                    100 * factor * statistics.stdev(paired) / math.sqrt(len(paired)),
                    line["flops"] / other["flops"],
                )
    return found


def table(found: dict[tuple[str, str], Row]) -> str:
    """Markdown."""
    lines = ["| | " + " | ".join(f"{t} | over published" for t in TEXTS.values()) + " | FLOPs |"]
    lines.append("| --- |" + " ---: |" * (2 * len(TEXTS) + 1))
    for c in configurations():
        here = [found.get((c.name, text)) for text in TEXTS]
        if not any(here):
            continue
        cells = []
        for row in here:
            same = c.name == c.over
            change = "" if row is None or same else f"{row.difference:+.1f} ± {row.error:.1f} %"
            cells += ["", ""] if row is None else [f"{row.perplexity:.1f}", change]
        # The cost of computing a signal here does not show its cost in the package.
        flops = "" if c.group == "signal" else f"{next(r for r in here if r).flops:.2f} x"
        lines.append(f"| {c.name} | " + " | ".join(cells) + f" | {flops} |")
    return "\n".join(lines)


def draw(found: dict[tuple[str, str], Row]) -> None:
    """All differences with their errors, the published probe at 0."""
    from matplotlib.figure import Figure

    shown = [c for c in configurations() if c.name != c.over and any((c.name, t) in found for t in TEXTS)]
    figure = Figure(figsize=(9, 0.3 * len(shown) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    for shift, (text, label) in zip((-0.15, 0.15), TEXTS.items(), strict=True):
        points = [(i, found[c.name, text]) for i, c in enumerate(shown) if (c.name, text) in found]
        axes.errorbar(
            [row.difference for _, row in points],
            [i + shift for i, _ in points],
            xerr=[2 * row.error for _, row in points],
            fmt="o",
            markersize=4,
            label=label,
        )
    axes.axvline(0, color="grey", linewidth=0.8)
    for i in range(1, len(shown)):
        if shown[i].group != shown[i - 1].group:
            axes.axhline(i - 0.5, color="lightgrey", linewidth=0.8)
    axes.set_yticks(range(len(shown)), [c.name for c in shown])
    axes.invert_yaxis()
    axes.set_xlabel("perplexity over the published probe's, % (bars: 2 paired standard errors)")
    figure.legend(loc="outside upper center", ncols=len(TEXTS))
    figure.savefig(FIGURE, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--windows", type=int, default=WINDOWS, help="windows a text")
    parser.add_argument("--out", type=Path, default=Path("runs/probes"))
    parser.add_argument("--texts", nargs="+", choices=TEXTS, default=list(TEXTS))
    parser.add_argument("--only", nargs="+", default=[], help="names of configurations, in that order")
    parser.add_argument("--show", action="store_true", help="draw what is there; measure nothing")
    options = parser.parse_args()
    results = options.out / "results.jsonl"
    if not options.show:
        measure(results, options.windows, options.texts, options.only)
    found = rows(results)
    print(table(found))
    draw(found)


if __name__ == "__main__":
    main()
