"""Prune a model and train it towards the dense one, in one call: a checkpoint that is ready to use."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from probeprune import processes
from probeprune.errors import UsageError
from probeprune.jobs.prune import Output, Texts, prune_to
from probeprune.jobs.train import TrainingJob, check_output, recover_to, windows_of
from probeprune.methods import Method
from probeprune.model.loading import LoadedModel
from probeprune.model.making_records import read_pruning, read_training
from probeprune.places import check_free, discard, resolved
from probeprune.progress import Progress, silent
from probeprune.training.recovery import check_in_memory
from probeprune.training.settings import Distillation, Training, TrainingText


def prune_and_recover(
    name: str,
    method: Method,
    ratio: float,
    output: Output,
    texts: Texts,
    training: Training,
    text: TrainingText,
    open_model: Callable[[str], LoadedModel],
    *,
    steps: int = 1,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Prune a model, train it towards the dense model's predictions, and write the result.

    A run that was stopped goes on when started again: the pruned model lies in `<folder>.pruned` and the
    checkpoints of the training in `<folder>.training` until the result is written.

    Args:
        name: of the dense model.
        method, ratio, steps, texts: as in `prune_to`.
        output: the checkpoint to write; without a dtype, weights are written as they were stored.
        training, text: the training; without settings of a distillation it has the default ones.
        open_model: opens a model by its name; called for the dense model, for the pruned one, and for the
            dense one again, as the teacher.
        progress: called with (name of the work, parts done, parts in total).

    Returns:
        The record of the training, as in training.json, with that of the pruning in it.

    Raises:
        UsageError: what `prune_to` and `recover_to` refuse, several processes, a model whose layers are on
            disk, or an earlier run with other settings.
        FloatingPointError: NaN statistics, gradients or losses.
    """
    if processes.count() > 1:
        raise UsageError(
            "pruning and training in one go takes one process; start it without torchrun, or run `probeprune "
            "recover` on what `prune` writes."
        )
    discard_pruned(output.folder)
    check_output(output.folder)
    between = _between(output.folder)
    earlier = read_pruning(between) if between.is_dir() else None
    if training.distillation is None:
        training = replace(training, distillation=Distillation())
    job = TrainingJob(training, texts.evaluation, text)
    wanted = {"method": method.record(), "ratio": ratio, "seed": texts.seed, "layout": output.layout}
    if earlier is None:
        check_free(between)
        loaded = open_model(name)
        check_in_memory(loaded.model)
        windows_of(loaded, job)  # raises before the work what the training would raise
        pruned = Output(between, output.layout, output.dtype or loaded.stored_dtype)
        prune_to(loaded, method, ratio, pruned, texts, steps=steps, progress=progress)
        del loaded  # it has been cut
    elif {k: earlier.get(k) for k in wanted} != wanted or earlier.get("base_model") != name:
        raise UsageError(
            f"{between} holds the model of a run with other settings; go on as it was begun, choose another "
            "--out, or delete it."
        )
    student = open_model(str(between))
    record = recover_to(
        replace(student, name=name),  # its folder will be gone
        output.folder,
        job,
        teacher=open_model(name),
        merge=True,
        pruning=student.pruning,
        save_dtype=output.dtype or student.stored_dtype,
        progress=progress,
    )
    discard(between)
    return record


def discard_pruned(out: Path) -> None:
    """Delete the pruned model beside `out` if it holds the very model that was trained from it: a kill came
    before that could be done."""
    between = _between(out)
    if between.is_dir() and out.is_dir():
        earlier, done = read_pruning(between), read_training(out)
        if earlier is not None and done is not None and done.get("pruning") == earlier:
            discard(between)


def _between(out: Path) -> Path:
    """Where the pruned model lies until it is trained."""
    real = resolved(out)
    return real.with_name(f"{real.name}.pruned")
