"""Measure one cell: a prepared model on a text, a task or its cost, as one line of results."""

import torch

from probeprune.data.corpora import load_corpus
from probeprune.data.windows import evaluation_windows
from probeprune.evaluation.perplexity import perplexity, scored_windows
from probeprune.evaluation.predictions import TOP_K, Comparison, Predictions
from probeprune.evaluation.tasks import evaluate_task
from probeprune.experiment.cells import Cell, CostMeasure, TaskMeasure, TextMeasure, dense_subject
from probeprune.experiment.costing import cost_line
from probeprune.experiment.reference import dense_predictions, keep_predictions, recorder
from probeprune.experiment.workbench import Ready, Workbench, preparing
from probeprune.model.cost import PeakMemory, blocks_flops
from probeprune.model.loading import LoadedModel
from probeprune.model.passes import is_followed
from probeprune.processes import shares
from probeprune.progress import Progress
from probeprune.provenance import versions
from probeprune.result_lines import (
    AccuracyRecord,
    AgreementRecord,
    Identity,
    Line,
    ResultLine,
    TaskLine,
    TextLine,
    TrainingRecord,
    UnitRecord,
)
from probeprune.runtime.handle import Handle
from probeprune.runtime.offloaded import OffloadedHandle
from probeprune.strategies.probe import probe_flops
from probeprune.strategies.schedule import EveryBatch

BINS = 64
"""Number of bins for the channels of an MLP in a result line."""


