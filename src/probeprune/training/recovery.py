"""Recovery: train a pruned model on text again, LoRA by PEFT, the loop by the transformers Trainer.

Defaults are LLM-Pruner's published recovery. A run that is killed at any point goes on from its last complete
checkpoint with the same result as an unbroken one. Knows nothing of how the model was pruned.
"""

import errno
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch.utils.tensorboard import SummaryWriter
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import ExportableState

from probeprune.blocks import find_blocks
from probeprune.calibration import check_windows, content_key
from probeprune.errors import UsageError
from probeprune.evaluation.cost import PeakMemory
from probeprune.hub import quiet_libraries

Progress = Callable[[str, int, int], None]

_MEMORY = (
    "out of memory while training; lower micro_batch or length, or use gradient checkpointing (the result "
    "stays the same for micro_batch and checkpointing)."
)
_DISK_FULL = ("No space left", "file write failed", "unexpected pos")
"""What safetensors and torch say when a write fails."""

_STATE = "trainer_state.json"
"""What the Trainer writes last into a checkpoint."""


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters on every linear map of the blocks (LLM-Pruner's and LoRAPrune's defaults)."""

    rank: int = 8
    alpha: int = 16
    dropout: float = 0.05


@dataclass(frozen=True)
class Training:
    """How long and how a model is trained. Raises `UsageError` for sizes that make no sense.

    The defaults are LLM-Pruner's recovery: 600 steps of 64 sequences of 256 tokens, AdamW, 100 warm-up steps,
    then linearly to zero, no weight decay, gradients clipped at norm 1.
    """

    steps: int = 600
    batch_size: int = 64
    """Sequences an optimiser step, over all processes."""
    micro_batch: int = 4
    """Sequences a forward pass of one process; gradients are accumulated up to `batch_size`."""
    length: int = 256
    """Tokens a sequence."""
    learning_rate: float = 1e-4
    warmup_steps: int = 100
    weight_decay: float = 0.0
    clip: float = 1.0
    lora: Lora | None = field(default_factory=Lora)
    """None trains all weights."""
    evaluate_every: int = 100
    """Steps between two evaluations on held-out text, each followed by a checkpoint."""
    patience: int | None = None
    """Stop early after this many evaluations without a better one."""
    keep_best: bool = True
    """End with the checkpoint that was best on held-out text, not the last one."""
    gradient_checkpointing: bool = False
    """Recompute activations instead of keeping them: less memory, a third more time."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "micro_batch", "evaluate_every"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1.")
        if self.length < 2 or not self.learning_rate > 0 or self.warmup_steps < 0:
            raise UsageError("training needs sequences of at least 2 tokens and a positive learning rate.")
        if self.lora is not None and self.lora.rank < 1:
            raise UsageError("the rank of LoRA must be at least 1; to train all weights, leave LoRA out.")

    @property
    def tokens(self) -> int:
        """Tokens seen in all steps."""
        return self.steps * self.batch_size * self.length


@dataclass(frozen=True)
class Trained:
    """What a training run gave.

    Attributes:
        model: the trained model, adapters still beside the weights where LoRA was used.
        steps: optimiser steps done (fewer than asked where it stopped early).
        best_step: whose weights these are.
        held_out: loss on held-out text before and after, nats a token.
        seconds: of training, interruptions left out where it was resumed.
        peak_memory: bytes.
        history: the Trainer's log, one dictionary an entry.
    """

    model: PreTrainedModel | PeftModel
    steps: int
    best_step: int
    held_out: tuple[float, float]
    seconds: float
    peak_memory: int
    history: list[dict[str, float]]


