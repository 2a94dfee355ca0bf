"""`probeprune quantised`: pruned, quantised or both, measured in llama.cpp."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, cast

import typer

from probeprune.cli.groups import CalibrationOptions, Json, Model
from probeprune.cli.options import grouped
from probeprune.cli.terminal import drawn, notices, print_text, progress_bar
from probeprune.cli.values import names, numbers
from probeprune.data.windows import Text
from probeprune.engines.gguf_types import FileType, storage
from probeprune.experiment.cells import TextMeasure
from probeprune.files import write_text
from probeprune.methods import compose, get_method
from probeprune.model.loading import EMBEDDED_MODEL, load_model
from probeprune.ranges import RANGES
from probeprune.surgery import check_static


@dataclass(frozen=True)
class EngineOptions:
    """How files are measured in llama.cpp."""

    panel: ClassVar[str] = "llama.cpp"
    llama_cpp: Annotated[
        Path | None,
        typer.Option(
            help="Folder that holds llama.cpp's library, or a node_modules that npm put it into.",
            show_default="$PROBEPRUNE_LLAMA_CPP",
        ),
    ] = None
    threads: Annotated[int, typer.Option(help="Threads of llama.cpp."), RANGES["threads"]] = 2
    corpus: Annotated[str, typer.Option(help="Text to measure perplexity on.")] = TextMeasure.corpus
    windows: Annotated[int, typer.Option(help="Windows of it."), RANGES["windows"]] = 8
    prompt: Annotated[int, typer.Option(help="Tokens of the timed prompt."), RANGES["length"]] = 256
    decode: Annotated[int, typer.Option(help="Tokens decoded after it."), RANGES["length"]] = 64
    rounds: Annotated[int, typer.Option(help="Rounds; every file runs once in each."), RANGES["rounds"]] = 7


@grouped
def quantised(
    *,
    model: Model = EMBEDDED_MODEL,
    method: Annotated[str, typer.Option(help="Static pruning method.")] = "best-static",
    ratios: Annotated[str, typer.Option(help="Pruning ratios, separated by commas.")] = "0.2,0.4",
    types: Annotated[
        str, typer.Option(help="Types of file, separated by commas: f32, f16, bf16, q8_0, q5_1, q4_0, ...")
    ] = "f16,q8_0,q4_0",
    round_to: Annotated[
        int,
        typer.Option(help="MLP widths are multiples of this; quantised rows need 32."),
        RANGES["round_to"],
    ] = 32,
    folder: Annotated[Path, typer.Option("--out", help="Folder for files and results.")] = Path(
        "runs/quantised"
    ),
    calibration: CalibrationOptions,
    engine: EngineOptions,
    as_json: Json = False,
) -> None:
    """Prune, quantise, or both? Measure a model as GGUF files in llama.cpp.

    The dense and the pruned models are written in every type. Perplexity is that of the file as llama.cpp
    runs it; speeds are medians over rounds in which the files take turns.

    Example: [bold]probeprune quantised smollm2-135m --ratios 0.2,0.4 --types f16,q8_0,q4_0[/bold]
    """
    kinds = names(types, "types")
    for kind in kinds:
        storage(kind)
    chosen = compose(get_method(method), name=method, round_to=round_to, seed=calibration.seed)
    check_static(chosen)
    shares = numbers(ratios, "ratios", "ratio")
    from probeprune.engines.llama_cpp import find_llama_cpp
    from probeprune.jobs.quantised import Grid, Timing, make_files, measure_files, plot, table
    from probeprune.places import check_place, claimed

    check_place(folder)
    llama_cpp = find_llama_cpp(engine.llama_cpp, threads=engine.threads)
    with notices(), claimed(folder), progress_bar() as show:
        loaded = load_model(model, dtype="float32", device="cpu")
        grid = Grid(chosen, shares, cast("list[FileType]", kinds), calibration.text())
        lines = make_files(loaded, grid, folder, show)
        text = Text(engine.corpus, engine.windows, calibration.length)
        timing = Timing(engine.prompt, engine.decode, engine.rounds)
        lines = measure_files(lines, folder, llama_cpp, loaded, text, timing, show)
    written = table(lines)
    encoded = "".join(json.dumps(line) + "\n" for line in lines)
    write_text(folder / "lines.jsonl", encoded)
    write_text(folder / "table.md", written + "\n")
    drawn(lambda: plot(lines, folder / "quantised"))
    print_text(encoded if as_json else written, end="" if as_json else "\n")