def measure(bench: Workbench, cell: Cell) -> Line:
    """Measure the cell; returns its line. Errors of preparing and measuring pass through."""
    subject, measured = cell.subject, cell.measure

    def report(_: str, done: int, of: int) -> None:
        bench.progress(f"{subject.label}: {measured.name}", done, of)

    line: Line = {
        "kind": "result",
        **_identity(cell),
        "dtype": subject.dtype,
        "device": subject.device,
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    if isinstance(measured, CostMeasure):  # it attaches the method itself, in turns with dense
        return {**line, "training": None, **cost_line(bench, cell, report)}
    wanted: Predictions | None = None
    if isinstance(measured, TextMeasure) and not (subject.method.when.trains or _is_dense(cell)):
        with preparing():  # while nothing is attached
            text = _windows(measured, bench.dense(subject))
            wanted = dense_predictions(bench, cell, text, report)
    with bench.prepared(subject) as prepared:
        line["training"], line["removed_share"] = _training(prepared), prepared.removed_share
        if isinstance(measured, TextMeasure):
            text = _windows(measured, prepared.loaded)
            if wanted is None and not _is_dense(cell):  # trained, so the dense model is another one
                wanted = dense_predictions(bench, cell, text, report)
            found: TextLine | TaskLine = _on_text(cell, measured, text, wanted, prepared, report)
        else:
            found = _on_task(measured, prepared, report)
        return {**line, **found, **_pays(prepared.handle)}


def failure(cell: Cell, error: BaseException) -> Line:
    """The line of a cell that could not be measured, with one sentence that says why."""
    sentence = (str(error).strip().splitlines() or [""])[0]
    if not isinstance(error, ValueError | FloatingPointError):
        sentence = f"{type(error).__name__}: {sentence}"
    return {"kind": "failure", **_identity(cell), "task": cell.measure.name, "error": sentence}


def _identity(cell: Cell) -> Identity:
    """The first part of every line of a cell."""
    subject = cell.subject
    return {
        "key": cell.key,
        "model": subject.model,
        "name": subject.method.name,
        "method": subject.method.record(),
        "ratio": subject.ratio,
        "seed": subject.seed,
        "calibration": None if subject.calibration is None else subject.calibration.record(),
    }


def _pays(handle: Handle | None) -> ResultLine:
    """Which batches were probed, and why; nothing where that needs no saying."""
    if handle is None or handle.costs is None:
        return {}
    return {
        "pays": {
            "batches": handle.batches,
            "probed": handle.probed_batches,
            "costs": handle.costs.record(),
        }
    }


def _probed(handle: Handle) -> float:
    """Share of batches that were probed; where they share a choice, `probe_flops` spreads it over them."""
    return 1.0 if handle.costs is None else handle.probed_share


def _is_dense(cell: Cell) -> bool:
    return cell.subject == dense_subject(cell.subject)


def _windows(measure: TextMeasure, loaded: LoadedModel) -> torch.Tensor:
    """The windows of a text that count: LongTensor (count, length)."""
    with shares.alike():
        windows = evaluation_windows(
            load_corpus(measure.corpus),
            loaded.tokenizer,
            length=measure.length,
            limit=measure.windows,
            sampling=measure.sampling,
            seed=measure.seed,
        )
        return scored_windows(loaded.model, windows, measure.batch_size, measure.averaging)


def _on_text(
    cell: Cell,
    measure: TextMeasure,
    text: torch.Tensor,
    wanted: Predictions | None,
    prepared: Ready,
    progress: Progress,
) -> TextLine:
    """Perplexity on a text, its cost, and how far the model agrees with the dense one; `wanted` is what that
    predicts, None where the model is the dense one."""
    model, handle = prepared.loaded.model, prepared.handle
    taken = recorder(text)
    compared = None if wanted is None else Comparison(wanted, text.shape[1] - 1)
    # Of a model whose layers are offloaded, units that a batch chooses are gone when its layer leaves.
    hidden = isinstance(handle, OffloadedHandle) and handle.method.when.every_batch
    units = None if handle is None or hidden else UnitCounter(handle)

    def after_batch(what: str, done: int, total: int) -> None:
        if units is not None:
            units.count()  # not timed here
        progress(what, done, total)

    with PeakMemory(prepared.loaded.device) as memory:
        result = perplexity(
            model,
            text,
            batch_size=measure.batch_size,
            averaging=measure.averaging,
            see=compared or taken,
            progress=after_batch,
        )
    agreement: AgreementRecord | None = None
    if compared is None:
        keep_predictions(taken, cell, text)
    else:
        found = compared.agreement(divided=not is_followed(model))
        agreement = {
            "top1": found.top1,
            "top1_error": found.top1_error,
            "divergence": found.divergence,
            "divergence_error": found.divergence_error,
            "top_k": TOP_K,
        }
    shape = min(measure.batch_size, len(text)), measure.length
    full = blocks_flops(prepared.blocks, [b.units for b in prepared.blocks], *shape)
    probing = 0.0
    if handle is not None and isinstance(handle.method.when, EveryBatch):
        probing = probe_flops(*handle.probed, handle.method.when.probe, *shape) / full * _probed(handle)
    return {
        "task": measure.corpus,
        "metric": "perplexity",
        "value": result.value,
        "standard_error": result.standard_error,
        "losses": [round(x, 6) for x in result.losses],
        "agreement": agreement,
        "windows": len(result.losses),
        "length": measure.length,
        "batch_size": measure.batch_size,
        "sampling": measure.sampling,
        "averaging": measure.averaging,
        "flops_per_token": result.flops_per_token,
        "probe_flops_share": probing,
        "tokens": result.tokens,
        "seconds": result.seconds,
        "tokens_per_second": result.tokens_per_second,
        "peak_memory": memory.bytes,
        "units": [] if units is None else units.summary(),
    }


def _on_task(measure: TaskMeasure, prepared: Ready, progress: Progress) -> TaskLine:
    with PeakMemory(prepared.loaded.device) as memory:
        result = evaluate_task(
            prepared.loaded.model,
            prepared.loaded.tokenizer,
            measure.task,
            measure.settings(),
            progress=progress,
        )
    hits = result.correct_norm if result.metric == "acc_norm" else result.correct
    assert hits is not None
    metrics: dict[str, AccuracyRecord] = {"acc": {"value": result.acc, "standard_error": result.acc_error}}
    if result.acc_norm is not None:
        metrics["acc_norm"] = {"value": result.acc_norm, "standard_error": result.acc_norm_error or 0.0}
    return {
        "task": measure.task,
        "metric": "accuracy",
        "value": result.value,
        "standard_error": result.error,
        "metrics": metrics,
        "main": result.metric,
        "correct": "".join("01"[hit] for hit in hits),
        "items": result.items,
        "protocol": result.protocol,
        "source": result.source,
        "batch_size": result.batch_size,
        "order": result.order,
        "padding": result.padding,
        "batches": result.batches,
        "tokens": result.tokens,
        "seconds": result.seconds,
        "tokens_per_second": result.tokens / result.seconds,
        "peak_memory": memory.bytes,
    }


def _training(prepared: Ready) -> TrainingRecord | None:
    """The training record of a line: its main settings and measurements."""
    record = prepared.training
    if record is None:
        return None
    settings = record["training"]
    return {
        "corpus": record["corpus"],
        "steps": record["steps"],
        "best_step": record["best_step"],
        "tokens": record["tokens"],
        "seconds": record["seconds"],
        "peak_memory": record["peak_memory"],
        "held_out_loss": record["held_out_loss"],
        "batch_size": settings["batch_size"],
        "length": settings["length"],
        "learning_rate": settings["learning_rate"],
    }


class UnitCounter:
    """Count, batch by batch, which units an attached method keeps; a static method is counted once."""

    def __init__(self, handle: Handle) -> None:
        self.handle = handle
        self.batches = 0
        self._kept = {b.name: torch.zeros(b.units, dtype=torch.float32, device="cpu") for b in handle.blocks}
        self._changed = {b.name: 0.0 for b in handle.blocks}
        self._last: dict[str, torch.Tensor] = {}

    def count(self) -> None:
        """Count the units that are kept now."""
        if self.batches and not self.handle.method.when.every_batch:
            return
        for k in self.handle.kept_units():
            mask = torch.zeros(k.of, dtype=torch.float32, device="cpu")
            mask[list(k.units)] = 1
            self._kept[k.name] += mask
            if k.name in self._last:
                self._changed[k.name] += float((mask - self._last[k.name]).clamp_min(0).sum()) / len(k.units)
            self._last[k.name] = mask
        self.batches += 1

    def summary(self) -> list[UnitRecord]:
        """One record a block; the frequencies of channels are sorted and averaged in at most `BINS` bins."""
        entries: list[UnitRecord] = []
        for block, keep in zip(self.handle.blocks, self.handle.widths, strict=True):
            frequency = self._kept[block.name] / max(self.batches, 1)
            if block.fine:
                bins = frequency.sort(descending=True).values.tensor_split(min(BINS, block.units))
                frequency = torch.stack([b.mean() for b in bins])
            entries.append(
                {
                    "name": block.name,
                    "layer": block.layer,
                    "kind": block.kind,
                    "of": block.units,
                    "kept": keep,
                    "batches": self.batches,
                    "frequency": [round(f, 3) for f in frequency.tolist()],
                    "changed": round(self._changed[block.name] / max(self.batches - 1, 1), 4),
                }
            )
        return entries
