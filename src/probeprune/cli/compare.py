"""`probeprune compare`: methods x ratios on one model, one table."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, cast, get_args

import typer

from probeprune.cli.facts import is_dense, missed_in, with_rule
from probeprune.cli.groups import (
    TEXT,
    CalibrationOptions,
    KeepTrained,
    LoadOptions,
    Memory,
    Model,
    PaysRule,
    ResultOptions,
)
from probeprune.cli.options import grouped
from probeprune.cli.terminal import drawn, notices, print_line, print_rows, print_written, progress_bar, warn
from probeprune.cli.values import names, numbers, one_of, size
from probeprune.data.windows import Sampling, Text
from probeprune.errors import UsageError
from probeprune.experiment.cells import (
    Cell,
    CostMeasure,
    Measure,
    Setting,
    TextMeasure,
    TrainingBudget,
)
from probeprune.methods import Method, compose, get_method
from probeprune.model.blocks import UnitKind
from probeprune.model.loading import EMBEDDED_MODEL, LoadedModel
from probeprune.ranges import RANGES

if TYPE_CHECKING:
    from probeprune.experiment.cells import Subject
    from probeprune.result_lines import Line

METHODS = "dense,wanda-sp,flap,llm-pruner,loraprune,probe,full-batch,best-static,best-dynamic"
"""Compared by default: every published method of the table, and this project's own."""

SPEED_BATCH = 2
"""Largest number of prompts that are timed at once: all rounds together take less than the perplexities."""

MANY = 512
"""Number of windows to make room for where all of a text are read; more take no more room on disk."""

OUTPUT = ResultOptions(Path("runs/compare"))


@dataclass(frozen=True)
class GridOptions:
    """What is compared."""

    methods: Annotated[
        str, typer.Option(help="Methods, separated by commas; `probeprune methods` lists all.")
    ] = METHODS
    ratios: Annotated[
        str,
        typer.Option(help="Pruning ratios, separated by commas: shares of the parameters of all blocks."),
        RANGES["ratio"],
    ] = "0.2,0.4"
    units: Annotated[
        str, typer.Option(help="Attention units under grouped-query attention: group, balanced or query.")
    ] = Method.unit_kind
    skip_layers: Annotated[
        int | None,
        typer.Option(
            help="Number of leading layers to leave dense.", show_default="each method's own, mostly 3"
        ),
        RANGES["skip_layers"],
    ] = None

    pays: PaysRule = None

    def composed(self) -> list[Method]:
        """The methods with these units and skipped layers. Raises `UsageError` for unknown names."""
        one_of("unit kind", self.units, get_args(UnitKind))
        changes: dict[str, object] = {"unit_kind": self.units}
        if self.skip_layers is not None:
            changes["skip_layers"] = self.skip_layers
        methods = [with_rule(get_method(name), self.pays) for name in names(self.methods, "methods")]
        return [m if is_dense(m) else compose(m, name=m.name, **changes) for m in methods]

    def checked_ratios(self) -> list[float]:
        """The ratios. Raises `UsageError` for one outside [0, 1)."""
        return numbers(self.ratios, "ratios", "ratio")