def recover(
    model: PreTrainedModel,
    windows: torch.Tensor,
    held_out: torch.Tensor,
    training: Training,
    work: Path,
    *,
    callbacks: Sequence[TrainerCallback] = (),
    progress: Progress = lambda what, done, of: None,
) -> Trained:
    """Train `model` on windows of token ids, or go on with a run that was broken off.

    Under `torchrun` or `accelerate launch` every process calls this alike; gradients are averaged over all of
    them, and the first one writes.

    Args:
        model: a supported causal LM, nothing attached; trained in place.
        windows, held_out: LongTensor (count, length), from `data.training_windows` say.
        training: what to do.
        work: directory for checkpoints and TensorBoard logs; one of the same run is continued.
        callbacks: further Trainer callbacks.
        progress: called with (what, steps done, steps in all).

    Raises:
        UsageError: text too short for one step, a work directory of another run, out of memory.
        FloatingPointError: a loss that is NaN or infinite; the last checkpoint stays.
    """
    check_windows(model, windows)
    processes = PartialState().num_processes
    share = training.micro_batch * processes
    if training.batch_size % share:
        raise UsageError(
            f"a batch of {training.batch_size} sequences cannot be cut into {processes} processes of "
            f"{training.micro_batch}; make batch_size a multiple of {share}, or change micro_batch."
        )
    whole = len(windows) // training.batch_size * training.batch_size
    if not whole or not len(held_out):
        raise UsageError(
            f"the training text gives {len(windows)} sequences of {training.length} tokens and "
            f"{len(held_out)} held out, fewer than one step of {training.batch_size} needs; give more text, "
            "shorter sequences or a smaller batch."
        )
    checkpoint = _begin(work, model, windows, held_out, training)
    set_seed(training.seed)
    trained: Any = model.train().requires_grad_(training.lora is None)
    if training.lora is not None:
        with quiet_libraries():
            trained = get_peft_model(trained, lora_config(model, training.lora))
    if training.gradient_checkpointing:
        trained.enable_input_require_grads()
    device = next(model.parameters()).device
    seconds = _Seconds()
    with quiet_libraries():
        trainer = _Trainer(
            model=trained,
            args=_arguments(training, work, device, model.dtype, processes),
            train_dataset=_Windows(windows[:whole]),
            eval_dataset=_Windows(held_out),
            callbacks=[seconds, _LastStep(), _Report(progress, training.steps), *callbacks],
        )
        trainer.remove_callback(PrinterCallback)
        if PartialState().is_main_process:
            trainer.add_callback(TensorBoardCallback(SummaryWriter(str(work / "tensorboard"))))
        if training.patience is not None:
            trainer.add_callback(_Patience(training.patience))
        with PeakMemory(device) as memory, _explained(work):
            before = _before(work, trained, held_out, training.micro_batch)
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trained.eval()
    model.requires_grad_(False)
    log = trainer.state.log_history
    after = [entry["eval_loss"] for entry in log if "eval_loss" in entry][-1]
    best = None
    if training.keep_best and trainer.state.best_metric is not None:
        best, after = trainer.state.best_global_step, trainer.state.best_metric
    return Trained(
        model=trained,
        steps=trainer.state.global_step,
        best_step=best or trainer.state.global_step,
        held_out=(before, after),
        seconds=seconds.total,
        peak_memory=memory.bytes,
        history=[{k: v for k, v in entry.items() if isinstance(v, int | float)} for entry in log],
    )


def lora_config(model: PreTrainedModel, lora: Lora) -> LoraConfig:
    """PEFT's configuration for all linear maps of the model's blocks."""
    blocks = find_blocks(model)
    names = {m.name.rpartition(".")[2] for b in blocks for m in b.members}
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=sorted(names),
        bias="none",
        task_type="CAUSAL_LM",
    )


