"""Pruned, quantised or both: one model as GGUF files, each measured in llama.cpp itself.

Every ratio is pruned once and stored in every type. All files take turns in one run: bytes on disk,
perplexity of the file as the engine runs it, seconds of a prompt and of decoding. Nothing here is estimated.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

from probeprune.data.corpora import load_corpus
from probeprune.data.windows import Text, evaluation_windows
from probeprune.engines.gguf_types import FileType
from probeprune.engines.gguf_write import export_gguf
from probeprune.engines.llama_cpp import LlamaCpp
from probeprune.files import stored_json, write_json
from probeprune.foreign.extras import extra
from probeprune.jobs.prune import calibration_source
from probeprune.methods import Method
from probeprune.model.blocks import find_blocks
from probeprune.model.cost import blocks_flops
from probeprune.model.fingerprint import source_fingerprint
from probeprune.model.loading import LoadedModel, load_model
from probeprune.model.machine import cache_dir
from probeprune.places import replacing
from probeprune.progress import Progress, silent
from probeprune.report.palette import style
from probeprune.surgery import prune

MADE = "files.json"
"""In the folder of the files: what they were made from, so that a run which was interrupted goes on."""


@dataclass(frozen=True)
class Grid:
    """The files to make."""

    method: Method
    """A method that prunes once, with widths that the file types and the engine can hold."""
    ratios: Sequence[float]
    """Ratios to prune to; the dense model is always there."""
    types: Sequence[FileType]
    calibration: Text


@dataclass(frozen=True)
class Timing:
    """How speed is measured."""

    prompt: int = 256
    """Tokens of the prompt."""
    decode: int = 64
    """Tokens generated after it."""
    rounds: int = 7
    """Every round runs every file once."""


class FileLine(TypedDict):
    """What was measured of one file."""

    file: str
    method: str
    ratio: float
    removed: float
    """Share of the blocks' parameters removed."""
    type: str
    bytes: int
    perplexity: float
    prompt_seconds: list[float]
    """One a round."""
    decode_seconds: list[float]
    prompt_tokens: int
    decode_tokens: int
    kept: list[int]
    """Units that every block keeps."""
    flops: float
    """FLOPs of the blocks on the tokens of the timed prompt, as a share of the dense model's."""


def make_files(loaded: LoadedModel, grid: Grid, folder: Path, progress: Progress = silent) -> list[FileLine]:
    """Prune to every ratio and write every file that is not there; returns one line a file, not yet measured.

    Args:
        loaded: the dense model, in float32; it is left as it is.
        grid: the files to make.
        folder: where they go. Files of an earlier run with the same settings are kept.
        progress: called with (name of the work, parts done, parts in total).

    Raises:
        UsageError: requests that `prune` or `export_gguf` refuses.
    """
    source = {
        "record": 2,  # the first held FLOPs on a prompt that need not be the one timed, and no widths
        "model": loaded.name,
        "weights": source_fingerprint(loaded.name),
        "method": grid.method.record(),
        "calibration": grid.calibration.record(),
    }
    record = stored_json(folder / MADE)
    lines: dict[str, Any] = record["lines"] if isinstance(record, dict) and record.get("of") == source else {}
    for ratio in (0.0, *grid.ratios):
        names = {type: _name(grid.method, ratio, type) for type in grid.types}
        missing = [t for t, name in names.items() if name not in lines or not (folder / name).is_file()]
        if not missing:
            continue
        model, facts = _pruned(loaded, grid, ratio, progress)
        for type in missing:
            export_gguf(model, folder / names[type], tokenizer=loaded.tokenizer, type=type, progress=progress)
            size = (folder / names[type]).stat().st_size
            lines[names[type]] = {"file": names[type], **facts, "type": type, "bytes": size}
            write_json(folder / MADE, {"of": source, "lines": lines})
    return [lines[_name(grid.method, ratio, t)] for ratio in (0.0, *grid.ratios) for t in grid.types]


def _name(method: Method, ratio: float, type: FileType) -> str:
    return f"{f'{method.name}-{ratio:g}' if ratio else 'dense'}-{type}.gguf"


