"""`probeprune table`: the whole grid of a preset, resumable, on this machine or a Ray cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from probeprune.cli.facts import missed_in
from probeprune.cli.groups import KeepTrained, LoadOptions, Memory, ResultOptions
from probeprune.cli.options import grouped
from probeprune.cli.terminal import (
    notices,
    print_line,
    print_rows,
    print_text,
    print_written,
    progress_bar,
    warn,
)
from probeprune.cli.values import names, numbers, one_of, size
from probeprune.errors import UsageError
from probeprune.experiment.cells import Cell
from probeprune.ranges import RANGES

if TYPE_CHECKING:
    from probeprune.experiment.executors import Cluster
    from probeprune.experiment.presets import Preset
    from probeprune.experiment.results import Results
    from probeprune.result_lines import Line

OUTPUT = ResultOptions(Path("runs/table"))


@dataclass(frozen=True)
class PresetOptions:
    """What is measured."""

    preset: Annotated[
        str,
        typer.Option(
            help="Grid to measure: laptop, paper or the path of a YAML file; --show prints a preset as "
            "an example."
        ),
    ] = "laptop"
    models: Annotated[
        str | None, typer.Option(help="Models, separated by commas; replaces those of the preset.")
    ] = None
    ratios: Annotated[
        str | None,
        typer.Option(help="Pruning ratios, separated by commas; replaces those of the preset."),
        RANGES["ratio"],
    ] = None
    seeds: Annotated[
        str | None,
        typer.Option(help="Random seeds, separated by commas; replaces those of the preset."),
        RANGES["seed"],
    ] = None

    def loaded(self) -> Preset:
        """The preset with its replacements. Raises `UsageError` for an unknown name or a bad value."""
        from probeprune.experiment.presets import load_preset

        changes: dict[str, Any] = {}
        if self.models is not None:
            changes["models"] = tuple(names(self.models, "models"))
        if self.ratios is not None:
            changes["ratios"] = tuple(numbers(self.ratios, "ratios", "ratio"))
        if self.seeds is not None:
            changes["seeds"] = tuple(numbers(self.seeds, "seeds", "seed"))
        return replace(load_preset(self.preset), **changes)


@dataclass(frozen=True)
class ExecutorOptions:
    """Where cells are measured."""

    executor: Annotated[
        str, typer.Option(help="Where to measure: local, or ray, which spreads the cells over a Ray cluster.")
    ] = "local"
    address: Annotated[
        str | None,
        typer.Option(
            help="Address of the Ray cluster; auto finds a running one.",
            show_default="a new cluster on this machine",
        ),
    ] = None
    workers: Annotated[
        int, typer.Option(help="Number of Ray workers that measure at the same time."), RANGES["workers"]
    ] = 2
    cell_gpus: Annotated[
        float | None,
        typer.Option(
            help="GPUs that Ray keeps free for each worker: a part of one, such as 0.5, or whole ones.",
            show_default="1 on CUDA",
        ),
        RANGES["gpus"],
    ] = None
    cell_memory: Annotated[
        str | None,
        typer.Option(
            help="Memory that Ray keeps free for each worker, such as 24GiB; a model on the CPU that needs "
            "more is read a layer at a time.",
            show_default="any amount",
        ),
    ] = None
    keep_trained: KeepTrained = True

    def cluster(self) -> Cluster:
        """Where Ray runs. Raises `UsageError` for a size that is none, and for one and a half GPUs."""
        from probeprune.experiment.executors import Cluster

        memory = None if self.cell_memory is None else size("cell-memory", self.cell_memory)
        return Cluster(self.address, self.workers, self.cell_gpus, memory)

    def check(self, memory: str | None) -> None:
        """Raise `UsageError` for an unknown executor or options it cannot honour."""
        from probeprune import processes

        one_of("executor", self.executor, ("local", "ray"))
        if processes.count() > 1:
            raise UsageError(
                "table measures in one process, or on a Ray cluster with --executor ray; start it without "
                "torchrun (several processes share the work of compare and prune)."
            )
        self.cluster()
        if self.executor == "ray" and memory is not None:
            raise UsageError(
                "on a Ray cluster, --cell-memory says what each worker may take; leave --memory out."
            )
        if self.executor == "local" and (self.cell_gpus is not None or self.cell_memory is not None):
            raise UsageError("--cell-gpus and --cell-memory are what Ray is asked for; add --executor ray.")
        if self.executor == "ray" and not self.keep_trained:
            raise UsageError(
                "--no-keep-trained needs --executor local: on a cluster, checkpoints may lie on other "
                "machines."
            )


@grouped
def table(
    *,
    preset: PresetOptions,
    show: Annotated[bool, typer.Option("--show", help="Print the file of the preset and stop.")] = False,
    output: ResultOptions = OUTPUT,
    executor: ExecutorOptions,
    load: LoadOptions,
    memory: Memory = None,
) -> None:
    """Measure a whole table: models x methods x ratios x seeds, on texts, tasks and cost.

    A method that a model cannot take is refused before anything runs. A cell that fails becomes a line of the
    table and does not end the run, but the exit code is then 1. A run that was interrupted continues when
    started again with the same options.

    Example: [bold]probeprune table --preset laptop --out runs/table[/bold]
    """
    from probeprune.experiment.ahead import check_methods
    from probeprune.experiment.presets import preset_file
    from probeprune.experiment.results import Results
    from probeprune.model.machine import choose_device, choose_dtype
    from probeprune.places import claimed
    from probeprune.provenance import dtype_name

    executor.check(memory)
    limit = None if memory is None else size("memory", memory)
    if show:
        print_text(preset_file(preset.preset).read_text(encoding="utf-8"), end="")
        return
    chosen = preset.loaded()
    device = choose_device(load.device)
    check_methods(chosen, load.trust_remote_code)
    cells = chosen.cells(dtype_name(choose_dtype(load.dtype, device)), device.type)
    with claimed(output.out_dir), notices():
        results = Results.open(output.out_dir)
        warn(results.problems)
        measured = sum(results.find(cell) is not None for cell in cells)
        print_line(f"{len(cells)} cells, {measured} of them measured already")
        rows = _measure(cells, results, output.out_dir, executor, load.trust_remote_code, limit)
        title = f"{preset.preset}: {chosen.description}" if chosen.description else preset.preset
        files = _write(rows, title, output.out_dir)
    print_rows(rows, title, output.as_json)
    warn(missed_in(rows))
    failed = sum(row["kind"] == "failure" for row in rows)
    if failed:
        print_line("the same command tries them again", "yellow", mark=f"{failed} cells failed;")
    print_written((results.path, *files))
    if failed:
        raise typer.Exit(1)


def _measure(
    cells: Sequence[Cell],
    results: Results,
    out_dir: Path,
    executor: ExecutorOptions,
    trust_remote_code: bool,
    memory: int | None,
) -> list[Line]:
    """The rows of all cells, in their order; those not in `results` yet are measured."""
    from probeprune.experiment.ahead import work_of
    from probeprune.experiment.executors import run_on_ray
    from probeprune.experiment.run import run_cells
    from probeprune.experiment.workbench import Workbench

    with progress_bar() as progress:
        if executor.executor == "ray":
            return run_on_ray(
                out_dir,
                results,
                cells,
                cluster=executor.cluster(),
                trust_remote_code=trust_remote_code,
                progress=progress,
                done=_print_done,
            )
        bench = Workbench(out_dir, progress, trust_remote_code, memory, work=work_of(cells))
        return run_cells(
            bench,
            results,
            cells,
            done=_print_done,
            keep_going=True,
            keep_trained=executor.keep_trained,
        )


def _write(rows: Sequence[Line], title: str, out_dir: Path) -> list[Path]:
    """Write the table, and the page where there is a result; returns the files."""
    from probeprune import report
    from probeprune.experiment.presets import published
    from probeprune.files import write_text

    files = [out_dir / "table.md"]
    write_text(files[0], report.markdown(rows, title))
    if any(row["kind"] == "result" for row in rows):
        files.append(out_dir / "report.html")
        report.write_html(rows, files[1], title, published=published())
    return files


def _print_done(cell: Cell, row: Line) -> None:
    subject = cell.subject
    outcome = f"{row['metric']} {row['value']:.4g}" if row["kind"] == "result" else f"FAILED: {row['error']}"
    line = f"{subject.label:<20} seed {subject.seed} {cell.measure.name:<14} {outcome}"
    print_line(line, "green", mark="done")
