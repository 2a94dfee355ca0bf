"""`probeprune compare`: methods x ratios on one model, one table."""

from pathlib import Path
from typing import Annotated, get_args

import typer

from probeprune.cli.common import (
    DEVICE,
    DTYPE,
    JSON,
    MODEL,
    TRUST,
    err,
    names,
    number,
    one_of,
    progress_bar,
    say_rows,
    say_written,
    warn,
)
from probeprune.data.windows import Sampling
from probeprune.errors import UsageError
from probeprune.methods import compose, get_method
from probeprune.model.blocks import UnitKind
from probeprune.strategies.allocation import check_ratio


def compare(
    model: MODEL = "smollm2-135m",
    methods: Annotated[
        str, typer.Option(help="Methods, separated by commas; see `probeprune methods`.")
    ] = "dense,wanda-sp,flap,llm-pruner,loraprune,probe,full-batch,best-static,best-dynamic",
    ratios: Annotated[str, typer.Option(help="Pruning ratios, separated by commas.")] = "0.2,0.4",
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for results, table and plot.")] = Path(
        "runs/compare"
    ),
    windows: Annotated[int, typer.Option(help="Evaluation windows, from the front; 0 for all.")] = 24,
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
    skip_layers: Annotated[
        int | None,
        typer.Option(help="First layers that stay dense, instead of the methods' own (3, mostly)."),
    ] = None,
    sampling: Annotated[
        str,
        typer.Option(
            help="in-order, or published: random windows averaged by batch, as in the paper's code."
        ),
    ] = "in-order",
    train_steps: Annotated[int, typer.Option(help="For methods with `+lora`: optimiser steps.")] = 100,
    train_tokens: Annotated[
        int | None, typer.Option(help="Instead of steps: tokens of training text, about so many.")
    ] = None,
    train_batch_size: Annotated[int, typer.Option(help="Sequences a training step.")] = 4,
    train_length: Annotated[int, typer.Option(help="Tokens a training sequence.")] = 256,
    train_rate: Annotated[float, typer.Option(help="Learning rate of training.")] = 5e-4,
    train_text: Annotated[str, typer.Option(help="Text to train on.")] = "c4",
    keep_trained: Annotated[
        bool, typer.Option(help="Keep the checkpoints of trained models in OUT/trained.")
    ] = True,
    seed: Annotated[int, typer.Option(help="Draws calibration windows, and what methods draw.")] = 0,
    dtype: DTYPE = "auto",
    device: DEVICE = "auto",
    trust_remote_code: TRUST = False,
    as_json: JSON = False,
) -> None:
    """Prune a model by several methods and compare each with the dense model.

    Any method that prunes once can be had with LoRA training, `llm-pruner+lora` say; `dense+lora` is the
    control. Started again with the same settings, it continues where it was.

    Example: [bold]probeprune compare smollm2-135m --methods dense,probe --ratios 0.2,0.4,0.6[/bold]
    """
    from probeprune import report
    from probeprune.data.windows import Text
    from probeprune.experiment.cells import Cell, Setting, TextMeasure, TrainingBudget, grid, subject
    from probeprune.experiment.results import Results
    from probeprune.experiment.run import run_cells
    from probeprune.experiment.workbench import Workbench
    from probeprune.model.loading import load_model, source_fingerprint
    from probeprune.provenance import dtype_name
    from probeprune.result_lines import Line

    for name, value in (("windows", windows + 1), ("length", length - 1), ("batch-size", batch_size)):
        if value < 1:
            raise UsageError(f"--{name} is too small.")
    one_of("unit kind", units, get_args(UnitKind))
    one_of("sampling", sampling, get_args(Sampling))
    changes: dict[str, object] = {"unit_kind": units}
    if skip_layers is not None:
        changes["skip_layers"] = skip_layers
    chosen = [
        m if not m.when.prunes else compose(m, name=m.name, **changes)
        for m in map(get_method, names(methods, "methods"))
    ]
    shares = [number(r) for r in names(ratios, "ratios")]
    for share in shares:
        check_ratio(share)
    if train_tokens is not None:
        train_steps = max(round(train_tokens / (train_batch_size * train_length)), 1)
    budget = TrainingBudget(train_steps, train_batch_size, train_length, train_rate, train_text)
    with err.status("loading the model"):
        loaded = load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    # Of a local model's files: read once, not for every cell.
    weights = source_fingerprint(model)
    setting = Setting(
        model,
        dtype_name(loaded.dtype),
        loaded.device.type,
        Text(calibration, calibration_windows, length),
        budget,
        weights,
    )
    subjects = [subject(setting, method, share, seed) for method in chosen for share in shares]
    measure = TextMeasure(
        corpus=corpus,
        windows=windows or None,
        length=length,
        batch_size=batch_size,
        sampling=sampling,  # type: ignore[arg-type]
        averaging="published" if sampling == "published" else "token",
        seed=seed if sampling == "published" else 0,
    )
    results = Results.open(out_dir)
    warn(results.problems)

    def done(cell: Cell, row: Line) -> None:
        err.print(
            f"[green]done[/green] {cell.subject.label:<16} perplexity {row['value']:.2f}", highlight=False
        )

    with progress_bar() as show:
        bench = Workbench(out_dir, show, trust_remote_code)
        bench.take(loaded)
        rows = run_cells(bench, results, grid(subjects, [measure]), done=done, keep_trained=keep_trained)
    title = (
        f"{model}, {corpus}: {rows[0]['windows']} windows of {length} in batches of {batch_size}; "
        f"calibrated on {calibration_windows} of {calibration}; {rows[0]['dtype']}, {rows[0]['device']}, "
        f"{rows[0]['threads']} threads"
    )
    (out_dir / "table.md").write_text(report.markdown(rows, title), encoding="utf-8")
    plots = report.plot(rows, title.replace("; calibrated", ";\ncalibrated"), out_dir / "plot")
    say_rows(rows, title, as_json)
    say_written((results.path, out_dir / "table.md", *plots))
