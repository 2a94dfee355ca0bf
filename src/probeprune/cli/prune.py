"""`probeprune prune`: a smaller checkpoint."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, cast, get_args

import typer

from probeprune.cli.facts import missed, with_compensation, with_rule
from probeprune.cli.groups import (
    GGUF_TYPE,
    TEXT,
    CalibrationOptions,
    DeviceMap,
    EvaluationOptions,
    Json,
    LoadOptions,
    Memory,
    Model,
    PaysRule,
    Ratio,
    WidthOptions,
)
from probeprune.cli.options import grouped
from probeprune.cli.saved import print_saved, print_trained
from probeprune.cli.terminal import notices, print_line, progress_bar, warn
from probeprune.cli.values import names, one_of, size
from probeprune.data.windows import BATCH_SIZE
from probeprune.engines.gguf_types import FileType, storage
from probeprune.errors import UsageError
from probeprune.experiment.cells import TrainingBudget
from probeprune.methods import Method, compose, for_layout, get_method
from probeprune.model.blocks import UnitKind
from probeprune.model.experts import EXPERT_UNITS
from probeprune.model.loading import EMBEDDED_MODEL
from probeprune.ranges import RANGES
from probeprune.runtime.attached_folder import Weights
from probeprune.strategies.expert_importance import EXPERT_IMPORTANCES
from probeprune.training.settings import Training

if TYPE_CHECKING:
    from probeprune.jobs.prune import GgufFile, Output
    from probeprune.model.described import Layout
    from probeprune.model.loading import LoadedModel

BATCH, SEQUENCE = 8, 256
"""Sequences of a training step, and tokens of a sequence."""

RATE, LORA_RATE = 3e-4, 5e-4
"""Learning rates of all weights (docs/howto/budget.md) and of LoRA adapters (those of `compare`)."""


@dataclass(frozen=True)
class PruningOptions:
    """What is cut, and by which method."""

    method: Annotated[
        str,
        typer.Option(
            help="Pruning method; `probeprune methods` lists all. A static one cuts the weights; a dynamic "
            "one (every batch) is saved beside the dense weights, to run in `generate`, `eval` and "
            "probeprune.load_model."
        ),
    ]
    ratio: Ratio
    units: Annotated[
        str, typer.Option(help="Attention units under grouped-query attention: group or balanced.")
    ] = Method.unit_kind
    blocks: Annotated[
        str, typer.Option(help="Kinds of blocks to prune, separated by commas: attention, mlp, experts.")
    ] = ",".join(Method.blocks)
    experts: Annotated[
        str,
        typer.Option(
            help="Unit of the experts of a mixture of experts: channel (the same number from every expert, "
            "by the method's importance) or expert (whole ones, by --expert-importance). Experts stay where "
            "--blocks leaves them out."
        ),
    ] = Method.experts
    expert_importance: Annotated[
        str,
        typer.Option(help=f"Importance of whole experts: {', '.join(EXPERT_IMPORTANCES)}."),
    ] = Method.expert_importance
    allocation: Annotated[
        str | None,
        typer.Option(
            help="Allocation of the cut to the blocks, such as uniform, global or damage; needs "
            "--layout per-layer.",
            show_default="the method's own",
        ),
    ] = None
    budget: Annotated[
        str | None,
        typer.Option(
            help="Quantity that the ratio is a share of: parameters, or with --allocation damage also flops "
            "or time (of a forward pass on this machine); needs --layout per-layer.",
            show_default="the method's own",
        ),
    ] = None
    compensation: Annotated[
        str | None,
        typer.Option(
            help="Compensation for the removed units: none, bias, or least-squares (a refit).",
            show_default="the method's own",
        ),
    ] = None
    pays: PaysRule = None
    steps: Annotated[
        int,
        typer.Option(help="Number of steps in which to reach the ratio, with a new calibration before each."),
        RANGES["prune.steps"],
    ] = 1
    batch_size: Annotated[int, typer.Option(help="Windows per forward pass."), RANGES["batch_size"]] = (
        BATCH_SIZE
    )

    @property
    def is_dynamic(self) -> bool:
        """Whether the method prunes at every batch. Raises `UsageError` for an unknown name."""
        return get_method(self.method).when.every_batch

    def composed_dynamic(self, widths: WidthOptions, seed: int) -> Method:
        """As `composed`, for a dynamic method, whose weights are not cut."""
        given = {
            "for": widths.engine,
            "layout": widths.layout,
            "steps": self.steps if self.steps > 1 else None,
        }
        options = [f"--{name}" for name, value in given.items() if value is not None]
        if options:
            raise UsageError(
                f"method {self.method!r} prunes at every batch and cuts no weights; leave out "
                f"{' and '.join(options)}, or choose a static method."
            )
        per_layer = replace(widths, layout="per-layer", round_to=widths.round_to or 1)
        return self.composed(per_layer, seed)

    def composed(self, widths: WidthOptions, seed: int) -> Method:
        """The method with all changes. Raises `UsageError` for unknown names and impossible combinations."""
        layout = widths.checked_layout({"allocation": self.allocation, "budget": self.budget})
        one_of("unit kind", self.units, get_args(UnitKind))
        one_of("unit of experts", self.experts, EXPERT_UNITS)
        method = with_rule(get_method(self.method), self.pays, alone=True)
        if self.compensation is not None:
            method = with_compensation(method, self.compensation)
        changes: dict[str, Any] = {
            "unit_kind": self.units,
            "round_to": widths.rounding(),
            "blocks": tuple(names(self.blocks, "blocks")),
            "experts": self.experts,
            "expert_importance": self.expert_importance,
            "seed": seed,
        }
        if layout == "per-layer":
            given = {
                "skip_layers": widths.skip_layers,
                "allocation": self.allocation,
                "budget": self.budget,
            }
            changes |= {name: value for name, value in given.items() if value is not None}
        return compose(for_layout(method, layout), name=method.name, **changes)


@dataclass(frozen=True)
class OutputOptions:
    """Where the result goes."""

    out_dir: Annotated[
        Path,
        typer.Option(
            "--out", help="Folder for the result, new or empty; or a file NAME.gguf, for llama.cpp."
        ),
    ]
    type: Annotated[str | None, GGUF_TYPE] = None
    weights: Annotated[
        str | None,
        typer.Option(
            help="For a dynamic method, what of the dense model the folder holds: a copy of its weights, or "
            "a reference to them by name.",
            show_default="copy",
        ),
    ] = None
    as_json: Json = False

    def target(self, layout: Layout, load: LoadOptions, loaded: LoadedModel) -> Output | GgufFile:
        """The checkpoint or file to write."""
        from probeprune.jobs.prune import GgufFile, Output

        if self.is_file:
            return GgufFile(self.out_dir, layout, cast(FileType, self.type or "f16"))
        return Output(self.out_dir, layout, load.dtype_to_save(loaded))

    @property
    def is_file(self) -> bool:
        """Whether the result is a GGUF file."""
        return self.out_dir.suffix == ".gguf"

    def kept_weights(self) -> Weights:
        """What a folder with a dynamic method holds of the dense model."""
        one_of("place of weights", self.weights or "copy", get_args(Weights))
        return cast(Weights, self.weights or "copy")

    def check_kind(self, method: str, dynamic: bool) -> None:
        """Raise `UsageError` for a kind of result that the method does not make."""
        if not dynamic and self.weights is not None:
            raise UsageError("--weights is for dynamic methods; a static one writes the weights that it cut.")
        if dynamic and self.is_file:
            raise UsageError(
                f"method {method!r} prunes at every batch, which no GGUF file holds; give --out a folder, or "
                "choose a static method."
            )
        self.kept_weights()

    def check(self) -> None:
        """Raise `UsageError` for a place that cannot be written, and for a type that is not for a file."""
        from probeprune.places import check_file, check_free, check_place

        if self.is_file:
            if self.type is not None:
                storage(self.type)
            check_file(self.out_dir)
            return
        if self.type is not None:
            raise UsageError(
                "--type is for GGUF files; give --out a name that ends in .gguf, or leave it out."
            )
        check_place(self.out_dir)
        check_free(self.out_dir)


@dataclass(frozen=True)
class TrainingOptions:
    """Training behind the cut, in short; `recover` has all settings."""

    panel: ClassVar[str] = "Training"
    recover: Annotated[
        int,
        typer.Option(
            help="Then train the pruned model towards the dense one's predictions, for this number of steps "
            f"of {BATCH} x {SEQUENCE} tokens; 0 trains nothing. `probeprune recover` has all settings."
        ),
        RANGES["recover"],
    ] = 0
    lora: Annotated[
        bool,
        typer.Option(
            "--train-lora",
            help="Train LoRA adapters, merged in the end, in place of all weights: takes less memory.",
        ),
    ] = False
    text: Annotated[str, typer.Option("--train-text", help=f"Training text: {TEXT}.")] = TrainingBudget.corpus
    packing: Annotated[
        bool,
        typer.Option(
            "--train-packing/--no-train-packing",
            help="Join documents and cut the result into sequences, or cut one sequence from each document.",
        ),
    ] = True

    def check(self, other: str | None, device_map: str | None) -> None:
        """Raise `UsageError` where something `other` than a smaller checkpoint is made, for several devices,
        and for adapters without a training."""
        if self.lora and not self.recover:
            raise UsageError("--train-lora says how to train: give --recover STEPS too, or leave it out.")
        if self.recover and other is not None:
            raise UsageError(f"--recover trains a smaller checkpoint, and {other}; leave it out.")
        if self.recover and device_map is not None:
            raise UsageError(
                "--recover trains on one device; leave --device-map out, or run `recover` after."
            )

    def budget(self) -> TrainingBudget:
        """The size of the training."""
        rate = LORA_RATE if self.lora else RATE
        return TrainingBudget(self.recover, BATCH, SEQUENCE, rate, self.text, self.packing)

    def settings(self, seed: int) -> Training:
        """The settings of the training run."""
        training = self.budget().training(seed)
        return training if self.lora else replace(training, lora=None)


@grouped
def prune(
    *,
    model: Model = EMBEDDED_MODEL,
    pruning: PruningOptions,
    output: OutputOptions,
    widths: WidthOptions,
    calibration: CalibrationOptions,
    evaluation: EvaluationOptions,
    training: TrainingOptions,
    load: LoadOptions,
    memory: Memory = None,
    device_map: DeviceMap = None,
) -> None:
    """Prune a model and save it: a smaller checkpoint, or with a dynamic method the model and the method.

    Perplexity is measured before and after pruning and written on the model card. A name that ends in .gguf
    makes a file for llama.cpp, with the layout and rounding that it likes. With --recover, the smaller model
    is then trained towards the dense one. Several processes (torchrun -m probeprune prune ..., or accelerate
    launch) share out the work of pruning.

    Example: [bold]probeprune prune smollm2-135m --method llm-pruner --ratio 0.2 --out pruned[/bold]
    """
    from probeprune import processes
    from probeprune.jobs.forecast import pruning_work
    from probeprune.jobs.keep import keep_to
    from probeprune.jobs.prune import Output, Texts, prune_to
    from probeprune.model.machine import DTYPES
    from probeprune.processes import shares

    processes.join(load.device)
    with shares.sharing(), notices():
        with shares.alike():
            if training.recover:
                from probeprune.jobs.recovered import discard_pruned, prune_and_recover  # need an extra

                discard_pruned(output.out_dir)
            if processes.is_first():
                output.check()
            dynamic = pruning.is_dynamic
            output.check_kind(pruning.method, dynamic)
            other = f"method {pruning.method!r} cuts no weights" if dynamic else None
            training.check("--out names a GGUF file" if output.is_file else other, device_map)
            if output.is_file and widths.engine is None:
                widths = replace(widths, engine="llama.cpp")
            composed = pruning.composed_dynamic if dynamic else pruning.composed
            method = composed(widths, calibration.seed)
            layout: Layout = "per-layer" if dynamic else widths.checked_layout()
            text, measured_on = calibration.text(), evaluation.text(calibration.length)
            texts = Texts(text, measured_on, calibration.seed, pruning.batch_size)
            limit = None if memory is None else size("memory", memory)
        if training.recover:
            how = Output(output.out_dir, layout, None if load.dtype == "auto" else DTYPES[load.dtype])
            with progress_bar() as show:
                record = prune_and_recover(
                    model,
                    method,
                    pruning.ratio,
                    how,
                    texts,
                    training.settings(calibration.seed),
                    training.budget().text,
                    lambda name: load.open(name, limit),
                    steps=pruning.steps,
                    progress=show,
                )
            print_trained(record, output.out_dir, output.as_json)
            return
        work = None if dynamic else pruning_work(method, pruning.ratio, layout, texts, pruning.steps)
        loaded = load.open_everywhere(model, limit, device_map, work)
        with progress_bar() as show:
            if dynamic:
                kind = output.kept_weights()
                record = keep_to(
                    loaded, method, pruning.ratio, output.out_dir, texts, weights=kind, progress=show
                )
            else:
                record = prune_to(
                    loaded,
                    method,
                    pruning.ratio,
                    output.target(layout, load, loaded),
                    texts,
                    steps=pruning.steps,
                    progress=show,
                )
    print_saved(record, output.out_dir, _summary(record), ("dense", "pruned"), output.as_json)
    if not output.is_file and not output.as_json:
        print_line(_next(model, str(output.out_dir)), "dim")
    warn(filter(None, [missed(method.name, record["method"], pruning.ratio, record["removed_share"])]))


def _next(model: str, folder: str) -> str:
    """What to do with a folder that was written."""
    command = shlex.join(["probeprune", "eval", folder, "--base", model])
    return f"next: `{command}` measures it; {folder}/README.md says how it is opened"


def _summary(record: dict[str, Any]) -> str:
    if "parameters" not in record:
        return (
            f"dense weights ({record['weights']}) and {record['method']['name']}, which leaves out "
            f"{record['removed_share']:.1%} of the blocks' parameters, in {record['seconds']:.0f} s"
        )
    before, after = record["parameters"]
    return (
        f"{record['removed_share']:.1%} of the blocks' parameters removed, {before / 1e6:.1f} M -> "
        f"{after / 1e6:.1f} M in all, in {record['seconds']:.0f} s"
    )
