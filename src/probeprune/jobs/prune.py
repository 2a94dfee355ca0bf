"""From a model to a pruned checkpoint: calibrate, prune, measure before and after, save with a model card."""

import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from probeprune.data.corpora import load_corpus
from probeprune.data.windows import Text, WindowSource
from probeprune.errors import UsageError
from probeprune.jobs.cards import pruning_card
from probeprune.jobs.measure import Measure
from probeprune.methods import Method, compose, without_measured_widths
from probeprune.model.blocks import find_blocks
from probeprune.model.checkpoint import Layout, check_free, check_space, empty_model, export, save
from probeprune.model.cost import PeakMemory
from probeprune.model.loading import LoadedModel, cache_dir
from probeprune.plan import needs
from probeprune.preparation import DAMAGE_WINDOWS
from probeprune.progress import Progress, silent
from probeprune.provenance import dtype_name, versions
from probeprune.surgery import check_static, check_steps, prune


def prune_to(
    loaded: LoadedModel,
    method: Method,
    ratio: float,
    out: Path,
    *,
    layout: Layout,
    calibration: Text,
    evaluation: Text,
    steps: int = 1,
    batch_size: int = 16,
    seed: int = 0,
    save_dtype: torch.dtype | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Prune a loaded model and write the checkpoint; returns its record, as in pruning.json.

    Args:
        loaded: changed in place.
        method, ratio, steps, batch_size: as in `surgery.prune`.
        out: a directory that does not exist or is empty.
        layout: of the checkpoint; `uniform` needs a method that cuts all layers alike (`evenly`).
        calibration: windows for statistics. Methods with gradients take theirs from the same text, as many
            and as long as the method says.
        evaluation: perplexity before and after is measured on these and written on the card; 0 windows: not.
        seed: draws the calibration windows.
        save_dtype: of the weights on disk; None as they are.

    Raises:
        UsageError: whatever `prune` and `save` refuse; nothing has been written.
        FloatingPointError: NaN statistics, gradients or losses.
    """
    check_free(out)
    check_space(
        out, rehearse(loaded.model, method, ratio, layout, steps) * (save_dtype or loaded.dtype).itemsize
    )
    source = _calibration(loaded, method, calibration, seed)
    measure = Measure(loaded, evaluation, progress, batch_size)
    measure("dense", loaded.model)
    started = time.monotonic()
    with PeakMemory(loaded.device) as memory:
        done = prune(
            loaded.model,
            method,
            ratio,
            calibration=source,
            steps=steps,
            batch_size=batch_size,
            cache=cache_dir() / "statistics",
            progress=progress,
        )
    seconds = time.monotonic() - started
    measure("pruned", loaded.model)
    record = {
        "base_model": loaded.name,
        **done.record(),
        "layout": layout,
        "seed": seed,
        "calibration": _calibration_record(method, calibration),
        "evaluation": measure.record(),
        "seconds": round(seconds, 1),
        "peak_memory": memory.bytes,
        "dtype": dtype_name(loaded.dtype),
        "device": str(loaded.device),
        "versions": versions(),
    }
    if save_dtype is not None:
        loaded.model.to(save_dtype)
    save(
        loaded.model,
        out,
        tokenizer=loaded.tokenizer,
        layout=layout,
        card=pruning_card(done, record, out.name),
        record=record,
    )
    return record


def rehearse(model: Any, method: Method, ratio: float, layout: Layout, steps: int = 1) -> int:
    """Dry run on a weightless copy, so that impossible requests fail before any work is done.

    Returns the number of parameters that will be saved. Raises what `prune` and `export` raise.
    """
    check_static(method)
    check_steps(method, steps)
    shape = empty_model(model.config, model.dtype)
    drawn = compose(without_measured_widths(method), importance="random", gradients=None, compensation="none")
    done = prune(shape.eval(), drawn, ratio, steps=steps)
    if method.compensation.adds_bias:
        cut = {k.name for k in done.kept if len(k.units) < k.of}
        for block in find_blocks(shape):
            if block.name in cut and block.consumer.bias is None:
                block.consumer.bias = nn.Parameter(torch.empty(block.consumer.out_features, device="meta"))
    exported = export(shape, layout)
    return sum(p.numel() for p in exported.parameters())


def _calibration(loaded: LoadedModel, method: Method, text: Text, seed: int) -> WindowSource | None:
    """The text that the method's statistics are collected on; None for a method that needs none."""
    if not needs(method):
        return None
    if text.windows < 1:
        raise UsageError(f"method {method.name!r} needs calibration; give it at least one window.")
    return WindowSource(load_corpus(text.corpus), loaded.tokenizer, text.windows, text.length, seed)


def _calibration_record(method: Method, text: Text) -> dict[str, Any] | None:
    """For each part of the statistics, the number and length of the windows it was collected on."""
    parts = needs(method)
    if not parts:
        return None
    windows = {"moments": text.windows, "damages": min(text.windows, DAMAGE_WINDOWS)}
    if method.refit is not None:
        windows["consumers"] = min(text.windows, method.refit.windows)
    record: dict[str, Any] = {"corpus": text.corpus}
    for part, count in windows.items():
        if part in parts:
            record[part] = {"windows": count, "length": text.length}
    if "saliences" in parts:
        gradients = method.gradient_settings
        record["saliences"] = {"windows": gradients.windows, "length": gradients.length}
    return record
