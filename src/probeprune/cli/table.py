"""`probeprune table`: a preset's whole grid, resumable, on this machine or a Ray cluster."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from probeprune.cli.common import (
    DEVICE,
    DTYPE,
    JSON,
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
from probeprune.errors import UsageError


def table(
    preset: Annotated[
        str, typer.Option(help="laptop, paper, or a YAML file of your own (see --show).")
    ] = "laptop",
    models: Annotated[str | None, typer.Option(help="Instead of the preset's, separated by commas.")] = None,
    ratios: Annotated[str | None, typer.Option(help="Likewise.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Likewise.")] = None,
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for results, table and report.")] = Path(
        "runs/table"
    ),
    executor: Annotated[str, typer.Option(help="local, or ray: cells spread over a Ray cluster.")] = "local",
    address: Annotated[
        str | None, typer.Option(help="Of a Ray cluster (auto finds one); none starts one on this machine.")
    ] = None,
    workers: Annotated[int, typer.Option(help="Ray workers that measure at the same time.")] = 2,
    keep_trained: Annotated[
        bool, typer.Option(help="Keep the checkpoints of trained models in OUT/trained.")
    ] = True,
    show: Annotated[bool, typer.Option("--show", help="Print the preset's file and stop.")] = False,
    dtype: DTYPE = "auto",
    device: DEVICE = "auto",
    trust_remote_code: TRUST = False,
    as_json: JSON = False,
) -> None:
    """Measure a whole table: models x methods x ratios x seeds, on texts, tasks and cost.

    A cell that fails is reported in the table and does not end the run. Killed and started again, it goes on
    where it was.

    Example: [bold]probeprune table --preset laptop --out runs/table[/bold]
    """
    from probeprune import report
    from probeprune.experiment.cells import Cell
    from probeprune.experiment.executors import Cluster, run_on_ray
    from probeprune.experiment.presets import load_preset, preset_file, published
    from probeprune.experiment.results import Results
    from probeprune.experiment.run import run_cells
    from probeprune.experiment.workbench import Workbench
    from probeprune.model.loading import choose_device, choose_dtype
    from probeprune.provenance import dtype_name
    from probeprune.result_lines import Line

    one_of("executor", executor, ("local", "ray"))
    if workers < 1:
        raise UsageError("--workers must be at least 1.")
    if executor == "ray" and not keep_trained:
        raise UsageError(
            "--no-keep-trained needs --executor local: on a cluster, checkpoints may lie on other machines."
        )
    if show:
        print(preset_file(preset).read_text(encoding="utf-8"), end="")
        return
    chosen = load_preset(preset)
    if models is not None:
        chosen = replace(chosen, models=tuple(names(models, "models")))
    if ratios is not None:
        chosen = replace(chosen, ratios=tuple(number(r) for r in names(ratios, "ratios")))
    if seeds is not None:
        chosen = replace(chosen, seeds=tuple(int(number(s)) for s in names(seeds, "seeds")))
    where = choose_device(device)
    cells = chosen.cells(dtype_name(choose_dtype(dtype, where)), where.type)
    results = Results.open(out_dir)
    warn(results.problems)
    known = sum(results.find(c) is not None for c in cells)
    err.print(f"{len(cells)} cells, {known} measured already", highlight=False)

    def done(cell: Cell, row: Line) -> None:
        said = f"{row['metric']} {row['value']:.4g}" if row["kind"] == "result" else f"FAILED: {row['error']}"
        what = f"{cell.subject.label:<20} seed {cell.subject.seed} {cell.measure.name:<14}"
        err.print(
            f"[green]done[/green] {what} {said}",
            highlight=False,
            soft_wrap=True,
        )

    with progress_bar() as progress:
        if executor == "ray":
            rows = run_on_ray(
                out_dir,
                results,
                cells,
                cluster=Cluster(address, workers),
                trust_remote_code=trust_remote_code,
                progress=progress,
                done=done,
            )
        else:
            bench = Workbench(out_dir, progress, trust_remote_code)
            rows = run_cells(bench, results, cells, done=done, keep_going=True, keep_trained=keep_trained)
    title = f"{preset}: {chosen.description}" if chosen.description else preset
    (out_dir / "table.md").write_text(report.markdown(rows, title), encoding="utf-8")
    files = [results.path, out_dir / "table.md"]
    if any(row["kind"] == "result" for row in rows):
        report.write_html(rows, out_dir / "report.html", title, published=published())
        files.append(out_dir / "report.html")
    say_rows(rows, title, as_json)
    failed = sum(row["kind"] == "failure" for row in rows)
    if failed:
        err.print(
            f"[yellow]{failed} cells failed[/yellow]; the same command tries them again", highlight=False
        )
    say_written(files)