def merged(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The model with its adapters folded in. Raises `FloatingPointError` where that gives NaN."""
    if not isinstance(model, PeftModel):
        return model
    try:
        return model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise FloatingPointError(f"merging the adapter gives NaN ({error}).") from error


def base_model(model: Any) -> PreTrainedModel:
    """The causal LM itself, adapters acting inside it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def processes() -> int:
    """How many processes train together."""
    return int(PartialState().num_processes)


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return bool(PartialState().is_main_process)


@contextmanager
def one_writer() -> Iterator[bool]:
    """True in the process that writes; all leave together."""
    try:
        yield is_first()
    finally:
        PartialState().wait_for_everyone()


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


def _begin(
    work: Path, model: PreTrainedModel, windows: torch.Tensor, held_out: torch.Tensor, training: Training
) -> Path | None:
    """The checkpoint to go on from. Raises `UsageError` where the directory is of another run."""
    ours = {
        "training": asdict(training),
        "model": content_key(model, windows[:0]),
        "text": content_key(model, torch.cat([windows, held_out])),
    }
    file = work / "run.json"
    if not file.exists():
        if work.exists() and any(work.iterdir()):
            raise UsageError(
                f"{work} is not empty and holds no training run; choose another output directory."
            )
        PartialState().wait_for_everyone()  # all have looked before the first one writes
        if PartialState().is_main_process:
            work.mkdir(parents=True, exist_ok=True)
            _write_json(file, ours)
        PartialState().wait_for_everyone()
        return None
    theirs = json.loads(file.read_text(encoding="utf-8"))
    if theirs != ours:
        different = [k for k in ("model", "text") if theirs.get(k) != ours[k]]
        theirs_t, ours_t = theirs.get("training", {}), asdict(training)
        different += [
            f"{k} was {theirs_t.get(k)} and is now {v}" for k, v in ours_t.items() if theirs_t.get(k) != v
        ]
        raise UsageError(
            f"{work} holds a run that was begun differently ({'; '.join(different)}); go on as it was begun, "
            "choose another output directory, or delete it."
        )
    return last_checkpoint(work)


def _before(work: Path, model: Any, held_out: torch.Tensor, micro_batch: int) -> float:
    """Held-out loss before training; kept, since a resumed run can no longer measure it.

    Not by the Trainer: after `Trainer.evaluate` a later `train` does not wrap the model for several processes.
    """
    file = work / "before.json"
    if file.exists():
        return float(json.loads(file.read_text(encoding="utf-8")))
    model.eval()
    device = next(model.parameters()).device
    total = 0.0
    with torch.no_grad():
        for batch in held_out.split(micro_batch):
            ids = batch.to(device)
            total += float(model(input_ids=ids, labels=ids).loss) * len(ids)
    loss = total / len(held_out)
    if not math.isfinite(loss):
        raise FloatingPointError(
            "the held-out loss is NaN or infinite before training; use float32 or bfloat16, or check the model."
        )
    if is_first():
        _write_json(file, loss)
    return loss


def _write_json(file: Path, value: object) -> None:
    """Write and rename, so that a kill leaves all or nothing."""
    beside = file.with_suffix(".tmp")
    beside.write_text(json.dumps(value), encoding="utf-8")
    beside.replace(file)


@contextmanager
def _explained(work: Path) -> Iterator[None]:
    """Turn what the machine lacks into one sentence that says what to lower."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise UsageError(_MEMORY) from error
    except (RuntimeError, OSError, SafetensorError) as error:
        said = str(error)
        if "not enough memory" in said or "can't allocate memory" in said:
            raise UsageError(_MEMORY) from error
        if getattr(error, "errno", None) == errno.ENOSPC or any(w in said for w in _DISK_FULL):
            kept = last_checkpoint(work)
            raise UsageError(
                f"the disk is full while a checkpoint is written to {work}; free some space and start the "
                f"same command again, it goes on from {'the beginning' if kept is None else kept.name}."
            ) from error
        raise


def _arguments(
    training: Training, work: Path, device: torch.device, dtype: torch.dtype, processes: int
) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(work),
        max_steps=training.steps,
        per_device_train_batch_size=training.micro_batch,
        per_device_eval_batch_size=training.micro_batch,
        gradient_accumulation_steps=training.batch_size // (training.micro_batch * processes),
        learning_rate=training.learning_rate,
        warmup_steps=training.warmup_steps,
        lr_scheduler_type="linear",
        weight_decay=training.weight_decay,
        max_grad_norm=training.clip,
        gradient_checkpointing=training.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if training.gradient_checkpointing else None,
        fp16=dtype == torch.float16,
        use_cpu=device.type == "cpu",
        ddp_backend="gloo" if device.type == "cpu" and processes > 1 else None,
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
        report_to="none",  # the writer is ours: the Trainer's would log the first evaluation elsewhere
        seed=training.seed,
        data_seed=training.seed,
        dataloader_pin_memory=device.type == "cuda",
        remove_unused_columns=False,
        disable_tqdm=True,
    )


class _Windows(torch.utils.data.Dataset):
    """Windows as the Trainer reads them; every token but the first is a label."""

    def __init__(self, windows: torch.Tensor) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.windows[index], "labels": self.windows[index]}


class _Trainer(Trainer):
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


class _Report(TrainerCallback):
    """Steps and loss for the progress bar, in the first process."""

    def __init__(self, progress: Progress, steps: int) -> None:
        self.progress, self.steps = progress, steps
        self.loss = math.nan

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        self.loss = logs.get("loss", self.loss)
        if state.is_world_process_zero:
            self.progress(f"training, loss {self.loss:.3f}", state.global_step, self.steps)


class _LastStep(TrainerCallback):
    """The last step is evaluated and saved, whatever the interval."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_evaluate = control.should_save = True


class _Patience(EarlyStoppingCallback):
    """Early stopping that remembers its count over an interruption."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        earlier = state.stateful_callbacks.get(type(self).__name__)
        if earlier:
            self.early_stopping_patience_counter = earlier["attributes"]["early_stopping_patience_counter"]


class _Seconds(TrainerCallback, ExportableState):
    """Seconds spent in training; kept in checkpoints, so that a resumed run knows its earlier part."""

    def __init__(self, total: float = 0.0) -> None:
        self.total = total
        self._since = time.monotonic()

    def state(self) -> dict[str, Any]:
        return {"args": {"total": self.total}, "attributes": {}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        earlier = state.stateful_callbacks.get(type(self).__name__)
        if earlier:
            self.total = earlier["args"]["total"]
        self._since = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.monotonic()
        self.total += now - self._since
        self._since = now
