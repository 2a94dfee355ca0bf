"""One line of results: a prepared model measured on one thing, with what it cost."""

from dataclasses import asdict

import torch

from probeprune.data.corpora import load_corpus
from probeprune.data.windows import evaluation_windows
from probeprune.evaluation.perplexity import perplexity
from probeprune.evaluation.tasks import TaskSettings, evaluate_task
from probeprune.experiment.cells import Cell, CostMeasure, TaskMeasure, TextMeasure
from probeprune.experiment.costing import cost_line
from probeprune.experiment.results import Row
from probeprune.experiment.workbench import Prepared, Workbench
from probeprune.model.cost import PeakMemory, blocks_flops
from probeprune.progress import Progress
from probeprune.provenance import versions
from probeprune.runtime.handle import Handle
from probeprune.strategies.probe import probe_flops

BINS = 64
"""Into how many parts the channels of an MLP are put in a result line."""


def measure(bench: Workbench, cell: Cell) -> Row:
    """The cell's line. Raises what preparing the subject and the measurement raise."""
    subject, what = cell.subject, cell.measure

    def report(_: str, done: int, total: int) -> None:
        bench.progress(f"{subject.label}: {what.name}", done, total)

    row = {
        "kind": "result",
        **_identity(cell),
        "calibration": None if subject.calibration is None else asdict(subject.calibration),
        "dtype": subject.dtype,
        "device": subject.device,
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    if isinstance(what, CostMeasure):  # attaches by itself, in turn with the dense model
        return {**row, "training": None, **cost_line(bench, cell, report)}
    with bench.prepared(subject) as prepared:
        found = (
            _on_text(what, prepared, report)
            if isinstance(what, TextMeasure)
            else _on_task(what, prepared, report)
        )
        own = {"training": _training(prepared), "removed_share": prepared.removed_share}
    return {**row, **own, **found}


def failure(cell: Cell, error: BaseException) -> Row:
    """The line of a cell that could not be measured, with one sentence that says why."""
    said = (str(error).strip().splitlines() or [""])[0]
    if not isinstance(error, ValueError | FloatingPointError):
        said = f"{type(error).__name__}: {said}"
    return {"kind": "failure", **_identity(cell), "task": cell.measure.name, "error": said}


def _identity(cell: Cell) -> Row:
    """What every line of a cell begins with."""
    subject = cell.subject
    return {
        "key": cell.key,
        "model": subject.model,
        "name": subject.method.name,
        "method": subject.method.record(),
        "ratio": subject.ratio,
        "seed": subject.seed,
    }


def _on_text(measure: TextMeasure, prepared: Prepared, progress: Progress) -> Row:
    model, handle = prepared.loaded.model, prepared.handle
    text = evaluation_windows(
        load_corpus(measure.corpus),
        prepared.loaded.tokenizer,
        length=measure.length,
        limit=measure.windows,
        sampling=measure.sampling,
        seed=measure.seed,
    )
    units = None if handle is None else UnitCounter(handle)

    def after_batch(what: str, done: int, total: int) -> None:
        if units is not None:
            units.count()  # here, where no time is taken
        progress(what, done, total)

    with PeakMemory(prepared.loaded.device) as memory:
        result = perplexity(
            model, text, batch_size=measure.batch_size, averaging=measure.averaging, progress=after_batch
        )
    shape = min(measure.batch_size, len(text)), measure.length
    full = blocks_flops(prepared.blocks, [b.units for b in prepared.blocks], *shape)
    probing = 0.0
    if handle is not None and handle.method.probe is not None:
        probing = probe_flops(*handle.probed, handle.method.probe, *shape) / full
    return {
        "task": measure.corpus,
        "metric": "perplexity",
        "value": result.value,
        "standard_error": result.standard_error,
        "losses": [round(x, 6) for x in result.losses],
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


def _on_task(measure: TaskMeasure, prepared: Prepared, progress: Progress) -> Row:
    with PeakMemory(prepared.loaded.device) as memory:
        result = evaluate_task(
            prepared.loaded.model,
            prepared.loaded.tokenizer,
            measure.task,
            TaskSettings(measure.limit, measure.batch_size, measure.source, measure.protocol, measure.order),
            progress=progress,
        )
    hits = result.correct_norm if result.metric == "acc_norm" else result.correct
    assert hits is not None
    metrics = {"acc": {"value": result.acc, "standard_error": result.acc_error}}
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


def _training(prepared: Prepared) -> Row | None:
    """What a reader must know of the training to tell trained rows from others."""
    record = prepared.training
    if record is None:
        return None
    settings = record["training"]
    names = ("corpus", "steps", "best_step", "tokens", "seconds", "peak_memory", "held_out_loss")
    return {k: record[k] for k in names} | {k: settings[k] for k in ("batch_size", "length", "learning_rate")}


class UnitCounter:
    """Counts, batch by batch, which units an attached method keeps; those of a static method only once."""

    def __init__(self, handle: Handle) -> None:
        self.handle = handle
        self.batches = 0
        self._kept = {b.name: torch.zeros(b.units) for b in handle.blocks}
        self._changed = {b.name: 0.0 for b in handle.blocks}
        self._last: dict[str, torch.Tensor] = {}

    def count(self) -> None:
        """Take in what is kept now."""
        if self.batches and self.handle.method.when != "batch":
            return
        for k in self.handle.kept_units():
            now = torch.zeros(k.of)
            now[list(k.units)] = 1
            self._kept[k.name] += now
            if k.name in self._last:
                self._changed[k.name] += float((now - self._last[k.name]).clamp_min(0).sum()) / len(k.units)
            self._last[k.name] = now
        self.batches += 1

    def summary(self) -> list[Row]:
        """One entry a block.

        `frequency`: share of batches a unit was kept in; heads in their own order, channels sorted and
        averaged in at most `BINS` parts. `changed`: mean share of the kept units that were new in a batch.
        """
        entries = []
        for block, keep in zip(self.handle.blocks, self.handle.kept, strict=True):
            frequency = self._kept[block.name] / max(self.batches, 1)
            if block.kind == "mlp":
                parts = frequency.sort(descending=True).values.tensor_split(min(BINS, block.units))
                frequency = torch.stack([p.mean() for p in parts])
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
