"""`probeprune bench`: measured speed and memory."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

from probeprune.cli.facts import takes_gradients
from probeprune.cli.groups import Device, Model, Ratio, ResultOptions, TrustRemoteCode
from probeprune.cli.options import grouped
from probeprune.cli.terminal import drawn, err, out, print_written, progress_bar
from probeprune.cli.values import names, numbers, one_of
from probeprune.errors import UsageError
from probeprune.methods import Method, check_untrained, get_method
from probeprune.model.loading import EMBEDDED_MODEL, load_model
from probeprune.model.machine import DTYPES, choose_device, choose_dtype
from probeprune.ranges import RANGES

if TYPE_CHECKING:
    import torch

    from probeprune.bench.lines import BenchLine
    from probeprune.bench.measure import GridPoint
    from probeprune.bench.targets import Target
    from probeprune.prepare import Prepared
    from probeprune.progress import Progress

OUTPUT = ResultOptions(Path("runs/bench"))
CALIBRATION_WINDOWS = 8
"""Few: statistics decide which units stay, and speed depends only on how many."""


@dataclass(frozen=True)
class TargetOptions:
    """The model to measure: a real one, or a random one of a real one's shape."""

    panel: ClassVar[str] = "Model loading"
    shape: Annotated[
        str | None,
        typer.Option(
            help="Measure a random model with layers of this model's sizes instead of the argument: "
            "llama-2-7b, llama-2-13b, llama-3-8b, llama-3.2-1b or llama-3.2-3b.",
            show_default=False,
        ),
    ] = None
    layers: Annotated[
        int | None,
        typer.Option(help="Number of layers of the random model.", show_default="as in the real model"),
        RANGES["layers"],
    ] = None
    device: Device = "auto"
    trust_remote_code: TrustRemoteCode = False

    def check(self) -> None:
        """Raise `UsageError` for options that do not go together."""
        if self.layers is not None and self.shape is None:
            raise UsageError("--layers goes with --shape; a real model has a fixed number of layers.")

    def open(self, model: str, dtype: str) -> Target:
        """The model in this dtype, with text or random tokens to measure on."""
        from probeprune.bench.targets import from_loaded, of_shape

        with err.status("loading the model"):
            if self.shape is None:
                return from_loaded(
                    load_model(
                        model,
                        dtype=dtype,
                        device=self.device,
                        trust_remote_code=self.trust_remote_code,
                    )
                )
            device = choose_device(self.device)
            return of_shape(self.shape, self.layers, choose_dtype(dtype, device), device)


@dataclass(frozen=True)
class GridOptions:
    """What is measured, and at which sizes."""

    panel: ClassVar[str] = "Measurements"
    methods: Annotated[
        str,
        typer.Option(help="Methods to measure beside the dense model, separated by commas."),
    ] = "ppsp,probe"
    ratio: Ratio = 0.4
    batch_sizes: Annotated[
        str, typer.Option(help="Numbers of sequences per batch, separated by commas."), RANGES["batch_size"]
    ] = "16"
    lengths: Annotated[
        str,
        typer.Option(help="Numbers of tokens per prompt, separated by commas."),
        RANGES["GridPoint.length"],
    ] = "512"
    new_tokens: Annotated[
        int,
        typer.Option(help="Tokens decoded after each prompt; 0 measures prefill alone."),
        RANGES["new_tokens"],
    ] = 16
    rounds: Annotated[
        int,
        typer.Option(help="Number of rounds, each of all methods in turn; medians are reported."),
        RANGES["rounds"],
    ] = 5
    dtypes: Annotated[
        str,
        typer.Option(
            help="Data types to compute in, separated by commas: bfloat16, float16, float32 or auto "
            "(the fastest on the device)."
        ),
    ] = "auto"
    threads: Annotated[
        str,
        typer.Option(help="Numbers of CPU threads, separated by commas; 0 is PyTorch's default."),
        RANGES["threads"],
    ] = "0"
    compile: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Time compiled layers (torch.compile), dense ones too. Every method takes a copy of the "
            "model, and minutes to compile it.",
        ),
    ] = False

    def checked_methods(self, shape: str | None) -> list[Method]:
        """The methods; for a random model, which may have few layers, with no layer left dense.

        Raises `UsageError` for an unknown method or one that cannot be timed here.
        """
        methods = [get_method(name) for name in names(self.methods, "methods")]
        for method in methods:
            check_untrained(method)
            if takes_gradients(method):
                raise UsageError(
                    f"bench collects no gradients; {method.name!r} runs as fast as ppsp, which cuts the same."
                )
        return methods if shape is None else [dataclasses.replace(m, skip_layers=0) for m in methods]

    def points(self) -> list[GridPoint]:
        """All batch sizes at all lengths. Raises `UsageError` for a size out of range."""
        from probeprune.bench.measure import GridPoint

        lengths = numbers(self.lengths, "lengths", "GridPoint.length")
        return [
            GridPoint(batch_size, length)
            for batch_size in numbers(self.batch_sizes, "batch-sizes", "batch_size")
            for length in lengths
        ]

    def checked_dtypes(self) -> list[str]:
        """The data types. Raises `UsageError` for an unknown one."""
        dtypes = names(self.dtypes, "dtypes")
        for dtype in dtypes:
            one_of("dtype", dtype, ("auto", *DTYPES))
        return dtypes

    def thread_counts(self) -> list[int]:
        """The numbers of threads. Raises `UsageError` for anything but whole numbers."""
        return numbers(self.threads, "threads", "threads")


