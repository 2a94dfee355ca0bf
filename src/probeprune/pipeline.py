"""From a model to a pruned checkpoint: calibrate, prune, measure before and after, save with a model card."""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from probeprune.blocks import find_blocks
from probeprune.cards import pruning_card
from probeprune.checkpoint import Layout, check_free, check_space, empty_model, export, save
from probeprune.data import Text, calibration_windows, evaluation_windows, load_corpus
from probeprune.errors import UsageError
from probeprune.evaluation.cost import PeakMemory
from probeprune.evaluation.perplexity import perplexity
from probeprune.files import write_json
from probeprune.methods import Method, compose, stand_in
from probeprune.models import LoadedModel, cache_dir, source_fingerprint
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


class Measure:
    """Perplexity on one text, again and again: before and after something is done to a model.

    Args:
        loaded: whose tokenizer cuts the text.
        text: to measure on; 0 windows measures nothing.
        progress: called with (what, windows done, windows in all).
        batch_size: windows a forward pass.
        keep: a file that remembers the figures, so that a run that was broken off does not measure again what
            it no longer can: the model before it was trained.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        text: Text,
        progress: Progress,
        batch_size: int = 16,
        keep: Path | None = None,
    ) -> None:
        self.text, self.progress, self.batch_size, self.keep = text, progress, batch_size, keep
        self.figures: dict[str, float] = {}
        if keep is not None:
            self._of = {**asdict(text), "model": loaded.name, "weights": source_fingerprint(loaded.name)}
            if keep.exists():
                kept = json.loads(keep.read_text(encoding="utf-8"))
                if kept["of"] == self._of:
                    self.figures = kept["figures"]
        self.windows = None
        if text.windows:
            self.windows = evaluation_windows(
                load_corpus(text.corpus), loaded.tokenizer, length=text.length, limit=text.windows
            )

    def __call__(self, what: str, model: Any) -> None:
        """Measure `model` and keep the figure under this name."""
        if self.windows is None or what in self.figures:
            return
        found = perplexity(
            model,
            self.windows,
            batch_size=self.batch_size,
            progress=lambda n, of: self.progress(f"perplexity {what}", n, of),
        )
        self.figures[what], self.figures[f"{what}_error"] = found.value, found.standard_error
        if self.keep is not None:
            write_json(self.keep, {"of": self._of, "figures": self.figures})

    def record(self) -> dict[str, Any] | None:
        """The text and the figures; None where nothing was measured."""
        return {**asdict(self.text), "perplexity": self.figures} if self.figures else None


def rehearse(model: Any, method: Method, ratio: float, layout: Layout, steps: int = 1) -> int:
    """Prune and export a model of the same shape without weights: what cannot be fails before the work.

    Returns the number of parameters that will be saved. Raises what `prune` and `export` raise.
    """
    check_static(method)
    check_steps(method, steps)
    shape = empty_model(model.config, model.dtype)
    drawn = compose(stand_in(method), importance="random", gradients=None, compensation="none", refit=None)
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
