"""Recovery: train a pruned model on text, or towards the dense model's predictions on it.

With LoRA from PEFT, and the loop of the transformers Trainer.

The defaults are LLM-Pruner's published recovery. A run that was killed resumes from its last complete
checkpoint, with the same result as an uninterrupted one. Knows nothing of how the model was pruned.
"""

import hashlib
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, set_seed
from transformers.integrations import TensorBoardCallback

from probeprune import processes
from probeprune.errors import UsageError
from probeprune.files import stored_json, write_json
from probeprune.foreign.extras import extra
from probeprune.foreign.quiet import quiet_libraries
from probeprune.model.blocks import find_blocks
from probeprune.model.cost import PeakMemory
from probeprune.model.identity import model_fingerprint
from probeprune.model.machine import freed_memory_kept
from probeprune.model.offloading import is_offloaded
from probeprune.model.passes import token_windows
from probeprune.places import clear
from probeprune.progress import Progress, silent
from probeprune.training.checkpoints import last_checkpoint, step_of
from probeprune.training.distilling import DistillLoss, check_teacher, say_unlike
from probeprune.training.losses import TokenLoss, text_loss, training_loss
from probeprune.training.settings import Lora, Training
from probeprune.training.trainer import (
    CheckedTrainer,
    FinalEvaluation,
    Patience,
    ReportProgress,
    TrainingTime,
    WindowDataset,
    explain_failures,
    trainer_arguments,
)

with extra("train"):
    from peft import LoraConfig, PeftModel, get_peft_model
    from torch.utils.tensorboard import SummaryWriter

MEASURED = "evaluation.json"
"""In a work directory: figures measured on the model before it was trained."""


@dataclass(frozen=True)
class Trained:
    """The result of a training run.

    Attributes:
        model: the trained model; with LoRA, a `PeftModel` with the adapters beside the weights.
        steps: optimiser steps done; fewer than requested after early stopping.
        best_step: the step whose weights these are.
        epochs: passes over the training text.
        held_out: loss on held-out text before and after training, in nats per token.
        seconds: training time, without the interruptions of a resumed run.
        peak_memory: bytes.
        history: losses and learning rates of all steps, one dictionary per entry of the Trainer's log.
    """

    model: PreTrainedModel | PeftModel
    steps: int
    best_step: int
    epochs: float
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
    teacher: PreTrainedModel | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    progress: Progress = silent,
) -> Trained:
    """Train `model` on windows of token ids, or resume an interrupted run.

    Under `torchrun` or `accelerate launch`, call this in every process: gradients are averaged over all of
    them, and the first one writes. A model in half precision computes in it, but the trained parameters
    (adapters, or all weights) are float32 during training, since rounding would lose small steps.

    Args:
        model: a supported causal LM without an attached method; trained in place.
        windows, held_out: LongTensor (count, length) to train on and to evaluate on.
        training: the settings.
        work: directory for checkpoints and TensorBoard logs; if it holds a run with the same settings, model
            teacher and text, that run is resumed.
        teacher: the model whose predictions `training.distillation` compares with: with the same tokens, in
            eval mode, on the same device. It is left as it is.
        callbacks: further Trainer callbacks.
        progress: called with (label, steps done, steps in all).

    Raises:
        UsageError: a model or teacher whose layers are offloaded, a teacher without `training.distillation`
            or the reverse, or with another vocabulary, text too short for one step, a work directory of
            another run, out of memory, disk full. A `Notice` says checkpoints that are damaged, which are
            passed over, and a teacher of another family or hidden size.
        FloatingPointError: the loss is NaN or infinite; the last checkpoint stays.
    """
    check_in_memory(model)
    windows = token_windows(model, windows)
    device, dtype = next(model.parameters()).device, model.dtype
    processes.join(device.type)
    check_loss(model, training, teacher)
    loss: TokenLoss = text_loss
    if teacher is not None and training.distillation is not None:
        token_windows(teacher, windows)
        say_unlike(model, teacher)
        loss = DistillLoss(teacher, training.distillation)
    used = _whole_steps(training, windows, held_out)
    of = {"model": model_fingerprint(model), "text": _text_hash(windows, held_out)}
    if teacher is not None:
        of["teacher"] = model_fingerprint(teacher)
    checkpoint = _open_work(work, training, of)
    set_seed(training.seed)
    time = TrainingTime()
    events = [time, FinalEvaluation(), ReportProgress(progress, training.steps), *callbacks]
    with quiet_libraries(bars=False), _trainable(model, training) as trained, training_loss(model, loss):
        trainer = CheckedTrainer(
            model=trained,
            args=trainer_arguments(training, work, device, dtype),
            train_dataset=WindowDataset(used),
            eval_dataset=WindowDataset(held_out),
            callbacks=events,
        )
        _add_own_callbacks(trainer, training, work)
        with PeakMemory(device) as memory, explain_failures(work), freed_memory_kept():
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                before = _initial_loss(work, trained, held_out, training.micro_batch)
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    epochs = trainer.state.global_step * training.batch_size / len(used)
    return _result(trained, trainer.state, training.keep_best, before, epochs, time.total, memory.bytes)


