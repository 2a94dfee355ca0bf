"""`probeprune compare`: methods x ratios on one model, one table."""

import json
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from probeprune.blocks import UnitKind
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
    out,
    progress_bar,
)
from probeprune.errors import UsageError
from probeprune.methods import compose, get_method


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