@dataclass(frozen=True)
class MeasureOptions:
    """The text that perplexity is measured on, and how windows are cut from it."""

    panel: ClassVar[str] = "Evaluation"
    corpus: Annotated[
        str,
        typer.Option(help=f"Text to measure perplexity on: {TEXT}."),
    ] = TextMeasure.corpus
    windows: Annotated[
        int,
        typer.Option(help="Number of evaluation windows, taken from the start of the text; 0 takes all."),
        RANGES["Text.windows"],
    ] = 24
    batch_size: Annotated[
        int,
        typer.Option(help="Windows per batch; dynamic methods choose units at every batch."),
        RANGES["batch_size"],
    ] = TextMeasure.batch_size
    sampling: Annotated[
        str,
        typer.Option(
            help="Choice of windows: in-order, or published (random windows, perplexity averaged by "
            "batch, as in the published code of Probe Pruning)."
        ),
    ] = TextMeasure.sampling
    speed_rounds: Annotated[
        int,
        typer.Option(
            help="Number of rounds in which the prompts of each method are timed in turn with the dense "
            "model's; 0 times nothing."
        ),
        RANGES["speed_rounds"],
    ] = 3

    def measures(self, length: int, seed: int) -> list[Measure]:
        """Perplexity, and the speed of a few windows at once where there are rounds to time."""
        measures: list[Measure] = [self.measure(length, seed)]
        if self.speed_rounds:
            few = min(self.batch_size, SPEED_BATCH)
            measures.append(CostMeasure(few, length, 0, self.speed_rounds, time_calibration=False))
        return measures

    def text(self, length: int) -> Text:
        """About the text that will be read: how many windows all are is not known yet."""
        return Text(self.corpus, self.windows or MANY, length)

    def measure(self, length: int, seed: int) -> TextMeasure:
        """The measure, on windows of `length` tokens. Raises `UsageError` for an unknown sampling."""
        one_of("sampling", self.sampling, get_args(Sampling))
        published = self.sampling == "published"
        return TextMeasure(
            corpus=self.corpus,
            windows=self.windows or None,
            length=length,
            batch_size=self.batch_size,
            sampling=cast(Sampling, self.sampling),
            averaging="published" if published else "token",
            seed=seed if published else 0,
        )


@dataclass(frozen=True)
class BudgetOptions:
    """How long methods that train may train."""

    panel: ClassVar[str] = "Training of methods with +lora and +distill"
    train_steps: Annotated[int, typer.Option(help="Number of optimiser steps."), RANGES["steps"]] = 100
    train_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens to train on, rounded to whole steps; replaces --train-steps."),
        RANGES["train_tokens"],
    ] = None
    train_batch_size: Annotated[
        int, typer.Option(help="Sequences per optimiser step."), RANGES["batch_size"]
    ] = 4
    train_length: Annotated[int, typer.Option(help="Tokens per sequence."), RANGES["length"]] = 256
    train_rate: Annotated[float, typer.Option(help="Learning rate."), RANGES["learning_rate"]] = 5e-4
    train_text: Annotated[str, typer.Option(help=f"Training text: {TEXT}.")] = TrainingBudget.corpus
    keep_trained: KeepTrained = True

    def budget(self) -> TrainingBudget:
        """The training budget. Raises `UsageError` for more steps than a budget may have."""
        steps = self.train_steps
        if self.train_tokens is not None:
            steps = max(round(self.train_tokens / (self.train_batch_size * self.train_length)), 1)
        return TrainingBudget(
            steps, self.train_batch_size, self.train_length, self.train_rate, self.train_text
        )


