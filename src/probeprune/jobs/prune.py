"""Prune a model and write the result: calibrate, prune, measure before and after, save with a model card."""

import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from probeprune import processes
from probeprune.calibration.gates import check_length, check_whole
from probeprune.data.windows import BATCH_SIZE, Text, WindowSource
from probeprune.engines.gguf_types import FileType, block_length, storage
from probeprune.engines.gguf_write import check_export, write_export
from probeprune.errors import UsageError
from probeprune.jobs.cards import pruning_card
from probeprune.jobs.measure import Measure
from probeprune.methods import Method, compose, without_measured_widths
from probeprune.model.blocks import find_blocks, find_layers
from probeprune.model.checkpoint import check_space, save
from probeprune.model.cost import PeakMemory
from probeprune.model.described import Layout, empty_like
from probeprune.model.described import export as export_model
from probeprune.model.experts import check_kinds
from probeprune.model.loading import LoadedModel, auto_class
from probeprune.model.machine import cache_dir, check_cache
from probeprune.model.offloading import cast, check_changes
from probeprune.places import check_file, check_free, claimed, resolved
from probeprune.plan import may_need, needs, needs_for, parts_of
from probeprune.preparation import DAMAGE_WINDOWS
from probeprune.processes import shares
from probeprune.progress import Progress, silent
from probeprune.provenance import dtype_name, versions
from probeprune.ranges import check_fields
from probeprune.surgery import Pruning, check_static, check_steps, prune


@dataclass(frozen=True)
class Texts:
    """The texts that a pruning job reads. Raises `UsageError` for values out of range."""

    calibration: Text
    """Windows to collect statistics on. Gradients are taken on windows of the same corpus; the method sets
    their number and length."""
    evaluation: Text
    """Windows to measure perplexity on, before and after; 0 windows measure nothing."""
    seed: int = 0
    """Draws the calibration windows."""
    batch_size: int = BATCH_SIZE
    """Windows per forward pass."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class Output:
    """The checkpoint that a pruning job writes."""

    folder: Path
    """A folder that does not exist or is empty."""
    layout: Layout
    """`uniform` needs a method that gives all layers one width (`methods.with_equal_widths`)."""
    dtype: torch.dtype | None = None
    """Dtype of the weights on disk; None for the dtype of the loaded model."""


@dataclass(frozen=True)
class GgufFile:
    """The file for llama.cpp that a pruning job writes in place of a checkpoint."""

    file: Path
    """It is replaced if it is there."""
    layout: Layout
    type: FileType = "f16"
    """How matrices are stored, see `export_gguf`."""


def prune_to(
    loaded: LoadedModel,
    method: Method,
    ratio: float,
    output: Output | GgufFile,
    texts: Texts,
    *,
    steps: int = 1,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Prune a loaded model and write the checkpoint or file; returns its record, as in pruning.json.

    With several processes, call this in each: they share the work out, and the first one writes.

    Args:
        loaded: the model to prune, changed in place.
        method, ratio, steps: as in `surgery.prune`.
        output: the checkpoint, or the GGUF file, to write.
        texts: what to calibrate on and to measure on.
        progress: called with (name of the work, parts done, parts in total).

    Raises:
        UsageError: any request that `prune`, `save` or `export_gguf` refuses, a place that cannot be written
            or a folder that another process writes; nothing has been written then.
        FloatingPointError: NaN statistics, gradients or losses.
    """
    processes.join(loaded.device.type)
    with shares.sharing(), ExitStack() as held:
        with shares.alike():
            if not processes.is_first():
                pass
            elif isinstance(output, GgufFile):
                check_file(output.file)
            else:
                held.enter_context(claimed(output.folder))
                check_free(output.folder)
        return _prune_to(loaded, method, ratio, output, texts, steps, progress)


def _prune_to(
    loaded: LoadedModel,
    method: Method,
    ratio: float,
    output: Output | GgufFile,
    texts: Texts,
    steps: int,
    progress: Progress,
) -> dict[str, Any]:
    """As `prune_to`, in a folder that is ours."""
    with shares.alike():
        shape = rehearse(loaded.model, method, ratio, output.layout, steps)
        check_changes(loaded.model, _changed(loaded.model, shape) * loaded.dtype.itemsize)
        if isinstance(output, GgufFile):
            _check_rows(output.type, loaded.model, method)
            export = check_export(shape, loaded.tokenizer, output.type, name=output.file.stem)
            check_space(output.file, export.plan.bytes)
        else:
            check_space(output.folder, shape.num_parameters() * (output.dtype or loaded.dtype).itemsize)
        measure = Measure(loaded, texts.evaluation, progress, texts.batch_size)
        source = calibration_source(loaded, method, texts.calibration, texts.seed)
    measure("dense", loaded.model)
    started = time.monotonic()
    with PeakMemory(loaded.device) as memory:
        done = prune(
            loaded.model,
            method,
            ratio,
            calibration=source,
            steps=steps,
            batch_size=texts.batch_size,
            cache=cache_dir() / "statistics",
            progress=progress,
        )
    seconds = time.monotonic() - started
    measure("pruned", loaded.model)
    record = {
        "base_model": loaded.name,
        **done.record(),
        "layout": output.layout,
        "seed": texts.seed,
        "calibration": _calibration_record(
            method, texts.calibration, any(k.kind == "experts" for k in done.kept)
        ),
        "evaluation": measure.record(),
        "seconds": round(seconds, 1),
        "peak_memory": memory.bytes,
        "dtype": dtype_name(loaded.dtype),
        "device": str(loaded.device),
        "versions": versions(),
    }
    with shares.alike():
        if not processes.is_first():
            pass
        elif isinstance(output, GgufFile):
            pruned = export_model(loaded.model, output.layout)
            export = check_export(pruned, loaded.tokenizer, output.type, name=output.file.stem)
            write_export(pruned, export, output.file, progress)
        else:
            opens = auto_class(loaded.model.config).__name__
            card = pruning_card(done, record, resolved(output.folder).name, opens)
            _write(loaded, output, card, record)
    return record


