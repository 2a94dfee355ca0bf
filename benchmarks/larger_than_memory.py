"""Prune and measure a model larger than memory: time and peak memory of each command, seen from outside.

Makes a checkpoint of random bfloat16 numbers in the shape of LLaMA-2-13B (26 GB), and runs `probeprune prune`
on it a layer at a time.

    python benchmarks/larger_than_memory.py --folder /some/large/disk --memory 6GiB
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaConfig

from probeprune.model.loading import EMBEDDED_MODEL, load_model

SHAPES = {
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "heads": 40},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "heads": 32},
}

RUNS = (
    ("wanda-sp", 0.4, ["--calibration-windows", "4", "--length", "64"]),
    ("llm-pruner", 0.2, ["--calibration-windows", "4", "--length", "64"]),
)

PROBE = """
import sys

import probeprune
from probeprune.cli.values import size
from probeprune.data.corpora import load_corpus
from probeprune.data.windows import calibration_windows, evaluation_windows
from probeprune.evaluation.perplexity import perplexity

loaded = probeprune.load_model(sys.argv[1], dtype="bfloat16", memory=size("memory", sys.argv[2]))
text = calibration_windows(load_corpus("c4"), loaded.tokenizer, count=4, length=64, seed=0)
windows = evaluation_windows(load_corpus("wikitext2"), loaded.tokenizer, length=64, limit=2)
with probeprune.attach(loaded.model, "probe", 0.4, calibration=text):
    print(f"perplexity {perplexity(loaded.model, windows).value:.1f}")
"""
"""Measures Probe Pruning, from the arguments MODEL MEMORY."""


def main() -> None:
    """Print one line a command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="a folder with room for both checkpoints")
    parser.add_argument("--shape", choices=SHAPES, default="13b")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--memory", default="6GiB")
    parser.add_argument("--runs", default="wanda-sp,llm-pruner,probe", help="which of these to run")
    options = parser.parse_args()
    dense = make(options.folder, options.shape, options.layers)
    size = sum(f.stat().st_size for f in dense.glob("*.safetensors"))
    print(f"{dense.name}: {size / 2**30:.1f} GiB", flush=True)
    runs = options.runs.split(",")
    for method, ratio, more in RUNS:
        if method not in runs:
            continue
        out = options.folder / "pruned"
        shutil.rmtree(out, ignore_errors=True)
        command = [
            *(sys.executable, "-m", "probeprune", "prune", str(dense)),
            *("--method", method, "--ratio", str(ratio), "--dtype", "bfloat16"),
            *("--memory", options.memory, "--windows", "2", "--out", str(out), *more),
        ]
        print(f"{method} {ratio:.0%}: {measured(command, options.folder)}", flush=True)
    shutil.rmtree(options.folder / "pruned", ignore_errors=True)
    if "probe" in runs:
        command = [sys.executable, "-c", PROBE, str(dense), options.memory]
        print(f"probe 40%: {measured(command, options.folder)}", flush=True)


def make(folder: Path, shape: str, layers: int | None) -> Path:
    """The checkpoint, one shard a layer; made where it is not there."""
    sizes = dict(SHAPES[shape])
    heads = sizes.pop("heads")
    count = layers or sizes["num_hidden_layers"]
    sizes["num_hidden_layers"] = count
    dense = folder / f"random-{shape}-{count}"
    if (dense / "config.json").exists():
        return dense
    dense.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(load_model(EMBEDDED_MODEL).model.config._name_or_path)
    tokenizer.save_pretrained(dense)
    hidden, wide, vocabulary = sizes["hidden_size"], sizes["intermediate_size"], len(tokenizer)
    files: dict[str, str] = {}

    def write(file: str, shapes: dict[str, tuple[int, ...]]) -> None:
        tensors = {
            name: torch.ones(shape, dtype=torch.bfloat16)
            if len(shape) == 1
            else torch.empty(shape, dtype=torch.bfloat16).normal_(0, shape[-1] ** -0.5)
            for name, shape in shapes.items()
        }
        save_file(tensors, dense / file, metadata={"format": "pt"})
        files.update(dict.fromkeys(shapes, file))

    write(
        "ends.safetensors",
        {
            "model.embed_tokens.weight": (vocabulary, hidden),
            "model.norm.weight": (hidden,),
            "lm_head.weight": (vocabulary, hidden),
        },
    )
    for layer in range(count):
        prefix = f"model.layers.{layer}"
        write(
            f"layer-{layer:02}.safetensors",
            {
                **{f"{prefix}.self_attn.{m}_proj.weight": (hidden, hidden) for m in "qkvo"},
                **{f"{prefix}.mlp.{m}_proj.weight": (wide, hidden) for m in ("gate", "up")},
                f"{prefix}.mlp.down_proj.weight": (hidden, wide),
                f"{prefix}.input_layernorm.weight": (hidden,),
                f"{prefix}.post_attention_layernorm.weight": (hidden,),
            },
        )
    index = {"metadata": {}, "weight_map": files}
    (dense / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    LlamaConfig(
        **sizes,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=vocabulary,
        max_position_embeddings=4096,
        dtype=torch.bfloat16,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(dense)
    return dense


def measured(command: list[str], scratch: Path) -> str:
    """Seconds, seconds of processors, and peak memory of a command, and its last line."""
    started = time.monotonic()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "TMPDIR": str(scratch)},
    )
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    worked = usage.ru_utime + usage.ru_stime
    figures = (
        f"{time.monotonic() - started:.0f} s ({worked:.0f} s of processors), "
        f"peak {usage.ru_maxrss / 2**20:.2f} GiB resident"
    )
    if os.waitstatus_to_exitcode(status):
        return f"failed after {figures}\n{said}"
    return f"{figures} ({said.strip().splitlines()[-1].strip()})"


if __name__ == "__main__":
    main()
