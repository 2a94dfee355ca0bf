"""Serve pruned checkpoints with vLLM: the same greedy tokens as transformers, and throughput beside dense.

Prunes a model in every layout that vLLM can serve, continues a few prompts with transformers, and starts
vLLM on one checkpoint after the other, in several rounds. Idle engines keep a core busy, so only one is alive
at a time, and a speed-up is that of the medians within a round.

    python benchmarks/vllm_served.py --vllm .venv-vllm/bin/python
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time, there was",
    "Water boils at a temperature of",
)
NEW_TOKENS = 32

SERVE = """
import json, os, sys, time
os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind", HF_HUB_OFFLINE="1")
if __name__ == "__main__":
    import vllm
    request = json.load(open(sys.argv[1]))
    greedy = lambda n: vllm.SamplingParams(temperature=0, max_tokens=n, ignore_eos=True)
    engine = vllm.LLM(
        sys.argv[3], dtype=request["dtype"], enforce_eager=True, max_model_len=512, trust_remote_code=True,
        enable_prefix_caching=False, disable_log_stats=True,
    )
    prompts, long = ([{"prompt_token_ids": ids} for ids in request[name]] for name in ("prompts", "long"))
    made = engine.generate(prompts, greedy(request["new_tokens"]), use_tqdm=False)
    done = {"tokens": [list(o.outputs[0].token_ids) for o in made], "prompt": [], "decode": []}
    engine.generate(long, greedy(1), use_tqdm=False)
    for _ in range(request["repeats"]):
        start = time.perf_counter()
        engine.generate(long, greedy(1), use_tqdm=False)
        middle = time.perf_counter()
        engine.generate(long[:1], greedy(64), use_tqdm=False)
        done["prompt"].append(middle - start)
        done["decode"].append(time.perf_counter() - middle)
    json.dump({"version": vllm.__version__, **done}, open(sys.argv[2], "w"))
"""
"""Runs in vLLM's environment, which has no probeprune."""


def main() -> int:
    """Print one table; 1 if a checkpoint continues otherwise than transformers does."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm", default=sys.executable, help="Python of an environment with vLLM")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--method", default="wanda-sp", help="a method that prunes once")
    parser.add_argument("--ratios", default="0.2,0.4")
    parser.add_argument("--calibration-windows", type=int, default=16)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5, help="timed repeats in each round")
    parser.add_argument("--out", type=Path, default=Path("runs/vllm"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    checkpoints, expected, prompts = prune(options)
    text = (PROMPTS[2] + " ") * 64
    request = {
        "dtype": options.dtype,
        "prompts": prompts,
        "long": [tokens(options.model, text)[i : i + 256] for i in range(8)],
        "new_tokens": NEW_TOKENS,
        "repeats": options.repeats,
    }
    asked, answered, script = (options.out / n for n in ("request.json", "answer.json", "serve.py"))
    asked.write_text(json.dumps(request))
    script.write_text(SERVE)
    rounds: list[dict] = []
    for turn in range(options.rounds):
        rounds.append({})
        for name, folder in checkpoints.items():
            print(f"round {turn + 1} of {options.rounds}: {name}", file=sys.stderr)
            command = [options.vllm, str(script), str(asked), str(answered), folder]
            with (options.out / "vllm.log").open("w") as log:
                subprocess.run(command, check=True, stdout=log, stderr=log)
            rounds[-1][name] = json.loads(answered.read_text())
    print(f"vLLM {rounds[0]['dense']['version']}, {options.dtype}; medians of {options.rounds} rounds\n")
    print("| checkpoint | greedy tokens as in transformers | prompt speed-up | decode speed-up |")
    print("| --- | ---: | ---: | ---: |")
    same = True
    for name in checkpoints:
        got = rounds[0][name]["tokens"]
        equal = sum(a == b for a, b in zip(got, expected[name], strict=True))
        same = same and equal == len(PROMPTS)
        ratios = (speed_up(rounds, name, phase) for phase in ("prompt", "decode"))
        print(f"| {name} | {equal} of {len(PROMPTS)} texts of {NEW_TOKENS} | {' | '.join(ratios)} |")
    return 0 if same else 1


def speed_up(rounds: list[dict], name: str, phase: str) -> str:
    """Median over rounds of dense seconds over these, with the range."""
    ratios = [statistics.median(one["dense"][phase]) / statistics.median(one[name][phase]) for one in rounds]
    return f"{statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})"


def prune(options: argparse.Namespace) -> tuple[dict, dict, list]:
    """Folders of the checkpoints, the tokens that transformers continues each prompt with, the prompts."""
    from probeprune import load_model, prune, save
    from probeprune.data.corpora import load_corpus
    from probeprune.data.windows import calibration_windows
    from probeprune.engines.wishes import ENGINES
    from probeprune.methods import compose, for_layout

    folders, expected, prompts = {}, {}, []
    for ratio in (0.0, *map(float, options.ratios.split(","))):
        for layout in ("uniform", "nemotron-nas", "per-layer") if ratio else ("uniform",):
            name = f"{layout} {ratio:.0%}" if ratio else "dense"
            folder = options.out / name.replace(" ", "-").replace("%", "")
            loaded = load_model(options.model, dtype="float32")
            if not folder.exists():
                windows = calibration_windows(
                    load_corpus("c4"), loaded.tokenizer, count=options.calibration_windows, length=512, seed=0
                )
                round_to = ENGINES["vllm"].round_to if layout != "per-layer" else 1
                method = compose(for_layout(options.method, layout), round_to=round_to)
                if ratio:
                    prune(loaded.model, method, ratio, calibration=windows)
                save(loaded.model, folder, tokenizer=loaded.tokenizer, layout=layout)
            loaded = load_model(str(folder), dtype=options.dtype)
            prompts = [loaded.tokenizer(text)["input_ids"] for text in PROMPTS]
            folders[name] = str(folder)
            expected[name] = [continued(loaded.model, ids) for ids in prompts]
    return folders, expected, prompts


def continued(model, ids: list[int]) -> list[int]:
    """The greedy continuation of one prompt."""
    import torch

    made = model.generate(
        torch.tensor([ids]), min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS, do_sample=False
    )
    return made[0, len(ids) :].tolist()


def tokens(model: str, text: str) -> list[int]:
    """Token ids of a text."""
    from probeprune import load_model

    return load_model(model).tokenizer(text)["input_ids"]


if __name__ == "__main__":
    sys.exit(main())