def _changed(model: Any, shape: Any) -> int:
    """The number of parameters of the layers that a cut to this shape changes, as they are then."""
    sizes = ([sum(p.numel() for p in layer.parameters()) for layer in find_layers(m)] for m in (model, shape))
    return sum(after for before, after in zip(*sizes, strict=True) if after != before)


def _check_rows(type: FileType, model: Any, method: Method) -> None:
    """Raise `UsageError` for widths that the blocks of a GGUF type need not divide: which widths come out is
    known only after the work."""
    length = block_length(storage(type).matrices)
    if length > 1 and "mlp" in method.blocks and method.allocation == "global":
        raise UsageError(
            f"type {type} stores {length} numbers of a row together, and allocation global gives MLPs any "
            "width; give another --allocation, such as uniform or damage, or choose type f16 or bf16."
        )
    if "mlp" in method.blocks and method.round_to % length:
        raise UsageError(
            f"type {type} stores {length} numbers of a row together, so MLP widths must be multiples of "
            f"{length}; give --round-to {length}, or choose type f16 or bf16."
        )
    head_dim = next(b.head_dim for b in find_blocks(model) if b.kind == "attention")
    if "attention" in method.blocks and head_dim % length:
        raise UsageError(
            f"type {type} stores {length} numbers of a row together, and heads of {head_dim} need not add up "
            "to a multiple; prune the MLPs alone (blocks mlp), or choose type f16 or bf16."
        )


def _write(loaded: LoadedModel, output: Output, card: str, record: dict[str, Any]) -> None:
    if output.dtype is not None:
        cast(loaded.model, output.dtype)
    save(
        loaded.model,
        output.folder,
        tokenizer=loaded.tokenizer,
        layout=output.layout,
        card=card,
        record=record,
    )


def rehearse(model: Any, method: Method, ratio: float, layout: Layout, steps: int = 1) -> PreTrainedModel:
    """Try a cut on a copy without weights, so that impossible requests fail before any work is done.

    Returns the copy as it would be saved (device `meta`). Raises the errors of `prune` and `export`.
    """
    return rehearsed(model, method, ratio, layout, steps)[1]


def rehearsed(
    model: Any, method: Method, ratio: float, layout: Layout, steps: int = 1
) -> tuple[Pruning, PreTrainedModel]:
    """As `rehearse`; the record of the cut too. Widths that have to be measured are those of an equal cut."""
    check_static(method)
    check_steps(method, steps)
    shape = empty_like(model)
    check_kinds(parts_of(shape, method), method.blocks)
    blocks = method.blocks
    if method.experts_stay is not None:  # they would leave by random numbers
        blocks = tuple(kind for kind in blocks if kind != "experts")
    drawn = compose(
        without_measured_widths(method),
        importance="random",
        expert_importance="random",
        gradients=None,
        gates=None,
        compensation="none",
        blocks=blocks,
    )
    done = prune(shape.eval(), drawn, ratio, steps=steps)
    if method.compensation.adds_bias:
        cut = {k.name for k in done.kept if len(k.units) < k.of}
        for block in find_blocks(shape):
            if block.name in cut and block.consumer.bias is None:
                block.consumer.bias = nn.Parameter(torch.empty(block.hidden_size, device="meta"))
    return done, export_model(shape, layout)


def calibration_source(loaded: LoadedModel, method: Method, text: Text, seed: int) -> WindowSource | None:
    """The windows that the method's statistics are collected on; None if it needs no statistics.

    Raises `UsageError` for no windows, a cache that cannot take the statistics, and gates of a model whose
    layers are offloaded.
    """
    if not needs_for(method, parts_of(loaded.model, method)):
        return None
    check_windows(method, text, loaded.model)
    if method.gate_settings is not None:
        check_whole(loaded.model)
    if shares.leads():
        check_cache()
    return text.source(loaded.tokenizer, seed)


def check_windows(method: Method, text: Text, model: nn.Module) -> None:
    """Raise `UsageError` for no windows where the method needs some for the model, or too short ones."""
    if text.windows < 1 and needs_for(method, parts_of(model, method)):
        raise UsageError(f"method {method.name!r} needs calibration; give at least one calibration window.")
    if gates := method.gate_settings:
        check_length(text.length, gates.length)


def _calibration_record(method: Method, text: Text, experts: bool) -> dict[str, Any] | None:
    """The number and length of windows behind each part of the statistics; None if there are no parts."""
    parts = may_need(method) if experts else needs(method)
    if method.gate_settings is not None:
        parts |= needs(method.start)
    if not parts:
        return None
    windows = {"moments": text.windows, "routed": text.windows, "damages": min(text.windows, DAMAGE_WINDOWS)}
    if method.refit is not None:
        windows["consumers"] = min(text.windows, method.refit.windows)
    record: dict[str, Any] = {"corpus": text.name}
    for part, count in windows.items():
        if part in parts:
            record[part] = {"windows": count, "length": text.length}
    if method.gate_settings is not None:
        gates = method.gate_settings
        record["gates"] = {"windows": gates.steps * gates.batch_size, "length": gates.length}
    if "saliences" in parts:
        gradients = method.gradient_settings
        record["saliences"] = {"windows": gradients.windows, "length": gradients.length}
    return record
