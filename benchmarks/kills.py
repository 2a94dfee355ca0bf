"""Kill commands at random moments, start them again, and compare the result with an unbroken run's.

On a tiny random model on the CPU. Every start is a fork of this process, in which the libraries are imported
already, so that a moment is rarely one of importing. A trial is one run that is killed, often on the way back
too, and then ends. It passes if weights, records and result lines are those of the unbroken run, and nothing
else is left in its folder, its cache or among temporary files. `keep` prunes by a dynamic method; `streamed`
and `streamed-refit` prune with the layers and most hidden states on disk, and store them behind every layer.

    python benchmarks/kills.py --trials 20 --commands prune,recover
"""

import argparse
import gc
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # a forked process has none of the threads of its parent

import matplotlib.figure
import peft
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.tensorboard import SummaryWriter
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer

import probeprune.calibration.unfinished
import probeprune.experiment.executors
import probeprune.jobs.prune
import probeprune.model.loading
import probeprune.report
import probeprune.training.loraprune
from probeprune.cli import app, run
from probeprune.model.hidden_states import Room
from probeprune.model.placing import Placing
from probeprune.places import partial

IMPORTED = (matplotlib.figure, peft, SummaryWriter, Trainer, probeprune.report)

TIMED = {"seconds", "peak_memory", "tokens_per_second", "training", "threads", "versions", "base_model"}
"""Keys whose values differ from run to run, or name the folder."""


def main() -> None:
    """Run all trials and print a table of their outcomes; exit with 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=20, help="kills of each command")
    parser.add_argument("--commands", default=",".join(LINES))
    parser.add_argument("--seed", type=int, default=0, help="draws the moments")
    options = parser.parse_args()
    torch.set_num_threads(1)
    moments, failed = random.Random(options.seed), False
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        assert end(start(lambda: write_files(folder), folder / "log")) == 0, (folder / "log").read_text()
        print("| command | seconds | killed | killed twice | outcome |\n| --- | ---: | ---: | ---: | --- |")
        for command in options.commands.split(","):
            counts, outcomes, seconds = trials(folder, command, options.trials, moments)
            failed |= set(outcomes) != {"same"}
            said = ", ".join(f"{n} {what}" for what, n in outcomes.items())
            print(f"| {command} | {seconds:.1f} | {counts[1]} | {counts[2]} | {said} |", flush=True)
    sys.exit(1 if failed else 0)


def trials(
    folder: Path, command: str, count: int, moments: random.Random
) -> tuple[Counter[int], Counter[str], float]:
    """Numbers of trials by kills and by outcome, and the seconds of the unbroken run."""
    whole = folder / f"{command}-whole"
    began = time.monotonic()
    code = end(launch(folder, command, whole))
    seconds = time.monotonic() - began
    assert code == 0, (whole / "log").read_text()[-3000:]
    wanted = result(whole)
    kills, outcomes = Counter[int](), Counter[str]()
    for _ in range(count):
        trial = folder / f"{command}-trial"
        killed, last = 0, None
        for start_number in range(3):
            pid = launch(folder, command, trial)
            # The second start is killed in half of the trials, the third never.
            wait = moments.uniform(0, seconds) if start_number < 1 + (moments.random() < 0.5) else None
            last = end(pid, wait)
            if last is not None:
                break
            killed += 1
        kills[killed] += 1
        if killed == 2:
            kills[1] += 1
        outcomes[outcome(trial, wanted, last, killed)] += 1
        shutil.rmtree(trial)
    shutil.rmtree(whole)
    return kills, outcomes, seconds


def outcome(trial: Path, wanted: dict[str, Any], code: int | None, killed: int) -> str:
    """`same`, or what is wrong with a trial."""
    log = (trial / "log").read_text()
    # Killed behind its last write, a command that makes a checkpoint finds it made.
    if code != 0 and not (code == 2 and killed and "exists and is not empty" in log):
        return f"exit code {code} ({log.strip().splitlines()[-1:]})"
    if code == 2:  # it needed no temporary files; whoever needs some first deletes those of the dead
        with partial(trial / "place/temporary", "next"):
            pass
    found = result(trial)
    if found.keys() != wanted.keys():
        return f"files {sorted(found.keys() ^ wanted.keys())}"
    different = [name for name in wanted if found[name] != wanted[name]]
    return f"different {different}" if different else "same"


def result(trial: Path) -> dict[str, Any]:
    """What a command wrote, by name, without what a clock decides."""
    found: dict[str, Any] = {}
    for path in sorted((trial / "place").rglob("*")):
        name = str(path.relative_to(trial))
        if path.is_dir() or "tensorboard" in name:
            found[name.partition("tensorboard")[0]] = None
        elif path.suffix == ".safetensors":
            found[name] = path.read_bytes()
        elif path.suffix == ".jsonl":
            for line in path.read_text().splitlines():
                row = json.loads(line)
                assert row["kind"] == "result", row
                found |= {f"{name}, {row['name']}, {row['task']}: {k}": v for k, v in untimed(row).items()}
            found[f"{name}: lines"] = path.read_text().count("\n")
        elif path.name in ("training.json", "pruning.json", "attached.json"):
            found |= {f"{name}: {k}": v for k, v in untimed(json.loads(path.read_text())).items()}
        else:
            assert path.stat().st_size or path.suffix == ".lock", f"{path} is empty"
            found[name] = None
    return found


def untimed(record: dict[str, Any]) -> dict[str, Any]:
    """A record without the keys that differ from run to run."""
    return {k: v for k, v in record.items() if k not in TIMED}


# -- processes -------------------------------------------------------------------------------------


def launch(folder: Path, command: str, trial: Path) -> int:
    """Start a command whose place is `trial`; the id of its process."""
    (trial / "place").mkdir(parents=True, exist_ok=True)

    def work() -> int:
        os.environ["PROBEPRUNE_CACHE"] = str(trial / "place/cache")
        tempfile.tempdir = str(trial / "place/temporary")
        os.makedirs(tempfile.tempdir, exist_ok=True)
        if command.startswith("streamed"):
            stream()
        code = run(lambda: app(arguments(folder, command, trial / "place/out")))
        gc.collect()  # `_exit` ends no object, and what lies in temporary folders goes with its own
        return code

    return start(work, trial / "log")


def stream() -> None:
    """Put the layers of all models on disk, and most hidden states: no memory limit is as exact as that."""
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": "disk" for i in range(4)}
    probeprune.model.loading.place = lambda *request: Placing(places, Room(4000))
    probeprune.calibration.unfinished.EVERY = probeprune.calibration.unfinished.COST = 0.0


def start(work: Callable[[], int | None], log: Path) -> int:
    """Run a function in a process of its own that prints to `log`; its id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        code = work() or 0
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 70
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def end(pid: int, wait: float | None = None) -> int | None:
    """The exit code of a process; None if it lives for `wait` seconds, and then is killed."""
    deadline = None if wait is None else time.monotonic() + wait
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if deadline is not None and time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return None
        time.sleep(0.001)


