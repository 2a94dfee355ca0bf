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

from probeprune.allocation import check_ratio
from probeprune.blocks import FAMILIES, UnitKind
from probeprune.checkpoint import Layout
from probeprune.errors import UsageError
from probeprune.methods import METHODS, Method, compose, evenly, get_method, unknown

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

STEPS = Annotated[int, typer.Option(help="Optimiser steps.")]
TRAIN_BATCH = Annotated[int, typer.Option(help="Sequences a step, over all processes.")]
MICRO = Annotated[int, typer.Option(help="Sequences a forward pass of one process (memory).")]
RATE = Annotated[float, typer.Option(help="Learning rate, falling linearly to zero.")]
RANK = Annotated[int, typer.Option(help="Rank of LoRA.")]
ALPHA = Annotated[int, typer.Option(help="Alpha of LoRA; alpha / rank scales it.")]
DROPOUT = Annotated[float, typer.Option(help="Dropout in front of LoRA.")]
PACKING = Annotated[
    bool, typer.Option("--packing", help="Put documents one after the other instead of cutting each.")
]
CHECKPOINTING = Annotated[
    bool, typer.Option("--gradient-checkpointing", help="Less memory, a third more time.")
]
CORPUS = Annotated[str, typer.Option(help="Text that perplexity is measured on, before and after.")]
WINDOWS = Annotated[int, typer.Option(help="Windows of 512 tokens of it; 0 measures nothing.")]


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
    bar = Progress(*columns, console=err, transient=True)
    tasks: dict[str, Any] = {}

    def show(what: str, done: int, total: int) -> None:
        bar.start()  # not before: a bar that shows nothing leaves an empty line
        if what not in tasks:
            for task in tasks.values():
                bar.update(task, visible=False)
            tasks[what] = bar.add_task(what, total=total)
        bar.update(tasks[what], completed=done, total=total)

    try:
        yield show
    finally:
        if tasks:
            bar.stop()