@grouped
def compare(
    *,
    model: Model = EMBEDDED_MODEL,
    grid: GridOptions,
    output: ResultOptions = OUTPUT,
    evaluation: MeasureOptions,
    calibration: CalibrationOptions,
    training: BudgetOptions,
    load: LoadOptions,
    memory: Memory = None,
) -> None:
    """Prune a model by several methods and compare the perplexity of each with the dense model's.

    Add +lora to the name of a method that prunes once to train the pruned model on text, as in
    llm-pruner+lora, or +distill to train it towards the dense model's predictions, as in best-static+distill;
    dense+lora is the control. A run that was interrupted continues when started again with the same options.
    Several processes (torchrun -m probeprune compare ..., or accelerate launch) share each measurement out.

    Example: [bold]probeprune compare smollm2-135m --methods dense,probe --ratios 0.2,0.4,0.6[/bold]
    """
    from probeprune import processes, report
    from probeprune.experiment.cells import grid as cells_of
    from probeprune.experiment.results import Results
    from probeprune.experiment.run import run_cells
    from probeprune.experiment.workbench import Workbench
    from probeprune.files import write_text
    from probeprune.jobs.forecast import comparing_work
    from probeprune.jobs.prune import Texts
    from probeprune.model.offloading import is_offloaded
    from probeprune.places import claimed
    from probeprune.processes import shares

    processes.join(load.device)
    with shares.sharing(), ExitStack() as held, notices():
        with shares.alike():
            measures = evaluation.measures(calibration.length, calibration.seed)
            methods, ratios = grid.composed(), grid.checked_ratios()
            _check_untrained(methods)
            text, budget = calibration.text(), training.budget()
            if processes.is_first():
                held.enter_context(claimed(output.out_dir))
            limit = None if memory is None else size("memory", memory)
            texts = Texts(text, evaluation.text(calibration.length), calibration.seed, evaluation.batch_size)
        work = comparing_work([(m, r) for m in methods for r in ratios], texts)
        loaded = load.open_everywhere(model, limit, work=work)
        on_disk = is_offloaded(loaded.model)
        if on_disk and evaluation.speed_rounds:
            warn(["nothing is timed, because the layers are on disk"])
        if on_disk or processes.count() > 1:  # which would disturb each other's clocks
            measures = measures[:1]
        subjects = _subjects(loaded, methods, ratios, text, calibration.seed, budget)
        cells = cells_of(subjects, measures)
        results = Results.open(output.out_dir)
        warn(results.problems)
        with progress_bar() as show:
            bench = Workbench(output.out_dir, show, load.trust_remote_code, limit)
            bench.take(loaded)
            rows = run_cells(bench, results, cells, done=_print_done, keep_trained=training.keep_trained)
        if not processes.is_first():
            return
        title = _title(model, rows, text)
        write_text(output.out_dir / "table.md", report.markdown(rows, title))
        heading = title.replace("; calibrated", ";\ncalibrated")
        plots = drawn(lambda: report.plot(rows, heading, output.out_dir / "plot"))
    print_rows(rows, title, output.as_json)
    warn(missed_in(rows))
    print_written((results.path, output.out_dir / "table.md", *plots))
    print_line(f"next: `probeprune report {shlex.quote(str(output.out_dir))}` makes one page of it", "dim")


def _check_untrained(methods: Sequence[Method]) -> None:
    """Raise `UsageError` where one of several processes is to compare methods that train."""
    from probeprune import processes

    trained = [m.name for m in methods if m.when.trains]
    if trained and processes.count() > 1:
        raise UsageError(
            f"{', '.join(trained)} train, which compare does in one process; leave them out of --methods, or "
            "start without torchrun."
        )


def _subjects(
    loaded: LoadedModel,
    methods: Sequence[Method],
    ratios: Sequence[float],
    calibration: Text,
    seed: int,
    budget: TrainingBudget,
) -> list[Subject]:
    """Every method at every ratio."""
    from probeprune.experiment.cells import subject
    from probeprune.model.fingerprint import source_fingerprint
    from probeprune.provenance import dtype_name

    weights = source_fingerprint(loaded.name)  # reads a local model's files: once, not for every cell
    setting = Setting(loaded.name, dtype_name(loaded.dtype), loaded.device.type, calibration, budget, weights)
    return [subject(setting, method, ratio, seed) for method in methods for ratio in ratios]


def _print_done(cell: Cell, row: Line) -> None:
    if isinstance(cell.measure, CostMeasure):
        if is_dense(cell.subject.method):
            return
        low, high = row["prefill"]["speedup_range"]
        figure = f"speed {low:.2f}x to {high:.2f}x in {cell.measure.rounds} rounds"
    else:
        figure = f"perplexity {row['value']:.2f}"
    print_line(f"{cell.subject.label:<16} {figure}", "green", mark="done")


def _title(model: str, rows: Sequence[Line], calibration: Text) -> str:
    """The heading of the table: the model, the texts and the machine's part."""
    row = next(r for r in rows if r["metric"] == "perplexity")
    cost = next((r for r in rows if r["metric"] == "cost"), None)
    timed = "" if cost is None else f"; prompts timed {cost['batch_size']} x {cost['length']}"
    return (
        f"{model}, {row['task']}: {row['windows']} windows of {row['length']} tokens in batches of "
        f"{row['batch_size']}{timed}; calibrated on {calibration.windows} windows of "
        f"{calibration.name}; {row['dtype']}, {row['device']}, {row['threads']} threads"
    )