# -- what is run -----------------------------------------------------------------------------------


_CALIBRATED = "--calibration TEXT --calibration-windows 4 --length 16"
_MEASURED = "--corpus TEXT --windows 4 --dtype float32 --device cpu --out OUT"
_PRUNING = "--ratio 0.3 --round-to 4"
_TRAINING = "--steps 6 --batch-size 4 --micro-batch 4 --length 16 --evaluate-every 2 --text TEXT"
_BUDGET = "--train-steps 4 --train-batch-size 4 --train-length 16 --train-text TEXT"

LINES = {
    "prune": f"prune MODEL {_PRUNING} --method wanda-sp {_CALIBRATED} {_MEASURED}",
    "keep": f"prune MODEL --ratio 0.3 --method best-dynamic --skip-layers 1 {_CALIBRATED} {_MEASURED}",
    "streamed": f"prune MODEL {_PRUNING} --method llm-pruner {_CALIBRATED} {_MEASURED}",
    "streamed-refit": f"prune MODEL {_PRUNING} --method best-static {_CALIBRATED} {_MEASURED}",
    "compare": "compare MODEL --methods dense,probe,random+lora --ratios 0.3 --skip-layers 1 "
    f"--speed-rounds 0 {_BUDGET} {_CALIBRATED} {_MEASURED}",
    "recover": f"recover MODEL --merge --warmup-steps 1 {_TRAINING} {_MEASURED}",
    "loraprune": f"loraprune MODEL {_PRUNING} {_TRAINING} {_MEASURED}",
    "table": "table --preset GRID --dtype float32 --device cpu --out OUT",
}
"""Command lines by the name of the command."""


def arguments(folder: Path, command: str, out: Path) -> list[str]:
    """The command line of a command."""
    places = {
        "MODEL": folder / "model",
        "TEXT": folder / "text.jsonl",
        "GRID": folder / "grid.yaml",
        "OUT": out,
    }
    return [str(places.get(word, word)) for word in LINES[command].split()]


def write_files(folder: Path) -> None:
    """A tiny model, a text and a grid."""
    vocabulary = {str(number): number for number in range(126)} | {"<s>": 126, "<pad>": 127}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", pad_token="<pad>")
    torch.manual_seed(0)
    shape = {"hidden_size": 48, "intermediate_size": 100, "num_hidden_layers": 4, "num_attention_heads": 6}
    config = LlamaConfig(**shape, num_key_value_heads=2, vocab_size=128, initializer_range=0.2)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    text = folder / "text.jsonl"
    lines = [" ".join(str((7 * i + j * j) % 120) for j in range(90)) for i in range(60)]
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    (folder / "grid.yaml").write_text(
        f"models: [{folder / 'model'}]\n"
        "methods:\n"
        "  - dense\n"
        "  - {base: probe, name: probe, skip_layers: 1}\n"
        "  - {base: random+lora, name: trained, skip_layers: 1}\n"
        "ratios: [0.3]\nseeds: [0]\n"
        f"calibration: {{corpus: {text}, windows: 4, length: 16}}\n"
        f"training: {{steps: 4, batch_size: 2, length: 16, corpus: {text}, seeds: [0]}}\n"
        f"texts:\n  - {{corpus: {text}, windows: 4, length: 16, batch_size: 2}}\n"
    )


if __name__ == "__main__":
    main()
