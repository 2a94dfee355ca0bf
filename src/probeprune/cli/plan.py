"""`probeprune plan`: what pruning a model will make and take, before any work."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.table import Table

from probeprune.cli.groups import (
    CalibrationOptions,
    EvaluationOptions,
    Json,
    LoadOptions,
    Memory,
    Model,
    WidthOptions,
)
from probeprune.cli.options import grouped
from probeprune.cli.prune import PruningOptions
from probeprune.cli.terminal import err, notices, out, print_text
from probeprune.cli.values import size
from probeprune.errors import UsageError
from probeprune.model.loading import EMBEDDED_MODEL

if TYPE_CHECKING:
    from probeprune.jobs.forecast import Forecast


@grouped
def plan(
    *,
    model: Model = EMBEDDED_MODEL,
    pruning: PruningOptions,
    widths: WidthOptions,
    calibration: CalibrationOptions,
    evaluation: EvaluationOptions,
    load: LoadOptions,
    memory: Memory = None,
    as_json: Json = False,
) -> None:
    """Say what `prune` with the same options will make and take, and what it would refuse, before any work.

    Reads the model's config and the headers of its weights; of a hub model no weights are downloaded, and a
    folder with a config.json alone will do. Methods are those that cut weights. What would be refused ends
    this command too, in the same words.

    Example: [bold]probeprune plan smollm2-135m --method best-static --ratio 0.2[/bold]
    """
    from probeprune.jobs.forecast import Job, forecast
    from probeprune.jobs.prune import Texts
    from probeprune.model.machine import choose_device, choose_dtype
    from probeprune.model.outline import open_outline

    if pruning.is_dynamic:
        raise UsageError(
            f"method {pruning.method!r} prunes at every batch and cuts no weights: `prune` keeps it "
            "beside the dense ones, so there is no smaller model to plan; choose a static method."
        )
    method, layout = pruning.composed(widths, calibration.seed), widths.checked_layout()
    texts = Texts(
        calibration.text(), evaluation.text(calibration.length), calibration.seed, pruning.batch_size
    )
    device = choose_device(load.device)
    dtype = choose_dtype(load.dtype, device)
    with notices(), err.status("looking at the model"):
        outline = open_outline(model, trust_remote_code=load.trust_remote_code)
        to_save = outline.model.dtype if load.dtype == "auto" else dtype
        job = Job(method, pruning.ratio, layout, texts, dtype, device, to_save, pruning.steps)
        limit = None if memory is None else size("memory", memory)
        found = forecast(outline, job, memory=limit, timed=True)
    if as_json:
        print(json.dumps(asdict(found)))
    else:
        _show(found, model)
    if found.refused is not None:
        raise UsageError(found.refused)


def _show(found: Forecast, name: str) -> None:
    """The figures as two tables and a few lines."""
    table = Table("", "before", "after", title=f"plan for {name}", title_justify="left")
    rows = (
        ("parameters", "parameters", _millions),
        ("FLOPs a token, decoder", "flops_per_token", _millions),
        ("FLOPs a token, output head", "head_flops_per_token", _millions),
        ("KV cache a token", "kv_bytes_per_token", _bytes),
        ("weights on disk", "disk_bytes", _bytes),
        ("memory to serve one sequence", "serving_bytes", _bytes),
    )
    for words, field, show in rows:
        after = "-" if found.after is None else show(getattr(found.after, field))
        table.add_row(words, show(getattr(found.before, field)), after)
    out().print(table)
    if not found.exact:
        print_text("Widths will be measured; the figures after the cut are those of an equal one.")
    if found.in_memory is None:
        return
    table = Table("memory to prune", "peak", "mostly for", title_justify="left")
    table.add_row("all weights in memory", _bytes(found.in_memory.bytes), found.in_memory.largest)
    shown, states = ("-", "-"), "The method needs all layers in memory at once."
    if found.by_layer is not None:
        shown = _bytes(found.by_layer.bytes), found.by_layer.largest
        states = (
            f"A layer at a time, hidden states of up to {_bytes(found.states_bytes)} stay in memory where "
            "--memory leaves room, and else go to files."
        )
    table.add_row("a layer at a time, least --memory", *shown)
    out().print(table)
    print_text(f"{_bytes(found.base_bytes)} of each peak are Python and its libraries. {states}")
    if found.seconds is not None:
        print_text(
            f"The matrix products take about {_time(found.seconds)} at the speed just measured; all else "
            "comes on top. Next: `probeprune prune` with the same options and --out."
        )


def _millions(number: int) -> str:
    return f"{number / 1e6:,.1f} M"


def _bytes(number: int) -> str:
    """Rounded up, so that a limit of what it says is enough."""
    for unit, whole in (("GiB", 2**30), ("MiB", 2**20)):
        if number >= whole:
            return f"{-(-number * 100 // whole) / 100:,.2f} {unit}"
    return f"{number:,} B"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
