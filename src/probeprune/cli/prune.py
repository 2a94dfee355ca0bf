"""`probeprune prune`: a smaller checkpoint."""

from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from probeprune.cli.common import (
    DEVICE,
    DTYPE,
    JSON,
    MODEL,
    TRUST,
    err,
    names,
    one_of,
    progress_bar,
    say_saved,
    weights_dtype,
)
from probeprune.errors import UsageError
from probeprune.methods import Method, compose, get_method, with_equal_widths
from probeprune.model.blocks import UnitKind
from probeprune.model.checkpoint import Layout
from probeprune.strategies.allocation import check_ratio
from probeprune.strategies.compensation import Refit


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
        int | None,
        typer.Option(help="Instead of the method's own (per-layer only): first layers that stay dense."),
    ] = None,
    units: Annotated[
        str, typer.Option(help="Attention units under grouped-query attention: group, balanced.")
    ] = "group",
    blocks: Annotated[str, typer.Option(help="What is pruned, separated by commas.")] = "attention,mlp",
    allocation: Annotated[
        str | None,
        typer.Option(help="Instead of the method's own (per-layer only): uniform, global, damage ..."),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Instead of the method's own (per-layer only): what the ratio is a share of, parameters; by "
            "allocation damage also flops, or time: what a forward pass takes on this machine."
        ),
    ] = None,
    compensation: Annotated[
        str | None, typer.Option(help="Instead of the method's own: none, bias, least-squares (a refit).")
    ] = None,
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
    from probeprune.data.windows import Text
    from probeprune.jobs import prune as pipeline
    from probeprune.model.checkpoint import check_free
    from probeprune.model.loading import load_model

    check_free(out_dir)
    chosen = static_method(
        method,
        layout,
        round_to,
        skip_layers,
        units,
        names(blocks, "blocks"),
        allocation,
        budget,
        compensation,
        seed,
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
            save_dtype=weights_dtype(loaded, dtype),
            progress=show,
        )
    before, after = record["parameters"]
    did = (
        f"{record['removed_share']:.1%} of the blocks removed, {before / 1e6:.1f} M -> {after / 1e6:.1f} M "
        f"parameters, in {record['seconds']:.0f} s"
    )
    say_saved(record, out_dir, did, ("dense", "pruned"), as_json)


def static_method(
    name: str,
    layout: str,
    round_to: int,
    skip_layers: int | None,
    units: str,
    blocks: list[str],
    allocation: str | None,
    budget: str | None,
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
        changes["refit"] = (method.refit or Refit()) if compensation == "least-squares" else None
    if layout == "uniform":
        if skip_layers or allocation or budget:
            raise UsageError(
                "the uniform layout gives all layers one width: leave --skip-layers, --allocation and "
                "--budget out, or use --layout per-layer."
            )
        method = with_equal_widths(method)
    else:
        own = {"skip_layers": skip_layers, "allocation": allocation, "budget": budget}
        changes |= {key: value for key, value in own.items() if value is not None}
    return compose(method, name=method.name, **changes)
