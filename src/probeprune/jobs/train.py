"""Train a model and write the result: measure, train, measure again, save with a model card."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from probeprune import processes
from probeprune.data.corpora import load_corpus
from probeprune.data.windows import Text, training_windows
from probeprune.files import stored_json, write_json
from probeprune.foreign.extras import extra
from probeprune.foreign.quiet import quiet_libraries
from probeprune.jobs.cards import training_card
from probeprune.jobs.measure import Measure
from probeprune.jobs.prune import rehearse
from probeprune.jobs.teachers import check_tokens
from probeprune.model.blocks import find_blocks
from probeprune.model.checkpoint import check_space, save
from probeprune.model.described import Layout
from probeprune.model.experts import find_parts
from probeprune.model.loading import LoadedModel, auto_class
from probeprune.model.making_records import TRAINING, check_pruning
from probeprune.places import check_free, check_place, claimed, discard, resolved, writing
from probeprune.progress import Progress, silent
from probeprune.provenance import dtype_name, versions
from probeprune.training.loraprune import LoraPruneCut, loraprune
from probeprune.training.recovery import (
    MEASURED,
    Trained,
    base_model,
    check_batch,
    check_in_memory,
    check_loss,
    merged,
    recover,
)
from probeprune.training.settings import Training, TrainingText

with extra("train"):
    from peft import PeftModel


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
    teacher: LoadedModel | None = None,
    merge: bool = False,
    pruning: dict[str, Any] | None = None,
    save_dtype: torch.dtype | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Train a loaded model and write the result; returns its record, as in training.json.

    Checkpoints lie in `<out>.training` until the result is written; the same call resumes from them, with the
    same result. With several processes, call this in each; the first one writes.

    Args:
        loaded: the model to train, changed in place.
        out: a new or empty directory. It becomes a PEFT adapter; with `merge` a checkpoint that holds the
            adapter in `adapter/`; a checkpoint if all weights were trained.
        job: the training, its text and its evaluation.
        teacher: the model that a distillation compares with, with the same tokenizer; see `jobs.teachers`.
            Agreement with it is measured beside perplexity.
        merge: merge the adapter into the weights.
        pruning: the record of an earlier pruning, as in pruning.json; copied into the record.
        save_dtype: dtype of the weights on disk; None leaves them as they are.

    Raises:
        UsageError: a `pruning` that is no such record, a folder that is not empty, cannot be written or is
            written by another process.
        UsageError, FloatingPointError: the errors of `training.recovery.recover` and `save`.
    """
    check_pruning(pruning)
    check_in_memory(loaded.model)
    check_batch(job.training)
    if teacher is not None:
        check_tokens(loaded, teacher)
    check_loss(loaded.model, job.training, None if teacher is None else teacher.model)
    with _held(out):
        return _recover_to(loaded, out, job, teacher, merge, pruning, save_dtype, progress)


def _recover_to(
    loaded: LoadedModel,
    out: Path,
    job: TrainingJob,
    teacher: LoadedModel | None,
    merge: bool,
    pruning: dict[str, Any] | None,
    save_dtype: torch.dtype | None,
    progress: Progress,
) -> dict[str, Any]:
    """As `recover_to`, in a folder that is ours."""
    measure = Measure(loaded, job.evaluation, progress, keep=_work(out) / MEASURED, reference=teacher)
    windows, held_out = windows_of(loaded, job)
    if processes.is_first():
        measure("before", loaded.model)
    trained = recover(
        loaded.model,
        windows,
        held_out,
        job.training,
        _work(out),
        teacher=None if teacher is None else teacher.model,
        progress=progress,
    )
    if processes.is_first():
        measure("after", base_model(trained.model))
    taught = {} if teacher is None else {"teacher": teacher.name}
    record = {**_training_record(loaded, job, trained, measure), **taught, "pruning": pruning}
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
    check_in_memory(loaded.model)
    check_batch(job.training)
    with _held(out):
        return _loraprune_to(loaded, out, cut, job, save_dtype, progress)


