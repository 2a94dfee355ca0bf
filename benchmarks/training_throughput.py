"""Cost of training beside plain PEFT + Trainer: the same model, text and steps, interleaved.

    python benchmarks/training_throughput.py

Every round trains a few steps in each of three ways: PEFT and the Trainer as in their documentation,
`recover`, and `loraprune`. Prints the median time from the start of one step to the next, and the median over
rounds of the ratio to plain training. The first step of each run is left out, because it includes set-up.
"""

import statistics
import tempfile
import time
from pathlib import Path

from peft import get_peft_model
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from probeprune.data.corpora import load_corpus
from probeprune.data.windows import training_windows
from probeprune.foreign.quiet import quiet_libraries
from probeprune.model.blocks import find_blocks
from probeprune.model.loading import load_model
from probeprune.training.loraprune import LoraPrune
from probeprune.training.recovery import lora_config, recover
from probeprune.training.settings import Lora, Training
from probeprune.training.trainer import WindowDataset

ROUNDS, STEPS, BATCH, LENGTH = 3, 4, 4, 256


class Steps(TrainerCallback):
    """Start time of every step."""

    def __init__(self) -> None:
        self.begun: list[float] = []

    def on_step_begin(self, *args, **kwargs) -> None:
        self.begun.append(time.perf_counter())

    def seconds(self) -> float:
        """Median seconds per step."""
        return statistics.median(b - a for a, b in zip(self.begun[1:], self.begun[2:], strict=False))


def plain(model, windows, held_out, work: Path) -> float:
    steps = Steps()
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=1e-4,
        report_to="none",
        use_cpu=model.device.type == "cpu",
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model=get_peft_model(model, lora_config(model, Lora())),
        args=arguments,
        train_dataset=WindowDataset(windows),
        callbacks=[steps],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return steps.seconds()


def ours(model, windows, held_out, work: Path, *, prune: bool) -> float:
    training = Training(
        steps=STEPS, batch_size=BATCH, micro_batch=BATCH, length=LENGTH, warmup_steps=0, keep_best=False
    )
    steps, more = Steps(), []
    if prune:
        blocks = find_blocks(model)
        # Masks change at every step here, so that a run of a few steps includes their cost.
        more = [LoraPrune(blocks, [max(1, int(0.8 * b.units)) for b in blocks], every=1)]
    recover(model, windows, held_out, training, work, callbacks=[steps, *more])
    return steps.seconds()


def main() -> None:
    loaded = load_model()
    windows, held_out = training_windows(load_corpus("c4"), loaded.tokenizer, length=LENGTH)
    ways = {
        "plain PEFT + Trainer": plain,
        "recover": lambda *a: ours(*a, prune=False),
        "loraprune": lambda *a: ours(*a, prune=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            with tempfile.TemporaryDirectory() as folder, quiet_libraries():
                model = load_model(dtype=str(loaded.dtype).removeprefix("torch.")).model
                seconds[name].append(way(model, windows, held_out[:1], Path(folder) / "work"))
            print(f"{name}: {seconds[name][-1]:.2f} s a step", flush=True)
    print(f"{BATCH} x {LENGTH} tokens a step, {loaded.dtype}, {loaded.device}")
    base = seconds["plain PEFT + Trainer"]
    for name, own in seconds.items():
        ratios = [b / s for b, s in zip(base, own, strict=True)]
        speed = f"{statistics.median(ratios):.3f} of plain speed ({min(ratios):.3f}-{max(ratios):.3f})"
        print(f"{name:<22} {statistics.median(own):6.2f} s a step, {speed}")


if __name__ == "__main__":
    main()