@app.command()
def compare(
    model: MODEL = "smollm2-135m",
    methods: Annotated[
        str, typer.Option(help="Methods, separated by commas; see `probeprune methods`.")
    ] = "dense,wanda-sp,flap,llm-pruner,loraprune,probe,full-batch",
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
    one_of("unit kind", units, get_args(UnitKind))
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
def prune(
    method: Annotated[str, typer.Option(help="A static method; see `probeprune methods`.")],
    ratio: Annotated[float, typer.Option(help="Share of the blocks' parameters to remove.")],
    out_dir: Annotated[Path, typer.Option("--out", help="Directory for the checkpoint; new or empty.")],
    model: MODEL = "smollm2-135m",
    layout: Annotated[
        str,
        typer.Option(
            help="uniform: all layers get one width, opens with plain transformers; per-layer: widths of "
            "their own, opens with probeprune imported or with trust_remote_code."
        ),
    ] = "uniform",
    round_to: Annotated[int, typer.Option(help="MLP widths are multiples of this (for speed).")] = 64,
    skip_layers: Annotated[
        int | None, typer.Option(help="First layers that stay dense (per-layer only). [default: 3]")
    ] = None,
    units: Annotated[
        str, typer.Option(help="Attention units under grouped-query attention: group, balanced.")
    ] = "group",
    blocks: Annotated[str, typer.Option(help="What is pruned, separated by commas.")] = "attention,mlp",
    allocation: Annotated[
        str | None, typer.Option(help="Instead of the method's own (per-layer only): uniform, global ...")
    ] = None,
    compensation: Annotated[str | None, typer.Option(help="Instead of the method's own: none, bias.")] = None,
    steps: Annotated[int, typer.Option(help="Reach the ratio in this many steps, calibrating anew.")] = 1,
    calibration: Annotated[str, typer.Option(help="Text: an embedded name, file or hub id.")] = "c4",
    calibration_windows: Annotated[int, typer.Option(help="Windows for statistics.")] = 128,
    length: Annotated[int, typer.Option(help="Tokens a window.")] = 512,
    corpus: Annotated[str, typer.Option(help="Text the cost in quality is measured on.")] = "wikitext2",
    windows: Annotated[int, typer.Option(help="Windows of it, before and after; 0 measures nothing.")] = 16,
    batch_size: Annotated[int, typer.Option(help="Windows a forward pass.")] = 16,
    seed: Annotated[int, typer.Option(help="Draws the calibration windows and what a method draws.")] = 0,
    dtype: DTYPE = "auto",
    device: DEVICE = "auto",
    trust_remote_code: TRUST = False,
    as_json: JSON = False,
) -> None:
    """Prune a model once, for good, and save a smaller checkpoint that opens anywhere.

    Example: [bold]probeprune prune smollm2-135m --method llm-pruner --ratio 0.2 --out pruned[/bold]
    """
    from probeprune import pipeline
    from probeprune.checkpoint import check_free
    from probeprune.data import Text
    from probeprune.models import load_model

    check_free(out_dir)
    chosen = static_method(
        method, layout, round_to, skip_layers, units, names(blocks, "blocks"), allocation, compensation, seed
    )
    check_ratio(ratio)
    with err.status("loading the model"):
        loaded = load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    with progress_bar() as show:
        record = pipeline.prune_to(
            loaded,
            chosen,
            ratio,
            out_dir,
            layout=layout,  # type: ignore[arg-type]
            calibration=Text(calibration, calibration_windows, length),
            evaluation=Text(corpus, windows, length),
            steps=steps,
            batch_size=batch_size,
            seed=seed,
            save_dtype=loaded.stored_dtype if dtype == "auto" else loaded.dtype,
            progress=show,
        )
    before, after = record["parameters"]
    did = (
        f"{record['removed_share']:.1%} of the blocks removed, {before / 1e6:.1f} M -> {after / 1e6:.1f} M "
        f"parameters, in {record['seconds']:.0f} s"
    )
    say_saved(record, out_dir, did, ("dense", "pruned"), as_json)


@app.command()
def recover(
    model: Annotated[str, typer.Argument(help="A pruned checkpoint, or any model.")],
    out_dir: Annotated[Path, typer.Option("--out", help="Directory for the result; new or empty.")],
    steps: STEPS = 600,
    batch_size: TRAIN_BATCH = 64,
    micro_batch: MICRO = 4,
    length: Annotated[int, typer.Option(help="Tokens a sequence.")] = 256,
    learning_rate: RATE = 1e-4,
    warmup_steps: Annotated[int, typer.Option(help="Steps in which the learning rate rises.")] = 100,
    lora: Annotated[bool, typer.Option(help="Train LoRA adapters, or all weights.")] = True,
    rank: RANK = 8,
    alpha: ALPHA = 16,
    dropout: DROPOUT = 0.05,
    merge: Annotated[bool, typer.Option("--merge", help="Fold the adapter into a plain checkpoint.")] = False,
    text: Annotated[str, typer.Option(help="Training text: an embedded name, file or hub id.")] = "c4",
    packing: PACKING = False,
    evaluate_every: Annotated[int, typer.Option(help="Steps between evaluations, and checkpoints.")] = 100,
    patience: Annotated[
        int | None, typer.Option(help="Stop after so many evaluations without a better one.")
    ] = None,
    checkpointing: CHECKPOINTING = False,
    corpus: CORPUS = "wikitext2",
    windows: WINDOWS = 16,
    seed: Annotated[int, typer.Option(help="Of data order, adapters and dropout.")] = 0,
    dtype: DTYPE = "auto",
    device: DEVICE = "auto",
    trust_remote_code: TRUST = False,
    as_json: JSON = False,
) -> None:
    """Train a pruned model again, so that it recovers what pruning lost.

    The result is a PEFT adapter, with --merge a checkpoint. Killed and started again, it goes on from there.
    Under `torchrun -m probeprune recover ...` or `accelerate launch` several processes share the work.

    Example: [bold]probeprune recover pruned --out recovered --merge[/bold]
    """
    from probeprune.checkpoint import check_free
    from probeprune.data import Text
    from probeprune.training import jobs
    from probeprune.training.settings import Lora, Training

    check_free(out_dir)
    training = Training(
        steps=steps,
        batch_size=batch_size,
        micro_batch=micro_batch,
        length=length,
        learning_rate=learning_rate,
        warmup_steps=warmup_steps,
        lora=Lora(rank, alpha, dropout) if lora else None,
        evaluate_every=evaluate_every,
        patience=patience,
        gradient_checkpointing=checkpointing,
        seed=seed,
    )
    loaded = load_for_training(model, dtype, device, trust_remote_code)
    with progress_bar() as show:
        record = jobs.recover_to(
            loaded,
            out_dir,
            training,
            corpus=text,
            packing=packing,
            evaluation=Text(corpus, windows),
            merge=merge,
            save_dtype=loaded.stored_dtype if dtype == "auto" else loaded.dtype,
            progress=show,
        )
    say_trained(record, out_dir, as_json)


@app.command()
def loraprune(
    ratio: Annotated[float, typer.Option(help="Share of the blocks' parameters to remove.")],
    out_dir: Annotated[Path, typer.Option("--out", help="Directory for the checkpoint; new or empty.")],
    model: MODEL = "smollm2-135m",
    layout: Annotated[str, typer.Option(help="uniform or per-layer, as in `prune`.")] = "uniform",
    round_to: Annotated[int, typer.Option(help="MLP widths are multiples of this (for speed).")] = 64,
    skip_layers: Annotated[
        int | None, typer.Option(help="First layers that are not pruned (per-layer only). [default: a tenth]")
    ] = None,
    steps: STEPS = 300,
    batch_size: TRAIN_BATCH = 128,
    micro_batch: MICRO = 4,
    length: Annotated[int, typer.Option(help="Tokens a sequence.")] = 512,
    learning_rate: RATE = 1e-4,
    rank: RANK = 8,
    alpha: ALPHA = 16,
    dropout: DROPOUT = 0.05,
    text: Annotated[str, typer.Option(help="Training text: an embedded name, file or hub id.")] = "c4",
    packing: PACKING = False,
    evaluate_every: Annotated[int, typer.Option(help="Steps between evaluations, and checkpoints.")] = 50,
    checkpointing: CHECKPOINTING = False,
    corpus: CORPUS = "wikitext2",
    windows: WINDOWS = 16,
    seed: Annotated[int, typer.Option(help="Of data order, adapters and dropout.")] = 0,
    dtype: DTYPE = "auto",
    device: DEVICE = "auto",
    trust_remote_code: TRUST = False,
    as_json: JSON = False,
) -> None:
    """Prune a model while LoRA trains it (LoRAPrune), and save the smaller, merged checkpoint.

    Example: [bold]probeprune loraprune smollm2-135m --ratio 0.2 --out pruned[/bold]
    """
    from probeprune.checkpoint import check_free
    from probeprune.data import Text
    from probeprune.training import jobs
    from probeprune.training.settings import Lora, Training

    check_free(out_dir)
    check_ratio(ratio)
    one_of("layout", layout, get_args(Layout))
    if layout == "uniform" and skip_layers:
        raise UsageError("the uniform layout gives all layers one width: leave --skip-layers out.")
    training = Training(
        steps=steps,
        batch_size=batch_size,
        micro_batch=micro_batch,
        length=length,
        learning_rate=learning_rate,
        warmup_steps=0,
        lora=Lora(rank, alpha, dropout),
        evaluate_every=evaluate_every,
        keep_best=False,
        gradient_checkpointing=checkpointing,
        seed=seed,
    )
    loaded = load_for_training(model, dtype, device, trust_remote_code)
    with progress_bar() as show:
        record = jobs.loraprune_to(
            loaded,
            ratio,
            out_dir,
            training,
            layout=layout,  # type: ignore[arg-type]
            round_to=round_to,
            skip_layers=skip_layers,
            corpus=text,
            packing=packing,
            evaluation=Text(corpus, windows),
            save_dtype=loaded.stored_dtype if dtype == "auto" else loaded.dtype,
            progress=show,
        )
    say_trained(record, out_dir, as_json)


def load_for_training(model: str, dtype: str, device: str, trust_remote_code: bool) -> Any:
    """The model in every process, each on its own device."""
    from probeprune.models import load_model
    from probeprune.training import processes

    processes.join(device)
    with err.status("loading the model"):
        loaded = load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        chosen = processes.agreed(loaded.dtype)  # auto measures, so processes could differ
        loaded.model.to(chosen)
    return dataclasses.replace(loaded, dtype=chosen)


def say_trained(record: dict[str, Any], out_dir: Path, as_json: bool) -> None:
    """The outcome of a training run, once."""
    from probeprune.training import processes

    if not processes.is_first():
        return
    before, after = record["held_out_loss"]
    did = (
        f"{record['steps']} steps, {record['tokens']:,} tokens in {record['seconds']:.0f} s; held-out loss "
        f"{before:.3f} -> {after:.3f}"
    )
    say_saved(record, out_dir, did, ("before", "after"), as_json)


def say_saved(
    record: dict[str, Any], out_dir: Path, did: str, measured: tuple[str, str], as_json: bool
) -> None:
    """What was written and what it gave: the record as JSON, or two lines."""
    if as_json:
        print(json.dumps(record))
        return
    err.print(f"[green]saved[/green] {out_dir}: {did}", highlight=False, soft_wrap=True)
    if record["evaluation"] is not None:
        found = record["evaluation"]["perplexity"]
        figures = ", ".join(f"{what} {found[what]:.2f}" for what in measured)
        print(f"{record['evaluation']['corpus']} perplexity: {figures}")


def static_method(
    name: str,
    layout: str,
    round_to: int,
    skip_layers: int | None,
    units: str,
    blocks: list[str],
    allocation: str | None,
    compensation: str | None,
    seed: int,
) -> Method:
    """The method that the options of `prune` compose. Raises `UsageError` for what does not go together."""
    one_of("layout", layout, get_args(Layout))
    one_of("unit kind", units, get_args(UnitKind))
    method = get_method(name)
    changes: dict[str, Any] = {"units": units, "round_to": round_to, "blocks": tuple(blocks), "seed": seed}
    if compensation is not None:
        changes["compensation"] = compensation
    if layout == "uniform":
        if skip_layers or allocation:
            raise UsageError(
                "the uniform layout gives all layers one width: leave --skip-layers and --allocation out, or "
                "use --layout per-layer."
            )
        method = evenly(method)
    else:
        changes["skip_layers"] = 3 if skip_layers is None else skip_layers
        if allocation is not None:
            changes["allocation"] = allocation
    return compose(method, name=method.name, **changes)


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


def one_of(what: str, given: str, known: tuple[str, ...]) -> None:
    """Raise `UsageError` unless `given` is one of the known names."""
    if given not in known:
        raise UsageError(unknown(what, given, known))


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
