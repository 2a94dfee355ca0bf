"""`probeprune bench`: measured speed and memory."""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from probeprune.cli.common import DEVICE, JSON, MODEL, TRUST, err, names, out, progress_bar, say_written
from probeprune.errors import UsageError
from probeprune.methods import Method, check_untrained, get_method
from probeprune.strategies.allocation import check_ratio


def bench(
    model: MODEL = "smollm2-135m",
    methods: Annotated[str, typer.Option(help="Methods, separated by commas.")] = "ppsp,probe",
    ratio: Annotated[float, typer.Option(help="Pruning ratio.")] = 0.4,
    batch_sizes: Annotated[str, typer.Option(help="Sequences a batch, separated by commas.")] = "16",
    lengths: Annotated[str, typer.Option(help="Tokens of a prompt, separated by commas.")] = "512",
    new_tokens: Annotated[int, typer.Option(help="Tokens decoded behind it; 0 measures prefill alone.")] = 16,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds; medians are reported.")] = 5,
    dtypes: Annotated[
        str, typer.Option(help="auto, bfloat16, float16, float32, separated by commas.")
    ] = "auto",
    threads: Annotated[str, typer.Option(help="CPU threads, separated by commas; 0 for torch's own.")] = "0",
    shape: Annotated[
        str | None,
        typer.Option(help="Instead of MODEL: a random model with layers of this real one's sizes."),
    ] = None,
    layers: Annotated[int | None, typer.Option(help="How many layers of the shape. [default: all]")] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Say where each millisecond goes.")] = False,
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for the figures.")] = Path("runs/bench"),
    device: DEVICE = "auto",
    trust_remote_code: TRUST = False,
    as_json: JSON = False,
) -> None:
    """Measure speed and memory against the dense model, interleaved in one run: prefill and decode.

    Shapes: llama-2-7b, llama-2-13b, llama-3-8b, llama-3.2-1b, llama-3.2-3b.

    Example: [bold]probeprune bench --methods probe --batch-sizes 1,16 --lengths 128,512[/bold]
    Example: [bold]probeprune bench --shape llama-2-7b --layers 2 --batch-sizes 1[/bold]
    """
    from probeprune.bench.lines import BenchLine
    from probeprune.bench.measure import GridPoint, measure_point
    from probeprune.bench.plot import plot
    from probeprune.bench.tables import profile_table, tables
    from probeprune.calibration.collecting import calibrate

    chosen = [_method(name, shape) for name in names(methods, "methods")]
    check_ratio(ratio)
    points = [
        GridPoint(b, n) for b in _counts(batch_sizes, "batch-sizes") for n in _counts(lengths, "lengths")
    ]
    if rounds < 1 or new_tokens < 0:
        raise UsageError("--rounds must be at least 1 and --new-tokens at least 0.")
    if layers is not None and shape is None:
        raise UsageError("--layers goes with --shape; a real model has the layers it has.")
    all_threads = _counts(threads, "threads", least=0)
    figures: list[BenchLine] = []
    for dtype in names(dtypes, "dtypes"):
        with err.status("loading the model"):
            target = _target(model, shape, layers, dtype, device, trust_remote_code)
        with progress_bar() as show:
            windows = target.windows(8, max(p.length for p in points))
            moments = calibrate(
                target.model,
                windows,
                batch_size=4,
                progress=lambda n, of, show=show: show("calibration", n, of),  # type: ignore[misc]
            )
            known = {
                m.name: _refitted(m, moments, target.model, ratio, windows, show)
                if m.needs_refit
                else moments
                for m in chosen
            }
            for count in all_threads:
                with _threads(count):
                    for point in points:
                        figures += measure_point(
                            target,
                            chosen,
                            ratio,
                            point,
                            known=known,
                            new_tokens=new_tokens,
                            rounds=rounds,
                            progress=show,
                        )
    out_dir.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(f) + "\n" for f in figures)
    (out_dir / "bench.jsonl").write_text(lines, encoding="utf-8")
    plots = plot(figures, out_dir / "bench")
    if as_json:
        print(lines, end="")
    else:
        for table in tables(figures) + ([profile_table(figures)] if profile else []):
            out().print(table)
    say_written((out_dir / "bench.jsonl", *plots))


def _method(name: str, shape: str | None) -> Method:
    """A method that bench can time; on a shape with few layers none is left dense."""
    method = get_method(name)
    check_untrained(method)
    if method.needs_gradients:
        raise UsageError(f"bench takes no gradients; {name!r} runs as fast as ppsp, which cuts the same.")
    return method if shape is None else dataclasses.replace(method, skip_layers=0)


def _refitted(method: Method, moments: Any, model: Any, ratio: float, windows: Any, progress: Any) -> Any:
    """What a method that refits needs: made from a few windows, enough to be timed."""
    from probeprune.surgery import method_consumers, method_damages

    known = moments
    if method.needs_damages:
        curves = method_damages(model, method, windows, batch_size=4, progress=progress)
        known = dataclasses.replace(known, damages=curves)
    consumers = method_consumers(
        model, method, ratio, windows, statistics=known, batch_size=4, progress=progress
    )
    return dataclasses.replace(known, consumers=consumers)


def _target(
    model: str, shape: str | None, layers: int | None, dtype: str, device: str, trust_remote_code: bool
) -> Any:
    from probeprune.bench.targets import from_loaded, of_shape
    from probeprune.model.loading import choose_device, choose_dtype, load_model

    if shape is None:
        return from_loaded(load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code))
    target = choose_device(device)
    return of_shape(shape, layers, choose_dtype(dtype, target), target)


def _counts(text: str, option: str, least: int = 1) -> list[int]:
    """Whole numbers, separated by commas. Raises `UsageError` for anything else."""
    parts = names(text, option)
    if not all(p.isdecimal() and int(p) >= least for p in parts):
        raise UsageError(f"--{option} {text!r} must be whole numbers of at least {least}, like 1,16.")
    return [int(p) for p in parts]


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """So many CPU threads inside; 0 leaves them."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
