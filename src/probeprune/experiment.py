"""The grid: methods x ratios on one model and one text, one JSON line a measurement, resumable.

The results file starts with the settings that all its lines share; a run that is killed and started again
with the same settings continues where it was. Knows nothing of how results are shown (`report.py`).
"""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from probeprune.allocation import check_ratio
from probeprune.calibration import Statistics, calibrate
from probeprune.data import calibration_windows, evaluation_windows, load_corpus
from probeprune.dynamic import attach
from probeprune.errors import UsageError
from probeprune.evaluation.cost import PeakMemory, blocks_flops, probe_flops
from probeprune.evaluation.perplexity import perplexity
from probeprune.methods import Method
from probeprune.models import LoadedModel, cache_dir
from probeprune.progress import Progress
from probeprune.provenance import versions
from probeprune.surgery import method_saliences

RESULTS = "results.jsonl"


@dataclass(frozen=True)
class Settings:
    """What all results of a run share. Two runs with equal settings can share a results file."""

    model: str
    dtype: str
    device: str
    calibration: str = "c4"
    calibration_windows: int = 128
    corpus: str = "wikitext2"
    windows: int | None = None
    """Evaluation windows, from the front; None for the whole text."""
    length: int = 512
    batch_size: int = 16
    seed: int = 0
    sampling: str = "in-order"
    averaging: str = "token"


@dataclass(frozen=True)
class Cell:
    """One row of the table: a method at a ratio."""

    method: Method
    ratio: float

    @property
    def label(self) -> str:
        """For people: `probe 40 %`."""
        return self.method.name if self.method.when == "never" else f"{self.method.name} {self.ratio:.0%}"


@dataclass
class Results:
    """The lines of a results file.

    Attributes:
        path: the file.
        settings: what they share.
        rows: one dictionary a measurement, in order of measuring.
    """

    path: Path
    settings: Settings
    rows: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def open(cls, folder: Path, settings: Settings) -> "Results":
        """Start a results file in `folder`, or continue the one there.

        Raises `UsageError` where the file is of a run with other settings, or is no results file.
        """
        path = folder / RESULTS
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            results = cls(path, settings)
            results._append({"kind": "settings", **asdict(settings)})
            return results
        results = cls.read(path)
        theirs, ours = asdict(results.settings), asdict(settings)
        different = [k for k in ours if theirs[k] != ours[k]]
        if different:
            said = ", ".join(f"{k} was {theirs[k]} and is now {ours[k]}" for k in different)
            raise UsageError(f"{path} holds results of another run ({said}); choose another --out.")
        return results

    @classmethod
    def read(cls, path: Path) -> "Results":
        """Read a results file; a last line cut short by a kill is dropped from it.

        Raises `UsageError` for a file that is missing or no results file.
        """
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise UsageError(f"{path} cannot be read ({error.strerror}).") from error
        complete = raw[: raw.rfind(b"\n") + 1]
        if len(complete) < len(raw):
            with path.open("r+b") as file:
                file.truncate(len(complete))
        try:
            lines = [json.loads(line) for line in complete.splitlines()]
            head = lines[0]
            if head.pop("kind") != "settings":
                raise KeyError("kind")
            return cls(path, Settings(**head), lines[1:])
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise UsageError(
                f"{path} is not a results file of this version; choose another --out."
            ) from error

    def find(self, cell: Cell) -> dict[str, Any] | None:
        """The line of that cell, if it has been measured."""
        wanted = cell.method.record()
        for row in self.rows:
            if row["method"] == wanted and row["ratio"] == cell.ratio:
                return row
        return None

    def add(self, row: dict[str, Any]) -> None:
        """Append one measurement; it is on disk when this returns."""
        self._append(row)
        self.rows.append(row)

    def _append(self, row: dict[str, Any]) -> None:
        line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
        # One write call: a kill leaves at most one incomplete last line, which `read` drops.
        with self.path.open("ab", buffering=0) as file:
            file.write(line)
            os.fsync(file.fileno())


def grid(methods: Sequence[Method], ratios: Sequence[float]) -> list[Cell]:
    """All cells, methods that do not prune once. Raises `UsageError` for a ratio outside [0, 1)."""
    cells: list[Cell] = []
    for ratio in ratios:
        check_ratio(ratio)
    for method in methods:
        for ratio in [0.0] if method.when == "never" else ratios:
            cell = Cell(method, ratio)
            if cell not in cells:
                cells.append(cell)
    return cells


