"""Recovery: train a pruned model on text again, LoRA by PEFT, the loop by the transformers Trainer.

Defaults are LLM-Pruner's published recovery. A run that is killed at any point goes on from its last complete
checkpoint with the same result as an unbroken one. Knows nothing of how the model was pruned.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.tensorboard import SummaryWriter
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, set_seed
from transformers.integrations import TensorBoardCallback

from probeprune.errors import UsageError
from probeprune.files import write_json
from probeprune.model.blocks import find_blocks
from probeprune.model.cost import PeakMemory
from probeprune.model.passes import check_windows
from probeprune.progress import Progress, silent
from probeprune.provenance import model_fingerprint
from probeprune.quiet import quiet_libraries
from probeprune.training import processes
from probeprune.training.settings import Lora, Training
from probeprune.training.trainer import (
    CheckedTrainer,
    LastStep,
    Patience,
    Report,
    Seconds,
    Windows,
    explained,
    last_checkpoint,
    trainer_arguments,
)

MEASURED = "evaluation.json"
"""In a work directory: what was measured on the model before it was trained."""


@dataclass(frozen=True)
class Trained:
    """What a training run gave.

    Attributes:
        model: the trained model, adapters still beside the weights where LoRA was used.
        steps: optimiser steps done (fewer than asked where it stopped early).
        best_step: whose weights these are.
        epochs: how often the text was seen.
        held_out: loss on held-out text before and after, nats a token.
        seconds: of training, interruptions left out where it was resumed.
        peak_memory: bytes.
        history: the Trainer's log, one dictionary an entry.
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
    callbacks: Sequence[TrainerCallback] = (),
    progress: Progress = silent,
) -> Trained:
    """Train `model` on windows of token ids, or go on with a run that was broken off.

    Under `torchrun` or `accelerate launch` every process calls this alike; gradients are averaged over all of
    them, and the first one writes. A model in half precision computes in it, but what is trained (adapters,
    or all weights) is kept in float32 meanwhile: small steps would be lost to rounding.

    Args:
        model: a supported causal LM, nothing attached; trained in place.
        windows, held_out: LongTensor (count, length), from `data.training_windows` say.
        training: what to do.
        work: directory for checkpoints and TensorBoard logs; one of the same run is continued.
        callbacks: further Trainer callbacks.
        progress: called with (what, steps done, steps in all).

    Raises:
        UsageError: text too short for one step, a work directory of another run, out of memory, disk full.
        FloatingPointError: a loss that is NaN or infinite; the last checkpoint stays.
    """
    check_windows(model, windows)
    device = next(model.parameters()).device
    processes.join(device.type)
    whole = _check_fits(training, windows, held_out)
    checkpoint = _begin(work, model, windows, held_out, training)
    set_seed(training.seed)
    dtype = model.dtype
    trained: Any = model.train().requires_grad_(training.lora is None)
    if training.lora is None:
        model.float()
    else:
        with quiet_libraries():
            trained = get_peft_model(trained, lora_config(model, training.lora))
    if training.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    seconds = Seconds()
    with quiet_libraries():
        trainer = CheckedTrainer(
            model=trained,
            args=trainer_arguments(training, work, device, dtype),
            train_dataset=Windows(windows[:whole]),
            eval_dataset=Windows(held_out),
            callbacks=[seconds, LastStep(), Report(progress, training.steps), *callbacks],
        )
        trainer.remove_callback(PrinterCallback)
        if processes.is_first():
            # Ours: the Trainer's own would write beside the current directory.
            trainer.add_callback(TensorBoardCallback(SummaryWriter(str(work / "tensorboard"))))
        if training.patience is not None:
            trainer.add_callback(Patience(training.patience))
        with PeakMemory(device) as memory, explained(work):
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                before = _before(work, trained, held_out, training.micro_batch)
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trained.eval()
    model.requires_grad_(False)
    if training.gradient_checkpointing:
        model.gradient_checkpointing_disable()
    if training.lora is None:
        model.to(dtype)
    log = trainer.state.log_history
    after = [entry["eval_loss"] for entry in log if "eval_loss" in entry][-1]
    best = None
    if training.keep_best and trainer.state.best_metric is not None:
        best, after = trainer.state.best_global_step, trainer.state.best_metric
    return Trained(
        model=trained,
        steps=trainer.state.global_step,
        best_step=best or trainer.state.global_step,
        epochs=trainer.state.global_step * training.batch_size / whole,
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


def _check_fits(training: Training, windows: torch.Tensor, held_out: torch.Tensor) -> int:
    """How many windows make whole steps. Raises `UsageError` where they do not."""
    share = training.micro_batch * processes.count()
    if training.batch_size % share:
        raise UsageError(
            f"a batch of {training.batch_size} sequences cannot be cut into {processes.count()} processes of "
            f"{training.micro_batch}; make batch_size a multiple of {share}, or change micro_batch."
        )
    whole = len(windows) // training.batch_size * training.batch_size
    if not whole or not len(held_out):
        raise UsageError(
            f"the training text gives {len(windows)} sequences of {training.length} tokens and "
            f"{len(held_out)} held out, fewer than one step of {training.batch_size} needs; give more text, "
            "shorter sequences or a smaller batch."
        )
    return whole


def _begin(
    work: Path, model: PreTrainedModel, windows: torch.Tensor, held_out: torch.Tensor, training: Training
) -> Path | None:
    """The checkpoint to go on from. Raises `UsageError` where the directory is of another run."""
    ours = {
        "training": asdict(training),
        "model": model_fingerprint(model),
        "text": hashlib.blake2b(torch.cat([windows, held_out]).numpy().tobytes(), digest_size=16).hexdigest(),
    }
    file = work / "run.json"
    if not file.exists():
        if work.exists() and {f.name for f in work.iterdir()} - {MEASURED}:
            raise UsageError(
                f"{work} is not empty and holds no training run; choose another output directory."
            )
        processes.wait()  # all have looked before the first one writes
        if processes.is_first():
            work.mkdir(parents=True, exist_ok=True)
            write_json(file, ours)
        processes.wait()
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

    Not by the Trainer: after its `evaluate` a later `train` does not wrap the model for several processes.
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
            "the held-out loss is NaN or infinite before training; use float32 or bfloat16."
        )
    if processes.is_first():
        write_json(file, loss)
    return loss
