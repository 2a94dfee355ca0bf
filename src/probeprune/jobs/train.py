"""Train a model and write the result: measure, train, measure again, save with a model card."""

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from probeprune.data.corpora import load_corpus
from probeprune.data.windows import Text, training_windows
from probeprune.files import writing
from probeprune.jobs.cards import training_card
from probeprune.jobs.measure import Measure
from probeprune.jobs.prune import rehearse
from probeprune.model.blocks import find_blocks
from probeprune.model.checkpoint import check_free, check_space, save
from probeprune.model.described import Layout
from probeprune.model.loading import LoadedModel
from probeprune.progress import Progress, silent
from probeprune.provenance import dtype_name, versions
from probeprune.quiet import quiet_libraries
from probeprune.training import processes
from probeprune.training.loraprune import LoraPruneCut, loraprune
from probeprune.training.recovery import MEASURED, Trained, base_model, merged, recover
from probeprune.training.settings import Training, TrainingText


@dataclass(frozen=True)
class TrainingJob:
    """How to train, on which text, and where to measure perplexity before and after."""

    training: Training
    evaluation: Text
    """Perplexity is measured on these windows; 0 windows measure nothing."""
    text: TrainingText = field(default_factory=TrainingText)


def recover_to(
    loaded: LoadedModel,
    out: Path,
    job: TrainingJob,
    *,
    merge: bool = False,
    pruning: dict[str, Any] | None = None,
    save_dtype: torch.dtype | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Train a loaded model and write the result; returns its record, as in training.json.

    Checkpoints lie in `<out>.training` until the result is written; the same call resumes from them. With
    several processes, call this in each; the first one writes.

    Args:
        loaded: the model to train, changed in place.
        out: a new or empty directory. It becomes a PEFT adapter; with `merge` a checkpoint that holds the
            adapter in `adapter/`; a checkpoint if all weights were trained.
        job: the training, its text and its evaluation.
        merge: merge the adapter into the weights.
        pruning: the record of an earlier pruning, as in pruning.json; copied into the record.
        save_dtype: dtype of the weights on disk; None leaves them as they are.

    Raises:
        UsageError, FloatingPointError: the errors of `training.recovery.recover` and `save`.
    """
    check_free(out)
    measure = Measure(loaded, job.evaluation, progress, keep=_work(out) / MEASURED)
    windows, held_out = _windows(loaded, job)
    if processes.is_first():
        measure("before", loaded.model)
    trained = recover(loaded.model, windows, held_out, job.training, _work(out), progress=progress)
    if processes.is_first():
        measure("after", base_model(trained.model))
    record = {**_training_record(loaded, job, trained, measure), "pruning": pruning}
    with processes.one_writer() as first:
        if first and isinstance(trained.model, PeftModel) and not merge:
            _write_adapter(loaded, out, trained.model, record)
        elif first:
            _write_checkpoint(loaded, out, trained.model, record, save_dtype)
    return record


def loraprune_to(
    loaded: LoadedModel,
    out: Path,
    cut: LoraPruneCut,
    job: TrainingJob,
    *,
    save_dtype: torch.dtype | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Prune a loaded model while LoRA trains it and write the merged checkpoint, in the layout of the cut.

    See `recover_to` for the other arguments, and `training.loraprune.loraprune` for the errors.
    """
    check_free(out)
    saved = rehearse(loaded.model, cut.method(loaded.model), cut.ratio, cut.layout)
    check_space(out, saved * (save_dtype or loaded.dtype).itemsize)
    measure = Measure(loaded, job.evaluation, progress, keep=_work(out) / MEASURED)
    windows, held_out = _windows(loaded, job)
    parameters = sum(p.numel() for p in loaded.model.parameters())
    units = {b.name: b.units for b in find_blocks(loaded.model)}
    prunable = sum(b.parameters for b in find_blocks(loaded.model))
    if processes.is_first():
        measure("before", loaded.model)
    model, trained, kept = loraprune(
        loaded.model, windows, held_out, cut, job.training, _work(out), progress=progress
    )
    if processes.is_first():
        measure("after", model)
    record = {
        **_training_record(loaded, job, trained, measure),
        "method": "loraprune, while training",
        "ratio": cut.ratio,
        "removed_share": 1 - sum(b.parameters for b in find_blocks(model)) / prunable,
        "parameters": [parameters, sum(p.numel() for p in model.parameters())],
        "layout": cut.layout,
        "kept": {
            name: {"units": kept[name].tolist() if name in kept else list(range(count)), "of": count}
            for name, count in units.items()
        },
    }
    with processes.one_writer() as first:
        if first:
            _write_checkpoint(loaded, out, model, record, save_dtype, cut.layout)
    return record


def _work(out: Path) -> Path:
    """The directory of a run in progress."""
    return out.with_name(f"{out.name}.training")


def _windows(loaded: LoadedModel, job: TrainingJob) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows to train on and windows held out, LongTensors (count, length)."""
    training, text = job.training, job.text
    windows, held_out = training_windows(
        load_corpus(text.corpus),
        loaded.tokenizer,
        length=training.length,
        packing=text.packing,
        seed=training.seed,
    )
    return windows, held_out[: training.evaluate_windows]


def _training_record(
    loaded: LoadedModel, job: TrainingJob, trained: Trained, measure: Measure
) -> dict[str, Any]:
    training = job.training
    return {
        "base_model": loaded.name,
        "training": asdict(training),
        "corpus": job.text.corpus,
        "packing": job.text.packing,
        "steps": trained.steps,
        "best_step": trained.best_step,
        "epochs": trained.epochs,
        "tokens": trained.steps * training.batch_size * training.length,
        "held_out_loss": list(trained.held_out),
        "evaluation": measure.record(),
        "seconds": round(trained.seconds, 1),
        "peak_memory": trained.peak_memory,
        "processes": processes.count(),
        "dtype": dtype_name(loaded.dtype),
        "device": str(loaded.device),
        "versions": versions("peft"),
        "history": trained.history,
    }


def _write_adapter(loaded: LoadedModel, out: Path, model: PeftModel, record: dict[str, Any]) -> None:
    """Write the adapter alone, and delete the work directory."""
    with writing(out) as folder:
        _save_adapter(loaded, model, folder)
        loaded.tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(training_card(record, out.name, "adapter"), encoding="utf-8")
        _write_log(folder, _work(out), record)
    shutil.rmtree(_work(out), ignore_errors=True)


def _write_checkpoint(
    loaded: LoadedModel,
    out: Path,
    model: PreTrainedModel | PeftModel,
    record: dict[str, Any],
    save_dtype: torch.dtype | None,
    layout: Layout | None = None,
) -> None:
    """Write a checkpoint, the adapter merged and also beside it; delete the work directory."""
    adapter = _work(out) / "adapter"
    lora = isinstance(model, PeftModel)
    if isinstance(model, PeftModel):  # before the merge, which takes the adapter apart
        _save_adapter(loaded, model, adapter)

    def write_extra(folder: Path) -> None:
        if lora:
            shutil.copytree(adapter, folder / "adapter")
        _write_log(folder, _work(out), record)

    whole = merged(model)
    if save_dtype is not None:
        whole.to(save_dtype)
    save(
        whole,
        out,
        tokenizer=loaded.tokenizer,
        layout=layout,
        card=training_card(record, out.name, "checkpoint"),
        write_extra=write_extra,
    )
    shutil.rmtree(_work(out), ignore_errors=True)


def _save_adapter(loaded: LoadedModel, model: PeftModel, folder: Path) -> None:
    model.peft_config["default"].base_model_name_or_path = loaded.name
    with quiet_libraries(bars=False):
        # Embeddings are never trained here; by default PEFT asks the hub whether they were resized.
        model.save_pretrained(str(folder), save_embedding_layers=False)


def _write_log(folder: Path, work: Path, record: dict[str, Any]) -> None:
    """Write the record and the TensorBoard logs."""
    (folder / "training.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
    if (work / "tensorboard").is_dir():
        shutil.copytree(work / "tensorboard", folder / "tensorboard")