def run(
    loaded: LoadedModel,
    results: Results,
    cells: Iterable[Cell],
    *,
    progress: Progress,
    done: Callable[[Cell, dict[str, Any]], None] = lambda cell, row: None,
) -> None:
    """Measure every cell that `results` does not hold yet.

    Raises `UsageError` for text that is too short, and what `attach` raises; cells already measured stay.
    """
    settings = results.settings
    todo = []
    for cell in cells:
        row = results.find(cell)
        if row is None:
            todo.append(cell)
        else:
            done(cell, row)
    if not todo:
        return
    text = evaluation_windows(
        load_corpus(settings.corpus),
        loaded.tokenizer,
        length=settings.length,
        limit=settings.windows,
        sampling=settings.sampling,  # type: ignore[arg-type]
        seed=settings.seed,
    )
    statistics = Statistics()
    if any(cell.method.needs_moments for cell in todo):
        statistics = calibrated(loaded, settings, progress)
    # Once a method, not once a ratio.
    methods = dict.fromkeys(cell.method for cell in todo)
    known = {m: with_gradients(loaded, settings, m, statistics, progress) for m in methods}
    # A ratio that cannot be reached should fail now, not after the cells before it.
    for cell in todo:
        attach(loaded.model, cell.method, cell.ratio, statistics=known[cell.method]).detach()
    for cell in todo:
        row = measure(loaded, settings, cell, text, known[cell.method], progress)
        results.add(row)
        done(cell, row)


def calibrated(loaded: LoadedModel, settings: Settings, progress: Progress) -> Statistics:
    """Calibration statistics for these settings, from the cache where they are there."""
    windows = calibration_windows(
        load_corpus(settings.calibration),
        loaded.tokenizer,
        count=settings.calibration_windows,
        length=settings.length,
        seed=settings.seed,
    )
    return calibrate(
        loaded.model,
        windows,
        batch_size=settings.batch_size,
        cache=cache_dir() / "statistics",
        progress=lambda n, of: progress("calibration", n, of),
    )


def with_gradients(
    loaded: LoadedModel, settings: Settings, method: Method, statistics: Statistics, progress: Progress
) -> Statistics:
    """The statistics with the saliences that `method` needs, from the cache where they are there."""
    if not method.needs_gradients or method.gradients is None:
        return statistics
    windows = calibration_windows(
        load_corpus(settings.calibration),
        loaded.tokenizer,
        count=method.gradients.windows,
        length=method.gradients.length,
        seed=settings.seed,
    )
    found = method_saliences(
        loaded.model,
        method,
        windows,
        cache=cache_dir() / "statistics",
        progress=lambda n, of: progress(f"gradients {method.name}", n, of),
    )
    return Statistics(statistics.moments, found)


def measure(
    loaded: LoadedModel,
    settings: Settings,
    cell: Cell,
    text: torch.Tensor,
    statistics: Statistics,
    progress: Progress,
) -> dict[str, Any]:
    """One line of results: perplexity and cost of a cell."""
    method = cell.method
    with (
        PeakMemory(loaded.device) as memory,
        attach(loaded.model, method, cell.ratio, statistics=statistics) as handle,
    ):
        result = perplexity(
            loaded.model,
            text,
            batch_size=settings.batch_size,
            averaging=settings.averaging,  # type: ignore[arg-type]
            progress=lambda n, of: progress(cell.label, n, of),
        )
        shape = min(settings.batch_size, len(text)), settings.length
        full = blocks_flops(handle.blocks, [b.units for b in handle.blocks], *shape)
        probe = 0 if method.probe is None else probe_flops(handle.blocks, handle.kept, method.probe, *shape)
        removed = handle.removed_share
    return {
        "kind": "result",
        "model": settings.model,
        "name": method.name,
        "method": method.record(),
        "ratio": cell.ratio,
        "removed_share": removed,
        "task": settings.corpus,
        "metric": "perplexity",
        "value": result.value,
        "standard_error": result.standard_error,
        "losses": [round(x, 6) for x in result.losses],
        "flops_per_token": result.flops_per_token,
        "probe_flops_share": probe / full,
        "tokens": result.tokens,
        "seconds": result.seconds,
        "tokens_per_second": result.tokens_per_second,
        "peak_memory": memory.bytes,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "device": str(loaded.device),
        "threads": torch.get_num_threads(),
        "seed": settings.seed,
        "versions": versions(),
    }
