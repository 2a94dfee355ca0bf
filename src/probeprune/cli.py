"""The command line: thin commands over the library.

Bad input ends with one sentence and exit code 2, never a traceback; Ctrl-C too, and what was measured stays.
"""

import dataclasses
import errno
import json
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from probeprune.blocks import FAMILIES, UnitKind
from probeprune.errors import UsageError
from probeprune.methods import METHODS, compose, get_method, unknown

app = typer.Typer(
    name="probeprune",
    help="Structured pruning of causal language models, dynamic and static, measured alike.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
err = Console(stderr=True)

INTERRUPTED = "interrupted; what was measured is saved, the same command continues from there."

MODEL = Annotated[
    str, typer.Argument(help="`smollm2-135m` (embedded), a local directory, a GGUF file or a hub id.")
]
DTYPE = Annotated[
    str, typer.Option(help="auto (the faster of bfloat16 and float32, measured), bfloat16, float16, float32.")
]
DEVICE = Annotated[str, typer.Option(help="auto, cpu, cuda, mps.")]
TRUST = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
JSON = Annotated[bool, typer.Option("--json", help="Print JSON lines instead of a table.")]


def out() -> Console:
    """Standard output; tables keep their width where the output is not a terminal."""
    return Console(width=None if sys.stdout.isatty() else 130)


@contextmanager
def progress_bar():  # type: ignore[no-untyped-def]
    """A bar on stderr; yields a function of (what, done, total)."""
    columns = (
        TextColumn("{task.description:<18}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True) as bar:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                for task in tasks.values():
                    bar.update(task, visible=False)
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield show


@app.command()
def compare(
    model: MODEL = "smollm2-135m",
    methods: Annotated[
        str, typer.Option(help="Methods, separated by commas; see `probeprune methods`.")
    ] = "dense,wanda-sp,flap,probe,full-batch",
    ratios: Annotated[str, typer.Option(help="Pruning ratios, separated by commas.")] = "0.2,0.4",
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for results, table and plot.")] = Path(
        "runs/compare"
    ),
    windows: Annotated[int, typer.Option(help="Evaluation windows, from the front; 0 for all.")] = 48,
    length: Annotated[int, typer.Option(help="Tokens a window, for evaluation and calibration.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Windows a batch; dynamic methods prune at each.")] = 16,
    corpus: Annotated[
        str, typer.Option(help="Evaluation text: an embedded name, file or hub id.")
    ] = "wikitext2",
    calibration: Annotated[str, typer.Option(help="Calibration text, likewise.")] = "c4",
    calibration_windows: Annotated[int, typer.Option(help="Windows of calibration text.")] = 128,
    units: Annotated[
        str, typer.Option(help="Attention units under grouped-query attention: group, balanced, query.")
    ] = "group",
    skip_layers: Annotated[int, typer.Option(help="First layers that stay dense.")] = 3,
    sampling: Annotated[
        str,
        typer.Option(
            help="in-order, or published: random windows averaged by batch, as in the paper's code."
        ),
    ] = "in-order",
    seed: Annotated[int, typer.Option(help="Draws the calibration windows.")] = 0,
    dtype: DTYPE = "auto",
    device: DEVICE = "auto",
    trust_remote_code: TRUST = False,
    as_json: JSON = False,
) -> None:
    """Prune a model by several methods and compare each with the dense model.

    Started again with the same settings, it continues where it was.

    Example: [bold]probeprune compare smollm2-135m --methods dense,probe --ratios 0.2,0.4,0.6[/bold]
    """
    from probeprune import experiment, report
    from probeprune.models import load_model

    for name, value in (("windows", windows + 1), ("length", length - 1), ("batch-size", batch_size)):
        if value < 1:
            raise UsageError(f"--{name} is too small.")
    if units not in get_args(UnitKind):
        raise UsageError(unknown("unit kind", units, get_args(UnitKind)))
    chosen = [
        m if m.when == "never" else compose(m, name=m.name, units=units, skip_layers=skip_layers)
        for m in map(get_method, names(methods, "methods"))
    ]
    cells = experiment.grid(chosen, [number(r) for r in names(ratios, "ratios")])
    with err.status("loading the model"):
        loaded = load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    settings = experiment.Settings(
        model=model,
        dtype=str(loaded.dtype).removeprefix("torch."),
        device=loaded.device.type,
        calibration=calibration,
        calibration_windows=calibration_windows,
        corpus=corpus,
        windows=windows or None,
        length=length,
        batch_size=batch_size,
        seed=seed,
        sampling=sampling,
        averaging="published" if sampling == "published" else "token",
    )
    results = experiment.Results.open(out_dir, settings)
    rows: list[dict[str, Any]] = []

    def done(cell: experiment.Cell, row: dict[str, Any]) -> None:
        rows.append(row)
        err.print(f"[green]done[/green] {cell.label:<16} perplexity {row['value']:.2f}", highlight=False)

    with progress_bar() as show:
        experiment.run(loaded, results, cells, progress=show, done=done)
    title = (
        f"{model}, {corpus}: {len(rows[0]['losses'])} windows of {length} in batches of {batch_size}; "
        f"calibrated on {calibration_windows} of {calibration}; {settings.dtype}, {settings.device}, "
        f"{rows[0]['threads']} threads"
    )
    (out_dir / "table.md").write_text(report.markdown(rows, title), encoding="utf-8")
    plots = report.plot(rows, title.replace("; calibrated", ";\ncalibrated"), out_dir / "plot")
    if as_json:
        for row in rows:
            print(json.dumps(row))
    else:
        out().print(report.table(rows, title))
    files = ", ".join(str(p) for p in (results.path, out_dir / "table.md", *plots))
    err.print(f"written: {files}", highlight=False, soft_wrap=True)


@app.command()
def bench(
    model: MODEL = "smollm2-135m",
    methods: Annotated[str, typer.Option(help="Methods, separated by commas.")] = "ppsp,probe",
    ratio: Annotated[float, typer.Option(help="Pruning ratio.")] = 0.4,
    batch_size: Annotated[int, typer.Option(help="Sequences a batch.")] = 16,
    length: Annotated[int, typer.Option(help="Tokens a sequence.")] = 512,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds; medians are reported.")] = 5,
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for the figures.")] = Path("runs/bench"),
    dtype: DTYPE = "auto",
    device: DEVICE = "auto",
    trust_remote_code: TRUST = False,
    as_json: JSON = False,
) -> None:
    """Measure speed and memory against the dense model, interleaved in one run.

    Example: [bold]probeprune bench --methods probe --ratio 0.4 --batch-size 16 --length 512[/bold]
    """
    from probeprune import bench as benchmark
    from probeprune.models import load_model

    chosen = [get_method(name) for name in names(methods, "methods")]
    with err.status("loading the model"):
        loaded = load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    with progress_bar() as show:
        figures = benchmark.bench(
            loaded, chosen, ratio, batch_size=batch_size, length=length, rounds=rounds, progress=show
        )
    out_dir.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(f) + "\n" for f in figures)
    (out_dir / "bench.jsonl").write_text(lines, encoding="utf-8")
    if as_json:
        print(lines, end="")
    else:
        out().print(benchmark.table(figures))


@app.command("methods")
def list_methods(as_json: JSON = False) -> None:
    """List the methods and what each is composed of.

    Example: [bold]probeprune methods[/bold]
    """
    if as_json:
        for m in METHODS.values():
            print(json.dumps(dataclasses.asdict(m)))
        return
    columns = ("method", "importance", "allocation", "compensation", "when", "source")
    table = Table(*columns, title="methods: an order and a cut for every block", title_justify="left")
    for m in METHODS.values():
        parts = [m.importance, m.allocation, m.compensation] if m.when != "never" else ["-"] * 3
        table.add_row(m.name, *parts, {"batch": "every batch"}.get(m.when, m.when), m.source)
    out().print(table)


@app.command("models")
def list_models(as_json: JSON = False) -> None:
    """List the model families that can be pruned.

    Example: [bold]probeprune models[/bold]
    """
    if as_json:
        for f in FAMILIES:
            print(json.dumps({"family": f.name, "model_types": f.model_types}))
        return
    table = Table("family", "model_type in config.json", title="supported families", title_justify="left")
    for f in FAMILIES:
        table.add_row(f.name, ", ".join(f.model_types))
    out().print(table)
    out().print("A model is a local directory, a hub id, a GGUF file, or smollm2-135m, which is embedded.")


def names(text: str, option: str) -> list[str]:
    """The parts of a comma-separated option. Raises `UsageError` for none."""
    parts = [p.strip() for p in text.split(",") if p.strip()]
    if not parts:
        raise UsageError(f"--{option} is empty; give at least one, separated by commas.")
    return parts


def number(text: str) -> float:
    """A number. Raises `UsageError` for anything else."""
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"{text!r} is not a number; ratios look like 0.2,0.4.") from None


def main() -> None:
    """Run the command line; turns what the user can mend into one sentence and exit code 2."""
    sys.exit(run(app))


def run(command: Callable[[], Any]) -> int:
    """The exit code of a command, its error printed."""
    try:
        command()
    except (UsageError, FloatingPointError) as error:
        complain(str(error))
    except KeyboardInterrupt:
        complain(INTERRUPTED)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        complain(f"{error.strerror}: {error.filename or 'output'}; free space or choose another --out.")
    except SystemExit as end:
        if end.code != 130:
            return int(end.code or 0)
        complain(INTERRUPTED)  # typer ends a command that was interrupted in silence
    else:
        return 0
    return 2


def complain(sentence: str) -> None:
    """One sentence on stderr."""
    err.print("[red]probeprune:[/red]", sentence, highlight=False, soft_wrap=True, markup=True)
