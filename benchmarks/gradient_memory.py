"""Memory of LLM-Pruner's gradients: measured on the embedded model, calculated for LLaMA-2-7B.

Run: .venv/bin/python benchmarks/gradient_memory.py   (about 30 seconds)

Measured: peak memory of the process over its memory before, while 10 windows of 64 tokens run one by one.
Calculated: weights in bfloat16, one float32 gradient of the blocks' weights (the average), and one of the
largest map (in flight); the activations of a single sample are not included.
"""

import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import probeprune
from probeprune.calibration.gradients import saliences
from probeprune.data.corpora import load_corpus
from probeprune.data.windows import calibration_windows
from probeprune.model.cost import PeakMemory

GIB = 2**30


def main() -> None:
    loaded = probeprune.load_model("smollm2-135m", dtype="float32")
    blocks = probeprune.find_blocks(loaded.model)
    windows = calibration_windows(load_corpus("c4"), loaded.tokenizer, count=10, length=64, seed=0)
    with torch.no_grad():
        loaded.model(windows[:1])  # torch initialises on the first pass
    before = psutil.Process().memory_info().rss
    for criterion in ("param_first", "param_mix"):
        with PeakMemory(loaded.device) as memory:
            saliences(loaded.model, windows, criterion)
        weights = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
        print(
            f"SmolLM2-135M, float32, {criterion}: {(memory.bytes - before) / GIB:.2f} GiB over the loaded "
            f"model ({weights / GIB:.2f} GiB); one gradient of its blocks is "
            f"{4 * sum(b.parameters for b in blocks) / GIB:.2f} GiB"
        )
    with torch.device("meta"):
        shape = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
        llama = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=32))
    parameters = sum(p.numel() for p in llama.parameters())
    inside = sum(b.parameters for b in probeprune.find_blocks(llama))
    largest = 4096 * 11008
    print(
        f"LLaMA-2-7B by count: {2 * parameters / GIB:.1f} GiB of bfloat16 weights + "
        f"{4 * inside / GIB:.1f} GiB of float32 gradients + {2 * largest / GIB:.2f} GiB on its way = "
        f"{(2 * parameters + 4 * inside + 2 * largest) / GIB:.1f} GiB"
    )


if __name__ == "__main__":
    main()