def check_loss(model: PreTrainedModel, training: Training, teacher: PreTrainedModel | None) -> None:
    """Raise `UsageError` where a distillation lacks its teacher or its settings, or where they do not fit the
    model; see `check_teacher`."""
    if (teacher is None) != (training.distillation is None):
        missing = "a teacher: give teacher=" if teacher is None else "settings: give distillation="
        raise UsageError(f"distillation needs {missing}, or train on the text without either.")
    if teacher is not None:
        check_in_memory(teacher, "a teacher")
        check_teacher(model, teacher)


def check_in_memory(model: nn.Module, what: str = "training") -> None:
    """Raise `UsageError` for a model whose layers are offloaded; `what` begins the sentence."""
    if is_offloaded(model):
        raise UsageError(
            f"{what} needs all weights in memory, and some layers of this model are offloaded; take a device "
            "with more memory, or a smaller dtype such as bfloat16."
        )


def _result(
    trained: Any, state: Any, keep_best: bool, before: float, epochs: float, seconds: float, peak_memory: int
) -> Trained:
    """The record of a run that has ended; `state` is the Trainer's."""
    log = state.log_history
    best_step, after = state.global_step, [e["eval_loss"] for e in log if "eval_loss" in e][-1]
    if keep_best and state.best_metric is not None:
        best_step, after = state.best_global_step or state.global_step, state.best_metric
    return Trained(
        model=trained,
        steps=state.global_step,
        best_step=best_step,
        epochs=epochs,
        held_out=(before, after),
        seconds=seconds,
        peak_memory=peak_memory,
        history=[_untimed(entry) for entry in log if "loss" in entry or "eval_loss" in entry],
    )


def _untimed(entry: dict[str, Any]) -> dict[str, float]:
    """The numbers of an entry in the Trainer's log that do not depend on the machine's speed."""
    timed = ("_runtime", "_per_second")
    return {k: v for k, v in entry.items() if isinstance(v, int | float) and not k.endswith(timed)}


def lora_config(model: PreTrainedModel, lora: Lora) -> LoraConfig:
    """PEFT's configuration for all linear maps of the model's blocks."""
    blocks = find_blocks(model)
    paths = {m.name for b in blocks for m in b.members}
    names = {path.rpartition(".")[2] for path in paths}
    if any(n not in paths and n.rpartition(".")[2] in names for n, _ in model.named_modules()):
        names = paths  # other maps, as those of a vision tower, are called alike
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=sorted(names),
        bias="none",
        task_type="CAUSAL_LM",
    )


