"""Prepare: collect everything that methods need to know about a model, in one call; share, save, load it."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from probeprune import plan, records
from probeprune.algebra.precision import exact
from probeprune.calibration import stored
from probeprune.calibration.statistics import Statistics
from probeprune.data.windows import BATCH_SIZE, WindowSource
from probeprune.errors import UsageError
from probeprune.files import load_tensors, save_tensors
from probeprune.methods import TABLES, Method, check_untrained, get_method
from probeprune.model.identity import model_fingerprint
from probeprune.model.wrappers import unwrapped
from probeprune.preparation import Piece, Preparation, gather
from probeprune.progress import Progress, silent
from probeprune.ranges import plain
from probeprune.strategies import Part
from probeprune.strategies.refit_every_batch import RefitEveryBatch

_FORMAT = 1


@dataclass(frozen=True, eq=False)
class Prepared:
    """Everything that the given methods need to know about one model at the given ratios; made by `prepare`.

    Attributes:
        model: fingerprint of the model's weights and config.
        text: the calibration text: its `windows`, their `length`, and a `fingerprint`.
        methods: each method and ratio it was prepared for.
        pieces: parts of `Statistics` by key.
    """

    model: str
    text: Mapping[str, Any]
    methods: tuple[tuple[Method, float], ...]
    pieces: Mapping[str, dict[str, Any]] = field(repr=False)

    def statistics(self, model: nn.Module, method: Method, ratio: float) -> Statistics:
        """The statistics of one method at one ratio.

        Raises `UsageError`, naming the difference, for another model, or for a method or ratio that was not
        prepared.
        """
        if plan.may_need(method) and model_fingerprint(model) != self.model:
            raise UsageError(
                "this calibration was prepared for another model, or the model's weights have changed since; "
                "prepare it again for this one."
            )

        def get(piece: Piece) -> dict[str, Any]:
            value = self.pieces.get(piece.key)
            if value is None or not piece.served_by(value):
                raise UsageError(self._difference(piece.part, method, ratio))
            return value

        return gather(model, method, ratio, get)

    def _difference(self, part: Part, method: Method, ratio: float) -> str:
        made_for = ", ".join(f"{m.name} at {r:g}" for m, r in self.methods)
        ratios = [f"{r:g}" for m, r in self.methods if m.name == method.name]
        if ratios and f"{ratio:g}" not in ratios:
            what = f"ratio {ratio:g} of {method.name!r} (only for {', '.join(ratios)})"
        elif ratios:
            what = f"these settings of {method.name!r} (their {part} differ)"
        else:
            what = f"method {method.name!r} (only for {made_for})"
        return f"this calibration was not prepared for {what}; call prepare for it too."

    def save(self, path: str | Path) -> None:
        """Write everything to a safetensors file, which appears under its name only when complete."""
        tensors: dict[str, torch.Tensor] = {}
        values: dict[str, Any] = {}
        for key, piece in self.pieces.items():
            packed, values[key] = stored.CODECS[_part_of(key)].pack(piece)
            tensors |= {f"{key}:{name}": t for name, t in packed.items()}
        header = {
            "format": _FORMAT,
            "model": self.model,
            "text": dict(self.text),
            "methods": [[m.record(), ratio] for m, ratio in self.methods],
            "values": values,
        }
        save_tensors(Path(path), tensors, {"probeprune": json.dumps(header)})


def load_prepared(path: str | Path) -> Prepared:
    """Open a file written by `Prepared.save`. Raises `UsageError` for any other file."""
    file = Path(path)
    if not file.is_file():
        raise UsageError(f"there is no file {file}.")
    entry = load_tensors(file)
    try:
        assert entry is not None
        tensors, metadata = entry
        header = json.loads(metadata["probeprune"])
        if header["format"] != _FORMAT:
            raise UsageError("written by another version of probeprune; prepare it again.")
        pieces = {}
        for key, values in header["values"].items():
            part = {n.removeprefix(f"{key}:"): t for n, t in tensors.items() if n.startswith(f"{key}:")}
            pieces[key] = stored.CODECS[_part_of(key)].unpack(part, values)
        methods = tuple((records.from_json(Method, m, TABLES), float(r)) for m, r in header["methods"])
        return Prepared(header["model"], header["text"], methods, pieces)
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from None
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError):
        raise UsageError(f"{file} holds no prepared calibration, or is damaged; prepare it again.") from None


def _part_of(key: str) -> Part:
    part: Any = key.partition("-")[0]
    return part


@exact()
def prepare(
    model: nn.Module,
    method: str | Method | Sequence[str | Method],
    ratio: float | Sequence[float],
    calibration: torch.Tensor | WindowSource,
    *,
    batch_size: int = BATCH_SIZE,
    cache: Path | None = None,
    progress: Progress = silent,
) -> Prepared:
    """Collect everything that one or more methods need to know about a model, at one or more ratios.

    Example:
        >>> prepared = probeprune.prepare(model, ["probe", "best-dynamic"], [0.2, 0.4], windows)
        >>> with probeprune.attach(model, "best-dynamic", ratio=0.4, calibration=prepared):
        ...     model(**batch)

    Args:
        model: a transformers causal LM of a supported family, in eval mode, nothing attached.
        method: one or more names from `METHODS`, or `Method`s.
        ratio: one or more shares of each method's budget to remove, in [0, 1).
        calibration: windows of token ids, LongTensor (count, length), or a `WindowSource`.
        batch_size: windows per forward pass.
        cache: folder for pieces, stored by content; None stores nothing on disk.
        progress: called with (name of the work, parts done, parts in total).

    Raises:
        UsageError: unsupported model, method or ratio, windows too few, short or long.
        FloatingPointError: NaN or infinite statistics, losses or gradients, or a refit that failed.
    """
    model = unwrapped(model)
    chosen = [method] if isinstance(method, str | Method) else list(method)
    methods = [get_method(m) for m in chosen]
    ratios = [plain("ratio", r) for r in (ratio if isinstance(ratio, Sequence) else [ratio])]
    for m in methods:
        check_untrained(m)
    following = any(isinstance(m.when, RefitEveryBatch) for m in methods)
    preparation = Preparation(
        model, calibration, batch_size=batch_size, cache=cache, progress=progress, following=following
    )
    pieces: dict[str, dict[str, Any]] = {}

    def get(piece: Piece) -> dict[str, Any]:
        if piece.key not in pieces:
            pieces[piece.key] = preparation.get(piece)
        return pieces[piece.key]

    for share in ratios:
        for m in methods:
            gather(model, m, share, get)
    combinations = tuple((m, share) for share in ratios for m in methods)
    return Prepared(model_fingerprint(model), _text(preparation.windows), combinations, pieces)


def _text(windows: torch.Tensor) -> dict[str, Any]:
    return {
        "windows": len(windows),
        "length": windows.shape[1],
        "fingerprint": hashlib.blake2b(windows.contiguous().numpy().tobytes(), digest_size=16).hexdigest(),
    }


Calibration = torch.Tensor | WindowSource | Prepared | Preparation
"""Everything that `attach` and `prune` accept as `calibration`."""


def text_of(calibration: Calibration | None) -> Mapping[str, Any]:
    """The windows, their length and, where it is known, the fingerprint of a calibration text; empty for
    none."""
    if isinstance(calibration, Prepared):
        return calibration.text
    if isinstance(calibration, WindowSource):
        return {"windows": calibration.windows, "length": calibration.length}
    if isinstance(calibration, Preparation):
        return text_of(calibration.calibration)
    if isinstance(calibration, torch.Tensor) and calibration.ndim == 2 and not calibration.is_meta:
        return _text(calibration.cpu())
    return {}


def statistics_for(
    model: nn.Module,
    method: Method,
    ratio: float,
    calibration: Calibration | None,
    *,
    widths: Sequence[int] | None = None,
    batch_size: int = BATCH_SIZE,
    cache: Path | None = None,
    progress: Progress = silent,
) -> Statistics:
    """The statistics of one method at one ratio, from windows or from anything prepared.

    Args:
        model, method, ratio: as in `prepare`.
        calibration: text, or anything prepared from it.
        widths: number of units that each block keeps, instead of the widths of the method's allocation.
        batch_size, cache, progress: as in `prepare`, where `calibration` is text.

    Raises `UsageError` where the method needs calibration and there is none.
    """
    if isinstance(calibration, Prepared):
        return calibration.statistics(model, method, ratio)
    if isinstance(calibration, Preparation):
        if calibration.model is not model:
            raise UsageError("this preparation is of another model; make one for this model.")
        return calibration.statistics(method, ratio, widths)
    if calibration is None:
        if plan.needs(method) or plan.needs_for(method, plan.parts_of(model, method)):
            raise plan.unprepared(method)
        return Statistics()
    preparation = Preparation(model, calibration, batch_size=batch_size, cache=cache, progress=progress)
    return preparation.statistics(method, ratio, widths)
