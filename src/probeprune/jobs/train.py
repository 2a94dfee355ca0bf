"""From a model and a text to a trained checkpoint: measure, train, measure, save with a model card."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel

from probeprune.data.corpora import load_corpus
from probeprune.data.windows import Text, training_windows
from probeprune.files import writing
from probeprune.jobs.cards import training_card
from probeprune.jobs.measure import Measure
from probeprune.jobs.prune import rehearse
from probeprune.model.blocks import find_blocks
from probeprune.model.checkpoint import Layout, check_free, check_space, save
from probeprune.model.loading import LoadedModel
from probeprune.progress import Progress, silent
from probeprune.provenance import dtype_name, versions
from probeprune.quiet import quiet_libraries
from probeprune.training import processes
from probeprune.training.loraprune import loraprune, loraprune_method
from probeprune.training.recovery import MEASURED, Trained, base_model, merged, recover
from probeprune.training.settings import Training


def recover_to(
    loaded: LoadedModel,
    out: Path,
    training: Training,
    *,
    corpus: str,
    packing: bool = False,
    evaluation: Text,
    merge: bool = False,
    pruning: dict[str, Any] | None = None,
    save_dtype: torch.dtype | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Train a loaded model and write the result; returns its record, as in training.json.

    Work in progress lies in `<out>.training` until it is done; the same call goes on from there. With several
    processes all call this alike and the first one writes.

    Args:
        loaded: changed in place.
        out: a directory that does not exist or is empty. It becomes a PEFT adapter; with `merge` a checkpoint
            that holds the adapter in `adapter/`; a checkpoint when all weights were trained.
        training: what to do.
        corpus: text to train on: an embedded name, a file or a hub id.
        packing: put documents one after the other instead of cutting one sequence out of each.
        evaluation: perplexity before and after is measured on these; 0 windows: not.
        merge: fold the adapter into the weights.
        pruning: what was done to the model before, as in pruning.json; kept in the record.
        save_dtype: of the weights on disk; None as they are.

    Raises:
        UsageError, FloatingPointError: what `training.recover` and `save` raise.
    """
    check_free(out)
    measure = Measure(loaded, evaluation, progress, keep=_work(out) / MEASURED)
    text = _training_text(loaded, corpus, packing, training)
    if processes.is_first():
        measure("before", loaded.model)
    trained = recover(loaded.model, *text, training, _work(out), progress=progress)
    model = trained.model
    if processes.is_first():
        measure("after", base_model(model))
    record = {
        **_training_record(loaded, corpus, packing, training, trained, measure),
        "pruning": pruning,
    }
    with processes.one_writer() as first:
        if first:
            _write_trained(loaded, out, model, merge, record, save_dtype)
    return record


def loraprune_to(
    loaded: LoadedModel,
    ratio: float,
    out: Path,
    training: Training,
    *,
    layout: Layout,
    round_to: int = 1,
    skip_layers: int | None = None,
    corpus: str,
    packing: bool = False,
    evaluation: Text,
    save_dtype: torch.dtype | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Prune a loaded model while it trains and write the checkpoint; see `recover_to` and `loraprune`."""
    check_free(out)
    allocation: Literal["even", "uniform"] = "even" if layout == "uniform" else "uniform"
    method = loraprune_method(loaded.model, allocation, skip_layers, round_to)
    size = rehearse(loaded.model, method, ratio, layout) * (save_dtype or loaded.dtype).itemsize
    check_space(out, size)
    measure = Measure(loaded, evaluation, progress, keep=_work(out) / MEASURED)
    text = _training_text(loaded, corpus, packing, training)
    before = sum(p.numel() for p in loaded.model.parameters())
    blocks = {b.name: (b.units, b.parameters) for b in find_blocks(loaded.model)}
    if processes.is_first():
        measure("before", loaded.model)
    model, trained, kept = loraprune(
        loaded.model,
        *text,
        ratio,
        training,
        _work(out),
        skip_layers=skip_layers,
        round_to=round_to,
        allocation=allocation,
        progress=progress,
    )
    if processes.is_first():
        measure("after", model)
    left = sum(b.parameters for b in find_blocks(model))
    record = {
        **_training_record(loaded, corpus, packing, training, trained, measure),
        "method": "loraprune, while training",
        "ratio": ratio,
        "removed_share": 1 - left / sum(p for _, p in blocks.values()),
        "parameters": [before, sum(p.numel() for p in model.parameters())],
        "layout": layout,
        "kept": {
            name: {"units": kept[name].tolist() if name in kept else list(range(units)), "of": units}
            for name, (units, _) in blocks.items()
        },
    }
    with processes.one_writer() as first:
        if first:
            _write_trained(loaded, out, model, True, record, save_dtype, layout)
    return record


def _work(out: Path) -> Path:
    return out.with_name(f"{out.name}.training")


def _training_text(
    loaded: LoadedModel, corpus: str, packing: bool, training: Training
) -> tuple[torch.Tensor, torch.Tensor]:
    windows, held_out = training_windows(
        load_corpus(corpus), loaded.tokenizer, length=training.length, packing=packing, seed=training.seed
    )
    return windows, held_out[: training.evaluate_windows]


def _training_record(
    loaded: LoadedModel,
    corpus: str,
    packing: bool,
    training: Training,
    trained: Trained,
    measure: Measure,
) -> dict[str, Any]:
    return {
        "base_model": loaded.name,
        "training": asdict(training),
        "corpus": corpus,
        "packing": packing,
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


def _write_trained(
    loaded: LoadedModel,
    out: Path,
    model: Any,
    merge: bool,
    record: dict[str, Any],
    save_dtype: torch.dtype | None,
    layout: Layout | None = None,
) -> None:
    """An adapter, or a checkpoint with the adapter folded in; then the work in progress goes."""
    adapter = isinstance(model, PeftModel)
    if adapter and not merge:
        with writing(out) as folder:
            model.peft_config["default"].base_model_name_or_path = loaded.name
            _save_adapter(model, folder)
            loaded.tokenizer.save_pretrained(folder)
            (folder / "README.md").write_text(training_card(record, out.name, "adapter"), encoding="utf-8")
            _write_log(folder, _work(out), record)
    else:
        beside = _work(out) / "adapter"
        if adapter:
            model.peft_config["default"].base_model_name_or_path = loaded.name
            _save_adapter(model, beside)

        def also(folder: Path) -> None:
            if adapter:
                shutil.copytree(beside, folder / "adapter")
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
            write_extra=also,
        )
    shutil.rmtree(_work(out), ignore_errors=True)


def _save_adapter(model: PeftModel, folder: Path) -> None:
    with quiet_libraries(bars=False):
        # Embeddings are never trained here; left to itself PEFT asks the hub whether they were resized.
        model.save_pretrained(str(folder), save_embedding_layers=False)


def _write_log(folder: Path, work: Path, record: dict[str, Any]) -> None:
    (folder / "training.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
    if (work / "tensorboard").is_dir():
        shutil.copytree(work / "tensorboard", folder / "tensorboard")