def _loraprune_to(
    loaded: LoadedModel,
    out: Path,
    cut: LoraPruneCut,
    job: TrainingJob,
    save_dtype: torch.dtype | None,
    progress: Progress,
) -> dict[str, Any]:
    """As `loraprune_to`, in a folder that is ours."""
    saved = rehearse(loaded.model, cut.method(loaded.model), cut.ratio, cut.layout)
    check_space(out, saved.num_parameters() * (save_dtype or loaded.dtype).itemsize)
    measure = Measure(loaded, job.evaluation, progress, keep=_work(out) / MEASURED)
    windows, held_out = windows_of(loaded, job)
    parameters = sum(p.numel() for p in loaded.model.parameters())
    units = {b.name: b.units for b in find_blocks(loaded.model)}
    prunable = sum(b.parameters for b in find_parts(loaded.model))
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
        "removed_share": 1 - sum(b.parameters for b in find_parts(model)) / prunable,
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


def check_output(out: Path) -> None:
    """Raise `UsageError` unless a run can write its result to `out`, and its checkpoints beside it.

    Deletes the checkpoints of a run whose result is in `out` already: a kill came before it could.
    """
    check_place(out)
    check_place(_work(out))
    discard_finished(out)
    check_free(out)


def discard_finished(out: Path) -> None:
    """Delete the checkpoints beside `out` if it holds the result of the very run that made them."""
    work = _work(out)
    record = stored_json(work / TRAINING)
    if record is not None and record == stored_json(out / TRAINING):
        discard(work)


@contextmanager
def _held(out: Path) -> Iterator[None]:
    """Hold `out` in the process that writes, and find it free; see `check_output`."""
    if not processes.is_first():
        yield
        return
    with claimed(out):
        discard_finished(out)
        check_free(out)
        yield


def _work(out: Path) -> Path:
    """The directory of a run in progress."""
    real = resolved(out)
    return real.with_name(f"{real.name}.training")


def windows_of(loaded: LoadedModel, job: TrainingJob) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows to train on and windows held out, LongTensors (count, length).

    Raises `UsageError` for a text that is not there or too short.
    """
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
        "loss": "text" if training.distillation is None else "distill",
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
    write_json(_work(out) / TRAINING, record)
    with writing(out) as folder:
        _save_adapter(loaded, model, folder)
        loaded.tokenizer.save_pretrained(folder)
        card = training_card(record, resolved(out).name, "adapter", _opens(loaded))
        (folder / "README.md").write_text(card, encoding="utf-8")
        _copy_log(_work(out), folder)
    discard(_work(out))


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
    write_json(_work(out) / TRAINING, record)

    def write_extra(folder: Path) -> None:
        if lora:
            shutil.copytree(adapter, folder / "adapter")
        _copy_log(_work(out), folder)

    whole = merged(model)
    if save_dtype is not None:
        whole.to(save_dtype)
    save(
        whole,
        out,
        tokenizer=loaded.tokenizer,
        layout=layout,
        card=training_card(record, resolved(out).name, "checkpoint", _opens(loaded)),
        write_extra=write_extra,
    )
    discard(_work(out))


def _opens(loaded: LoadedModel) -> str:
    """The class that a model card names."""
    return str(auto_class(loaded.model.config).__name__)


def _save_adapter(loaded: LoadedModel, model: PeftModel, folder: Path) -> None:
    model.peft_config["default"].base_model_name_or_path = loaded.name
    with quiet_libraries(bars=False):
        # Embeddings are never trained here; by default PEFT asks the hub whether they were resized.
        model.save_pretrained(str(folder), save_embedding_layers=False)


def _copy_log(work: Path, folder: Path) -> None:
    """Copy the record and the TensorBoard logs."""
    shutil.copyfile(work / TRAINING, folder / TRAINING)
    if (work / "tensorboard").is_dir():
        shutil.copytree(work / "tensorboard", folder / "tensorboard")
