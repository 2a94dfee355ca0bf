"""The gain of choosing MLP channels anew while decoding: perplexity of `probe` at 40 %, by `refresh`.

Run: .venv/bin/python benchmarks/refresh.py   (about 3 minutes on 2 cores)

16 windows of WikiText-2 from all over the text, one batch: a prompt of 128 tokens, then 128 tokens fed
one by one after it; perplexity and time are those of these 128. SmolLM2-135M-Instruct, float32,
calibrated on 48 windows of C4.
"""

import time
from typing import Any

import torch
from torch.nn.functional import cross_entropy

import probeprune
from probeprune import Method, compose
from probeprune.data.corpora import load_corpus
from probeprune.data.windows import calibration_windows, evaluation_windows
from probeprune.model.machine import cache_dir
from probeprune.strategies.probe_every_batch import ProbeEveryBatch

WAYS: dict[str, Method] = {
    "dense": probeprune.METHODS["dense"],
    "ppsp (ordered once)": probeprune.METHODS["ppsp"],
    **{f"probe, refresh={n}": compose("probe", when=ProbeEveryBatch(refresh=n)) for n in (0, 64, 16)},
}
PROMPT, BEHIND, BATCH, COUNT = 128, 128, 16, 16


def main() -> None:
    loaded = probeprune.load_model("smollm2-135m", dtype="float32")
    windows = calibration_windows(load_corpus("c4"), loaded.tokenizer, count=48, length=256, seed=0)
    prepared = probeprune.prepare(
        loaded.model, list(WAYS.values()), 0.4, windows, cache=cache_dir() / "statistics"
    )
    text = evaluation_windows(load_corpus("wikitext2"), loaded.tokenizer, length=PROMPT + BEHIND)
    text = text[:: len(text) // COUNT][:COUNT]
    for name, method in WAYS.items():
        losses, seconds = [], 0.0
        with probeprune.attach(loaded.model, method, 0.4, calibration=prepared):
            for batch in text.split(BATCH):
                loss, taken = decode(loaded.model, batch)
                losses.append(loss)
                seconds += taken
        value = float(torch.stack(losses).mean().exp())
        step = 1e3 * seconds / (BEHIND * COUNT // BATCH)
        print(f"{name:<20} perplexity {value:7.2f}   {step:.1f} ms a step", flush=True)


@torch.inference_mode()
def decode(model: Any, batch: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Mean loss of the tokens after the prompt, fed one by one, and the seconds taken."""
    output = model(batch[:, :PROMPT], use_cache=True)
    losses, start = [], time.perf_counter()
    for i in range(PROMPT, PROMPT + BEHIND):
        losses.append(cross_entropy(output.logits[:, -1].float(), batch[:, i]))
        output = model(batch[:, i : i + 1], past_key_values=output.past_key_values)
    return torch.stack(losses).mean(), time.perf_counter() - start


if __name__ == "__main__":
    main()