def merged(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The model with its adapters merged into the weights. Raises `FloatingPointError` if that gives NaN."""
    if not isinstance(model, PeftModel):
        return model
    try:
        return model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise FloatingPointError(f"merging the adapter gives NaN ({error}).") from error


def base_model(model: Any) -> PreTrainedModel:
    """The causal LM inside a `PeftModel`, or the model itself; adapters stay active."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


@contextmanager
def _trainable(model: PreTrainedModel, training: Training) -> Iterator[Any]:
    """The model ready to train while the context lasts; then frozen, in its own dtype, with its adapters.

    Yields the model itself with its trained weights in float32, or with LoRA the `PeftModel` around it.
    """
    dtype, lora = model.dtype, training.lora
    model.train().requires_grad_(False)
    trained: Any = model if lora is None else get_peft_model(model, lora_config(model, lora))
    if lora is None:
        whole = training.weights == "all"
        for part in [model] if whole else [block.consumer for block in find_blocks(model)]:
            part.float().requires_grad_(True)
    try:
        with _gradient_checkpointing(model) if training.gradient_checkpointing else nullcontext():
            yield trained
    finally:
        trained.eval()
        model.requires_grad_(False)
        if lora is None:  # under LoRA the weights kept their dtype, and the adapters stay in float32
            model.to(dtype)


@contextmanager
def _gradient_checkpointing(model: PreTrainedModel) -> Iterator[None]:
    """Recompute activations in the backward pass while the context lasts."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()


def _add_own_callbacks(trainer: CheckedTrainer, training: Training, work: Path) -> None:
    """Log to TensorBoard instead of printing, and stop early if `training` has a patience."""
    trainer.remove_callback(PrinterCallback)
    if processes.is_first():
        # With a writer of our own: the Trainer's default writes beside the current directory.
        trainer.add_callback(TensorBoardCallback(SummaryWriter(str(work / "tensorboard"))))
    if training.patience is not None:
        trainer.add_callback(Patience(training.patience))


def check_batch(training: Training) -> None:
    """Raise `UsageError` for a batch that the processes cannot share out in micro-batches."""
    unit = training.micro_batch * processes.count()
    if training.batch_size % unit:
        raise UsageError(
            f"a batch of {training.batch_size} sequences cannot be shared out over {processes.count()} "
            f"process(es) in micro-batches of {training.micro_batch}; make batch_size a multiple of {unit}, "
            "or change micro_batch."
        )


def _whole_steps(training: Training, windows: torch.Tensor, held_out: torch.Tensor) -> torch.Tensor:
    """The windows that fill whole optimiser steps. Raises `UsageError` for sizes that do not fit."""
    check_batch(training)
    count = len(windows) // training.batch_size * training.batch_size
    if not count or not len(held_out):
        raise UsageError(
            f"the training text gives {len(windows)} sequences of {training.length} tokens and "
            f"{len(held_out)} held out, fewer than one step of {training.batch_size} needs; give more text, "
            "shorter sequences or a smaller batch."
        )
    return windows[:count]


def _text_hash(windows: torch.Tensor, held_out: torch.Tensor) -> str:
    return hashlib.blake2b(torch.cat([windows, held_out]).numpy().tobytes(), digest_size=16).hexdigest()


def _open_work(work: Path, training: Training, of: dict[str, str]) -> Path | None:
    """Begin a run in the directory, or find the checkpoint to resume from; None to start at the beginning.

    Args:
        work: the directory.
        training: the settings.
        of: hashes of what is trained, on what.

    Raises `UsageError` if the directory holds another run, or files that belong to no run.
    """
    run = {"training": asdict(training), **of}
    file = work / "run.json"
    if file.exists():
        _check_same_run(work, stored_json(file), run)
        return _resumed(work, training.keep_best)
    if work.exists():
        clear(work)
    if work.exists() and {f.name for f in work.iterdir()} - {MEASURED}:
        raise UsageError(f"{work} is not empty and holds no training run; choose another output directory.")
    processes.wait()  # until every process has looked: the first one writes next
    if processes.is_first():
        work.mkdir(parents=True, exist_ok=True)
        write_json(file, run)
    processes.wait()
    return None


def _resumed(work: Path, keep_best: bool) -> Path | None:
    """The checkpoint to resume from, or None; deletes newer ones, which are incomplete or damaged."""
    checkpoint = last_checkpoint(work, keep_best)
    processes.wait()  # until every process has looked
    if processes.is_first():
        done = -1 if checkpoint is None else step_of(checkpoint)
        for folder in work.glob("checkpoint-*"):
            if step_of(folder) > done:
                shutil.rmtree(folder)
    processes.wait()
    return checkpoint


def _check_same_run(work: Path, earlier: Any, run: dict[str, Any]) -> None:
    """Raise `UsageError` with the differences between the run in the directory and this one."""
    if not isinstance(earlier, dict) or not isinstance(earlier.get("training"), dict):
        raise UsageError(f"{work / 'run.json'} cannot be read; delete {work} to start over.")
    differences = [k for k in ("model", "text", "teacher") if earlier.get(k) != run.get(k)]
    # A setting that an earlier release did not have was what it is by default.
    settings = {k: earlier["training"].get(k, getattr(Training, k, None)) for k in run["training"]}
    differences += [
        f"{k} was {settings[k]} and is now {v}" for k, v in run["training"].items() if settings[k] != v
    ]
    if not differences:
        return
    raise UsageError(
        f"{work} holds a run that was begun differently ({'; '.join(differences)}); go on as it was begun, "
        "choose another output directory, or delete it."
    )


def _initial_loss(work: Path, model: Any, held_out: torch.Tensor, micro_batch: int) -> float:
    """Held-out loss before training; stored in the directory, because a resumed run cannot measure it.

    Not measured by the Trainer: after its `evaluate`, `train` does not wrap the model for several processes.
    """
    file = work / "before.json"
    stored = stored_json(file)
    if isinstance(stored, float):
        return stored
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
            "the held-out loss is NaN or infinite before training; use float32 or bfloat16."
        )
    if processes.is_first():
        write_json(file, loss)
    return loss
