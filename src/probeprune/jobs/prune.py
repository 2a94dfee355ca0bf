"""From a model to a pruned checkpoint: calibrate, prune, measure before and after, save with a model card."""

import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from probeprune.data.corpora import load_corpus
from probeprune.data.windows import Text, calibration_windows
from probeprune.errors import UsageError
from probeprune.jobs.cards import pruning_card
from probeprune.jobs.measure import Measure
from probeprune.methods import Method, compose, without_measured_widths
from probeprune.model.blocks import find_blocks
from probeprune.model.checkpoint import Layout, check_free, check_space, empty_model, export, save
from probeprune.model.cost import PeakMemory
from probeprune.model.loading import LoadedModel, cache_dir
from probeprune.progress import Progress, silent
from probeprune.provenance import dtype_name, versions
from probeprune.surgery import DAMAGE_WINDOWS, check_static, check_steps, prune


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
    windows = _calibration(loaded, method, calibration, seed)
    measure = Measure(loaded, evaluation, progress, batch_size)
    measure("dense", loaded.model)
    started = time.monotonic()
    with PeakMemory(loaded.device) as memory:
        done = prune(
            loaded.model,
            method,
            ratio,
            calibration=windows,
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
    """Prune and export a model of the same shape without weights: what cannot be fails before the work.

    Returns the number of parameters that will be saved. Raises what `prune` and `export` raise.
    """
    check_static(method)
    check_steps(method, steps)
    shape = empty_model(model.config, model.dtype)
    drawn = compose(
        without_measured_widths(method), importance="random", gradients=None, compensation="none", refit=None
    )
    done = prune(shape.eval(), drawn, ratio, steps=steps)
    if method.compensation == "bias" or (method.refit is not None and method.refit.bias):
        cut = {k.name for k in done.kept if len(k.units) < k.of}
        for block in find_blocks(shape):
            if block.name in cut and block.consumer.bias is None:
                block.consumer.bias = nn.Parameter(torch.empty(block.consumer.out_features, device="meta"))
    exported = export(shape, layout)
    return sum(p.numel() for p in exported.parameters())


def _calibration(loaded: LoadedModel, method: Method, text: Text, seed: int) -> torch.Tensor | None:
    """Windows enough and long enough for all that the method needs."""
    counts, lengths = [], []
    if method.needs_moments or method.needs_refit or method.needs_damages:
        counts.append(text.windows)
        lengths.append(text.length)
    if method.gradients is not None:
        counts.append(method.gradients.windows)
        lengths.append(method.gradients.length)
    if not counts:
        return None
    if min(counts) < 1:
        raise UsageError(f"method {method.name!r} needs calibration; give it at least one window.")
    return calibration_windows(
        load_corpus(text.corpus), loaded.tokenizer, count=max(counts), length=max(lengths), seed=seed
    )


def _calibration_record(method: Method, text: Text) -> dict[str, Any] | None:
    if not method.needs_calibration:
        return None
    record: dict[str, Any] = {"corpus": text.corpus}
    if method.needs_moments:
        record["statistics"] = {"windows": text.windows, "length": text.length}
    if method.needs_damages:
        record["damages"] = {"windows": min(text.windows, DAMAGE_WINDOWS), "length": text.length}
    if method.needs_refit:
        assert method.refit is not None
        record["refit"] = {"windows": min(text.windows, method.refit.windows), "length": text.length}
    if method.gradients is not None:
        record["gradients"] = {"windows": method.gradients.windows, "length": method.gradients.length}
    return record