def _pruned(loaded: LoadedModel, grid: Grid, ratio: float, progress: Progress) -> tuple[Any, dict[str, Any]]:
    """A pruned model and what is known of it before it is measured."""
    if not ratio:
        whole = [block.units for block in find_blocks(loaded.model)]
        return loaded.model, {"method": "dense", "ratio": 0.0, "removed": 0.0, "kept": whole}
    fresh = load_model(loaded.name, dtype="float32", device=str(loaded.device))
    done = prune(
        fresh.model,
        grid.method,
        ratio,
        calibration=calibration_source(fresh, grid.method, grid.calibration, grid.method.seed),
        cache=cache_dir() / "statistics",
        progress=progress,
    )
    kept = [len(k.units) for k in done.kept]
    facts = {"method": grid.method.name, "ratio": ratio, "removed": done.removed_share, "kept": kept}
    return fresh.model, facts


def measure_files(
    lines: Sequence[FileLine],
    folder: Path,
    engine: LlamaCpp,
    loaded: LoadedModel,
    text: Text,
    timing: Timing,
    progress: Progress = silent,
) -> list[FileLine]:
    """The lines with perplexity, and with the seconds of every round.

    Args:
        lines: what `make_files` returned, the dense model's first.
        folder: where the files are.
        engine: llama.cpp.
        loaded: the dense model, whose tokenizer cuts the windows.
        text: the windows to measure perplexity on.
        timing: how speed is measured. The prompt is the beginning of the first window, repeated if need be.
        progress: called with (name of the work, parts done, parts in total).
    """
    windows = evaluation_windows(
        load_corpus(text.corpus), loaded.tokenizer, length=text.length, limit=text.windows
    )
    ids = [window.tolist() for window in windows]
    reading = replace(engine, context=max(engine.context, text.length))
    figures = []
    for index, line in enumerate(lines):
        progress("perplexity in llama.cpp", index, len(lines))
        figures.append(reading.perplexity(folder / line["file"], ids))
    prompt = (ids[0] * -(-timing.prompt // len(ids[0])))[: timing.prompt]
    timed = replace(engine, context=timing.prompt + timing.decode)
    seconds: list[list[tuple[float, float]]] = [[] for _ in lines]
    for turn in range(timing.rounds):  # in turn, so that noise of the machine meets all alike
        for index, line in enumerate(lines):
            progress("speed in llama.cpp", turn * len(lines) + index, timing.rounds * len(lines))
            seconds[index] += timed.speed(folder / line["file"], prompt, timing.decode)
    blocks, tokens = find_blocks(loaded.model), timing.prompt - 1  # the last one begins the decoding
    dense = blocks_flops(blocks, [block.units for block in blocks], 1, tokens)
    return [
        {
            **line,
            "perplexity": figure,
            "prompt_seconds": [p for p, _ in own],
            "decode_seconds": [d for _, d in own],
            "prompt_tokens": tokens,
            "decode_tokens": timing.decode,
            "flops": blocks_flops(blocks, line["kept"], 1, tokens) / dense,
        }
        for line, figure, own in zip(lines, figures, seconds, strict=True)
    ]


@dataclass(frozen=True)
class Row:
    """One file beside the dense file of the same type, and beside all others."""

    line: FileLine
    prompt: tuple[float, float, float]
    """Speed-up of the prompt over dense of the same type: median of the rounds, lowest, highest."""
    decode: tuple[float, float, float]
    """The same of decoding."""
    flops_limit: float
    """The prompt's speed-up if time were FLOPs of the blocks."""
    bytes_limit: float
    """The decoding's speed-up if time were bytes of the file."""
    best_by_bytes: bool
    """Whether no other file is both smaller and better."""
    best_by_time: bool
    """Whether no other file both decodes faster and is better."""


def rows(lines: Sequence[FileLine]) -> list[Row]:
    """The lines compared with each other; the dense file of every type must be among them."""
    dense = {line["type"]: line for line in lines if not line["ratio"]}
    made = []
    for line in lines:
        other = dense[line["type"]]
        made.append(
            Row(
                line,
                _speed_up(other["prompt_seconds"], line["prompt_seconds"]),
                _speed_up(other["decode_seconds"], line["decode_seconds"]),
                1 / line["flops"],
                other["bytes"] / line["bytes"],
                _unbeaten(line, lines, lambda one: float(one["bytes"])),
                _unbeaten(line, lines, lambda one: statistics.median(one["decode_seconds"])),
            )
        )
    return made


def _speed_up(dense: Sequence[float], own: Sequence[float]) -> tuple[float, float, float]:
    ratios = [d / o for d, o in zip(dense, own, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def _unbeaten(line: FileLine, lines: Sequence[FileLine], cost: Callable[[FileLine], float]) -> bool:
    return not any(
        cost(other) <= cost(line)
        and other["perplexity"] <= line["perplexity"]
        and (cost(other), other["perplexity"]) != (cost(line), line["perplexity"])
        for other in lines
    )


def table(lines: Sequence[FileLine]) -> str:
    """A Markdown table of the files, lowest perplexity first."""
    columns = (
        "file",
        "MB",
        "perplexity",
        "prompt tok/s",
        "x dense",
        "limit",
        "decode tok/s",
        "x dense",
        "limit",
        "unbeaten by",
    )
    head = [f"| {' | '.join(columns)} |", f"| --- |{' ---: |' * (len(columns) - 2)} --- |"]
    return "\n".join([*head, *map(_cells, sorted(rows(lines), key=lambda row: row.line["perplexity"]))])


def _cells(row: Row) -> str:
    line = row.line
    best = [n for n, is_best in (("size", row.best_by_bytes), ("time", row.best_by_time)) if is_best]
    cells = (
        line["file"].removesuffix(".gguf"),
        f"{line['bytes'] / 1e6:.1f}",
        f"{line['perplexity']:.2f}",
        f"{line['prompt_tokens'] / statistics.median(line['prompt_seconds']):.0f}",
        _range(row.prompt),
        f"{row.flops_limit:.2f}",
        f"{line['decode_tokens'] / statistics.median(line['decode_seconds']):.1f}",
        _range(row.decode),
        f"{row.bytes_limit:.2f}",
        " and ".join(best) or "-",
    )
    return f"| {' | '.join(cells)} |"


def _range(speed_up: tuple[float, float, float]) -> str:
    middle, low, high = speed_up
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def plot(lines: Sequence[FileLine], path: Path) -> list[Path]:
    """Perplexity over bytes and over the time of decoding, a line a ratio, with the unbeaten files ringed.

    Returns the files written, PNG and SVG beside `path`.
    """
    with extra("report"):
        from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    compared = rows(lines)
    panels: list[tuple[str, Callable[[FileLine], float], Callable[[Row], bool]]] = [
        ("MB on disk", lambda one: one["bytes"] / 1e6, lambda row: row.best_by_bytes),
        (
            "ms a token, decoding in llama.cpp",
            lambda one: 1e3 * statistics.median(one["decode_seconds"]) / one["decode_tokens"],
            lambda row: row.best_by_time,
        ),
    ]
    for axes, (label, cost, is_best) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
        for series, ratio in enumerate(sorted({line["ratio"] for line in lines})):
            own = sorted((row for row in compared if row.line["ratio"] == ratio), key=lambda r: cost(r.line))
            name = f"{own[0].line['method']} {ratio:.0%}" if ratio else "dense"
            x, y = [cost(r.line) for r in own], [r.line["perplexity"] for r in own]
            axes.plot(x, y, "o-", color=style(series).light, label=name)
            for row, a, b in zip(own, x, y, strict=True):
                axes.annotate(row.line["type"], (a, b), xytext=(4, 4), textcoords="offset points", fontsize=7)
        best = [(cost(row.line), row.line["perplexity"]) for row in compared if is_best(row)]
        axes.plot(*zip(*best, strict=True), "o", markersize=12, markerfacecolor="none", color="grey")
        axes.set_xlabel(label)
        axes.set_yscale("log")
        axes.grid(alpha=0.25)
        axes.legend()
    figure.axes[0].set_ylabel("perplexity in llama.cpp (ring: no file is better and cheaper)")
    written = [path.with_suffix(".png"), path.with_suffix(".svg")]
    for file in written:
        with replacing(file) as partial:
            figure.savefig(partial, dpi=150)
    return written
