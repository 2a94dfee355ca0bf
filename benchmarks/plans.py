"""What `probeprune plan` says of memory, against the peak of `probeprune prune`, seen from outside.

Makes random checkpoints of four shapes and takes the embedded model as the fifth. Each is planned and then
pruned as a process of its own, with all weights in memory, and a layer at a time under the least `--memory`
that the plan named. Prints one line a run: planned and measured GiB, and the error.

    python benchmarks/plans.py --folder /some/disk
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from probeprune.model.gguf_files import converted, embedded_gguf
from probeprune.model.loading import EMBEDDED_MODEL

SHAPES = {
    "vocabulary": {
        "dtype": torch.bfloat16,
        "vocab_size": 128256,
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "tie_word_embeddings": False,
    },
    "deep": {
        "dtype": torch.float32,
        "vocab_size": 49152,
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 40,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    },
    "wide": {
        "dtype": torch.float32,
        "vocab_size": 49152,
        "hidden_size": 384,
        "intermediate_size": 8192,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
    },
    "grouped": {
        "dtype": torch.bfloat16,
        "vocab_size": 49152,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
}
"""Fields of LLaMA's config, and the dtype on disk; all are computed in float32."""

OPTIONS = (
    *("--ratio", "0.4", "--dtype", "float32", "--length", "256", "--batch-size", "4"),
    *("--calibration-windows", "4", "--windows", "4"),
)


def main() -> None:
    """Plan and prune every shape by every method, in both modes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="a folder with room for the checkpoints")
    parser.add_argument("--models", default=",".join([*SHAPES, EMBEDDED_MODEL]))
    parser.add_argument("--methods", default="wanda-sp,llm-pruner,best-static")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    print("| model | method | mode | planned GiB | measured GiB | error | most for |")
    print("| --- | --- | --- | ---: | ---: | ---: | --- |")
    for method in options.methods.split(","):
        for name in options.models.split(","):
            model = name if name == EMBEDDED_MODEL else str(make(options.folder / name, SHAPES[name]))
            compare(options.folder, name, model, method)


def make(folder: Path, shape: dict) -> Path:
    """A random checkpoint of this shape; made where it is not there."""
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        fields = {"tie_word_embeddings": True, "max_position_embeddings": 65536, **shape}
        dtype = fields.pop("dtype")
        LlamaForCausalLM(LlamaConfig(**fields)).to(dtype).save_pretrained(folder)
        AutoTokenizer.from_pretrained(converted(embedded_gguf())).save_pretrained(folder)
    return folder


def compare(folder: Path, name: str, model: str, method: str) -> None:
    """Print a line for each mode."""
    cache = folder / "cache"  # of its own: statistics of an earlier run would leave nothing to do
    shutil.rmtree(cache / "statistics", ignore_errors=True)
    said, _ = run(cache, ["plan", model, "--method", method, *OPTIONS, "--json"])
    plan = json.loads(said.strip().splitlines()[-1])
    for mode, key in (("in memory", "in_memory"), ("a layer at a time", "by_layer")):
        planned, more = plan[key]["bytes"], []
        if key == "by_layer":
            if planned >= plan["in_memory"]["bytes"]:
                continue
            more = ["--memory", f"{planned / 2**20 + 1:.0f}MiB"]
        shutil.rmtree(cache / "statistics", ignore_errors=True)
        shutil.rmtree(folder / "pruned", ignore_errors=True)
        _, peak = run(
            cache,
            ["prune", model, "--method", method, *OPTIONS, *more, "--out", str(folder / "pruned")],
        )
        print(
            f"| {name} | {method} | {mode} | {planned / 2**30:.2f} | {peak / 2**30:.2f} "
            f"| {planned / peak - 1:+.1%} | {plan[key]['largest']} |",
            flush=True,
        )
    shutil.rmtree(folder / "pruned", ignore_errors=True)


def run(cache: Path, arguments: list[str]) -> tuple[str, int]:
    """What a command printed, and its peak resident memory in bytes. Exits where it fails."""
    cache.mkdir(exist_ok=True)
    if not (cache / "models").exists():
        (cache / "models").symlink_to(converted(embedded_gguf()).parent)
    process = subprocess.Popen(
        [sys.executable, "-m", "probeprune", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PROBEPRUNE_CACHE": str(cache)},
    )
    assert process.stdout is not None and process.stderr is not None
    said, complaint = process.stdout.read(), process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status):
        sys.exit(f"{' '.join(arguments)}\n{complaint}")
    return said, usage.ru_maxrss * 1024


if __name__ == "__main__":
    main()
