"""The transformers Trainer for a training run: its arguments, callbacks and error messages."""

import errno
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainerControl, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import TrainOutput

from probeprune import processes
from probeprune.errors import UsageError
from probeprune.progress import Progress
from probeprune.training.checkpoints import has_ended, last_checkpoint, read_state
from probeprune.training.settings import Training

_MEMORY = (
    "out of memory while training; lower micro_batch or length, or use gradient checkpointing (micro_batch "
    "and checkpointing do not change the result)."
)
_DISK_FULL = ("No space left", "file write failed", "unexpected pos")
"""Parts of the messages of safetensors and torch when a write fails."""


class WindowDataset(torch.utils.data.Dataset):
    """Windows (count, length) as the Trainer reads them; every token but the first is a label."""

    def __init__(self, windows: torch.Tensor) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.windows[index], "labels": self.windows[index]}


class CheckedTrainer(Trainer):
    """Raises `FloatingPointError` for a loss that is not finite, before the step or the checkpoint.

    Resumed from a checkpoint behind which no step was left, it does none; the Trainer itself would do one.
    """

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> TrainOutput:
        checkpoint = kwargs.get("resume_from_checkpoint")
        state = None if checkpoint is None else read_state(Path(checkpoint))
        # Weights that are split over processes are only loaded in the loop itself.
        if state is None or not has_ended(state) or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return super()._inner_training_loop(*args, **kwargs)
        state.is_local_process_zero = self.is_local_process_zero()
        state.is_world_process_zero = self.is_world_process_zero()
        self.state = state
        control = self.callback_handler.on_train_begin(self.args, state, TrainerControl())
        if self.args.load_best_model_at_end and state.best_global_step:
            best = Path(str(checkpoint)).with_name(f"checkpoint-{state.best_global_step}")
            state.best_model_checkpoint = str(best)
            self._load_best_model()
        self.callback_handler.on_train_end(self.args, state, control)
        return TrainOutput(state.global_step, math.nan, {})

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            self._fail("loss", self.state.global_step + 1)
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = super().evaluate(*args, **kwargs)
        if not math.isfinite(metrics["eval_loss"]):
            self._fail("held-out loss", self.state.global_step)
        return metrics

    def _fail(self, loss: str, step: int) -> NoReturn:
        last = last_checkpoint(Path(str(self.args.output_dir)))
        rescue = "there is no checkpoint yet" if last is None else f"the last good checkpoint is {last}"
        raise FloatingPointError(
            f"the {loss} became NaN or infinite at step {step}; {rescue}; lower the learning rate, or use "
            "float32 or bfloat16."
        )


class ReportProgress(TrainerCallback):
    """Passes steps and loss to a progress function, in the first process only."""

    def __init__(self, progress: Progress, steps: int) -> None:
        self.progress, self.steps = progress, steps
        self.loss = math.nan

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        self.loss = logs.get("loss", self.loss)
        if state.is_world_process_zero:
            self.progress(f"training, loss {self.loss:.3f}", state.global_step, self.steps)


class FinalEvaluation(TrainerCallback):
    """Evaluates and saves after the last step, even between two intervals."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_evaluate = control.should_save = True


class Patience(EarlyStoppingCallback):
    """Early stopping that keeps its count when an interrupted run is resumed."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if saved := saved_attributes(self, state):
            self.early_stopping_patience_counter = saved["early_stopping_patience_counter"]


class TrainingTime(TrainerCallback, ExportableState):
    """Counts seconds of training. Checkpoints hold the count, so that a resumed run adds to it."""

    def __init__(self) -> None:
        self.total = 0.0
        self._since = time.monotonic()

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"total": self.total}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if saved := saved_attributes(self, state):
            self.total = saved["total"]
        self._since = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        clock = time.monotonic()
        self.total += clock - self._since
        self._since = clock


def saved_attributes(callback: TrainerCallback, state: Any) -> dict[str, Any]:
    """The callback's attributes in the checkpoint that the Trainer resumes from; empty for a new run."""
    saved = state.stateful_callbacks.get(type(callback).__name__)
    return saved["attributes"] if saved else {}


@contextmanager
def explain_failures(work: Path) -> Iterator[None]:
    """Raise lack of memory or disk, and a checkpoint that does not fit the model, as `UsageError`."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise UsageError(_MEMORY) from error
    except (RuntimeError, OSError, SafetensorError) as error:
        message = str(error)
        if "not enough memory" in message or "can't allocate memory" in message:
            raise UsageError(_MEMORY) from error
        if "size mismatch" in message:
            raise UsageError(
                f"the last checkpoint in {work} has another model or LoRA rank; delete the directory to "
                "start over."
            ) from error
        if getattr(error, "errno", None) == errno.ENOSPC or any(part in message for part in _DISK_FULL):
            last = last_checkpoint(work)
            raise UsageError(
                f"the disk is full, a checkpoint in {work} could not be written; free some space and run the "
                f"same command again: it goes on from {'the beginning' if last is None else last.name}."
            ) from error
        raise


def trainer_arguments(
    training: Training, work: Path, device: torch.device, dtype: torch.dtype
) -> TrainingArguments:
    """The Trainer's arguments; `device` and `dtype` are those the model computes in."""
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
