"""`probeprune prune`: a smaller checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer

from probeprune.cli.facts import missed, with_compensation
from probeprune.cli.groups import (
    GGUF_TYPE,
    CalibrationOptions,
    DeviceMap,
    EvaluationOptions,
    Json,
    LoadOptions,
    Memory,
    Model,
    Ratio,
    WidthOptions,
)
from probeprune.cli.options import grouped
from probeprune.cli.terminal import notices, print_saved, progress_bar, warn
from probeprune.cli.values import names, one_of, size
from probeprune.data.windows import BATCH_SIZE
from probeprune.engines.gguf_types import FileType, storage
from probeprune.errors import UsageError
from probeprune.methods import Method, compose, for_layout, get_method
from probeprune.model.blocks import UnitKind
from probeprune.model.experts import EXPERT_UNITS
from probeprune.model.loading import EMBEDDED_MODEL
from probeprune.ranges import RANGES
from probeprune.strategies.expert_importance import EXPERT_IMPORTANCES

if TYPE_CHECKING:
    from probeprune.jobs.prune import GgufFile, Output
    from probeprune.model.described import Layout
    from probeprune.model.loading import LoadedModel


@dataclass(frozen=True)
class PruningOptions:
    """What is cut, and by which method."""

    method: Annotated[str, typer.Option(help="Static pruning method; `probeprune methods` lists all.")]
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
    steps: Annotated[
        int,
        typer.Option(help="Number of steps in which to reach the ratio, with a new calibration before each."),
        RANGES["prune.steps"],
    ] = 1
    batch_size: Annotated[int, typer.Option(help="Windows per forward pass."), RANGES["batch_size"]] = (
        BATCH_SIZE
    )

    def composed(self, widths: WidthOptions, seed: int) -> Method:
        """The method with all changes. Raises `UsageError` for unknown names and impossible combinations."""
        layout = widths.checked_layout({"allocation": self.allocation, "budget": self.budget})
        one_of("unit kind", self.units, get_args(UnitKind))
        one_of("unit of experts", self.experts, EXPERT_UNITS)
        method = get_method(self.method)
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


@grouped
def prune(
    *,
    model: Model = EMBEDDED_MODEL,
    pruning: PruningOptions,
    output: OutputOptions,
    widths: WidthOptions,
    calibration: CalibrationOptions,
    evaluation: EvaluationOptions,
    load: LoadOptions,
    memory: Memory = None,
    device_map: DeviceMap = None,
) -> None:
    """Prune a model once and for all, and save a smaller checkpoint.

    Perplexity is measured before and after pruning and written on the model card. A name that ends in .gguf
    makes a file for llama.cpp, with the layout and rounding that it likes. Several processes (torchrun -m
    probeprune prune ..., or accelerate launch) share the work out.

    Example: [bold]probeprune prune smollm2-135m --method llm-pruner --ratio 0.2 --out pruned[/bold]
    """
    from probeprune import processes
    from probeprune.jobs.forecast import pruning_work
    from probeprune.jobs.prune import Texts, prune_to
    from probeprune.processes import shares

    processes.join(load.device)
    with shares.sharing(), notices():
        with shares.alike():
            if processes.is_first():
                output.check()
            if output.is_file and widths.engine is None:
                widths = replace(widths, engine="llama.cpp")
            method = pruning.composed(widths, calibration.seed)
            layout = widths.checked_layout()
            text, measured_on = calibration.text(), evaluation.text(calibration.length)
            texts = Texts(text, measured_on, calibration.seed, pruning.batch_size)
            limit = None if memory is None else size("memory", memory)
        work = pruning_work(method, pruning.ratio, layout, texts, pruning.steps)
        loaded = load.open_everywhere(model, limit, device_map, work)
        with progress_bar() as show:
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
    warn(filter(None, [missed(method.name, record["method"], pruning.ratio, record["removed_share"])]))


def _summary(record: dict[str, Any]) -> str:
    before, after = record["parameters"]
    return (
        f"{record['removed_share']:.1%} of the blocks' parameters removed, {before / 1e6:.1f} M -> "
        f"{after / 1e6:.1f} M in all, in {record['seconds']:.0f} s"
    )