@grouped
def bench(
    *,
    model: Model = EMBEDDED_MODEL,
    grid: GridOptions,
    profile: Annotated[
        bool, typer.Option("--profile", help="Print how many milliseconds each part of a forward pass takes.")
    ] = False,
    output: ResultOptions = OUTPUT,
    target: TargetOptions,
) -> None:
    """Measure the speed and memory of pruned models against the dense model, in prefill and in decoding.

    All models are measured in turn, so that a machine whose speed changes slows all of them alike.

    Example: [bold]probeprune bench --methods probe --batch-sizes 1,16 --lengths 128,512[/bold]
    Example: [bold]probeprune bench --shape llama-2-7b --layers 2 --batch-sizes 1[/bold]
    """
    from probeprune.bench.plot import plot
    from probeprune.bench.tables import profile_table, tables
    from probeprune.files import write_text
    from probeprune.places import claimed

    methods, dtypes = grid.checked_methods(target.shape), grid.checked_dtypes()
    points, thread_counts = grid.points(), grid.thread_counts()
    target.check()
    figures: list[BenchLine] = []
    with claimed(output.out_dir):
        for dtype in dtypes:
            figures += _measure(target.open(model, dtype), methods, points, thread_counts, grid)
        lines = "".join(json.dumps(line) + "\n" for line in figures)
        write_text(output.out_dir / "bench.jsonl", lines)
        plots = drawn(lambda: plot(figures, output.out_dir / "bench"))
    if output.as_json:
        print(lines, end="")
    else:
        for table in tables(figures) + ([profile_table(figures)] if profile else []):
            out().print(table)
    print_written((output.out_dir / "bench.jsonl", *plots))


def _measure(
    target: Target,
    methods: Sequence[Method],
    points: Sequence[GridPoint],
    thread_counts: Sequence[int],
    grid: GridOptions,
) -> list[BenchLine]:
    """The figures of one model: all methods at every point, with each number of threads."""
    from probeprune.bench.measure import measure_point
    from probeprune.runtime.compiled import check_compilable

    if grid.compile:
        check_compilable(target.model)
    figures: list[BenchLine] = []
    with progress_bar() as show:
        windows = target.windows(CALIBRATION_WINDOWS, max(point.length for point in points))
        prepared = _prepared(target, methods, grid.ratio, windows, show)
        for count in thread_counts:
            with _threads(count):
                for point in points:
                    figures += measure_point(
                        target,
                        methods,
                        grid.ratio,
                        point,
                        calibration=prepared,
                        new_tokens=grid.new_tokens,
                        rounds=grid.rounds,
                        progress=show,
                        compile=grid.compile,
                    )
    return figures


def _prepared(
    target: Target, methods: Sequence[Method], ratio: float, windows: torch.Tensor, progress: Progress
) -> Prepared:
    """Everything that the methods must know of the model, from few windows: enough to be timed."""
    from probeprune.prepare import prepare

    return prepare(target.model, methods, ratio, windows, batch_size=4, progress=progress)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """This number of CPU threads inside; 0 leaves it as it is."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
