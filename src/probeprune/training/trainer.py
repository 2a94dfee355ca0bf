"""The transformers Trainer as we want it: its arguments, its events, its failures in plain words."""

import errno
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState

from probeprune.errors import UsageError
from probeprune.progress import Progress
from probeprune.training import processes
from probeprune.training.settings import Training

_MEMORY = (
    "out of memory while training; lower micro_batch or length, or use gradient checkpointing (the result "
    "stays the same for micro_batch and checkpointing)."
)
_DISK_FULL = ("No space left", "file write failed", "unexpected pos")
"""What safetensors and torch say when a write fails."""

_STATE = "trainer_state.json"
"""What the Trainer writes last into a checkpoint."""


class Windows(torch.utils.data.Dataset):
    """Windows as the Trainer reads them; every token but the first is a label."""

    def __init__(self, windows: torch.Tensor) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.windows[index], "labels": self.windows[index]}


class CheckedTrainer(Trainer):
    """Stops at a loss that is not finite, before a step is taken or a checkpoint written."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            self._stop("loss", self.state.global_step + 1)
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = super().evaluate(*args, **kwargs)
        if not math.isfinite(metrics["eval_loss"]):
            self._stop("held-out loss", self.state.global_step)
        return metrics

    def _stop(self, what: str, step: int) -> None:
        kept = last_checkpoint(Path(str(self.args.output_dir)))
        where = (
            "no checkpoint had been written yet" if kept is None else f"the last good checkpoint is {kept}"
        )
        raise FloatingPointError(
            f"the {what} became NaN or infinite at step {step}; {where}; lower the learning rate, or use "
            "float32 or bfloat16."
        )


class Report(TrainerCallback):
    """Steps and loss for the progress bar, in the first process."""

    def __init__(self, progress: Progress, steps: int) -> None:
        self.progress, self.steps = progress, steps
        self.loss = math.nan

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        self.loss = logs.get("loss", self.loss)
        if state.is_world_process_zero:
            self.progress(f"training, loss {self.loss:.3f}", state.global_step, self.steps)


class LastStep(TrainerCallback):
    """The last step is evaluated and saved, whatever the interval."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_evaluate = control.should_save = True


class Patience(EarlyStoppingCallback):
    """Early stopping that remembers its count over an interruption."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if found := remembered(self, state):
            self.early_stopping_patience_counter = found["early_stopping_patience_counter"]


class Seconds(TrainerCallback, ExportableState):
    """Seconds spent in training; kept in checkpoints, so that a resumed run knows its earlier part."""

    def __init__(self) -> None:
        self.total = 0.0
        self._since = time.monotonic()

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"total": self.total}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if found := remembered(self, state):
            self.total = found["total"]
        self._since = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.monotonic()
        self.total += now - self._since
        self._since = now


def remembered(callback: TrainerCallback, state: Any) -> dict[str, Any]:
    """What the checkpoint that the Trainer goes on from kept of this callback; empty at a fresh start."""
    earlier = state.stateful_callbacks.get(type(callback).__name__)
    return earlier["attributes"] if earlier else {}


def last_checkpoint(work: Path) -> Path | None:
    """The newest checkpoint that was written completely; a kill may leave one that was not."""
    complete = []
    for folder in work.glob("checkpoint-*"):
        try:
            json.loads((folder / _STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        complete.append(folder)
    return max(complete, key=lambda f: int(f.name.rpartition("-")[2]), default=None)


@contextmanager
def explained(work: Path) -> Iterator[None]:
    """Turn what the machine lacks into one sentence that says what to lower."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise UsageError(_MEMORY) from error
    except (RuntimeError, OSError, SafetensorError) as error:
        said = str(error)
        if "not enough memory" in said or "can't allocate memory" in said:
            raise UsageError(_MEMORY) from error
        if "size mismatch" in said:
            raise UsageError(
                f"the last checkpoint in {work} is of another model or rank of LoRA; delete the directory to "
                "begin anew."
            ) from error
        if getattr(error, "errno", None) == errno.ENOSPC or any(w in said for w in _DISK_FULL):
            kept = last_checkpoint(work)
            raise UsageError(
                f"the disk is full while a checkpoint is written to {work}; free some space and start the "
                f"same command again, it goes on from {'the beginning' if kept is None else kept.name}."
            ) from error
        raise


def trainer_arguments(
    training: Training, work: Path, device: torch.device, dtype: torch.dtype
) -> TrainingArguments:
    """The Trainer's arguments; `dtype` is what the model computes in."""
    several = processes.count() > 1
    return TrainingArguments(
        output_dir=str(work),
        max_steps=training.steps,
        per_device_train_batch_size=training.micro_batch,
        per_device_eval_batch_size=training.micro_batch,
        gradient_accumulation_steps=training.batch_size // (training.micro_batch * processes.count()),
        learning_rate=training.learning_rate,
        warmup_steps=training.warmup_steps,
        lr_scheduler_type="linear",
        weight_decay=training.weight_decay,
        max_grad_norm=training.clip,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu=device.type == "cpu",
        ddp_backend="gloo" if device.type == "cpu" and several else None,
        ddp_find_unused_parameters=False,
        eval_strategy="steps",
        eval_steps=training.evaluate_every,
        save_strategy="steps",
        save_steps=training.evaluate_every,
        save_total_limit=2,
        load_best_model_at_end=training.keep_best,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        prediction_loss_only=True,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        seed=training.seed,
        data_seed=training.seed,
        dataloader_pin_memory=device.type == "cuda",
        remove_unused_columns=False,
        disable_tqdm=True,
    )
