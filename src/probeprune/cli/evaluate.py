"""`probeprune eval`: one model measured, alone or beside a base model."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer
from rich.table import Table

from probeprune.cli.facts import is_dense, missed, refuse_beside_kept, with_rule
from probeprune.cli.groups import (
    RATIO,
    TEXT,
    CalibrationOptions,
    DeviceMap,
    LoadOptions,
    Memory,
    Model,
    PaysRule,
)
from probeprune.cli.options import grouped
from probeprune.cli.terminal import notices, out, print_text, print_written, progress_bar, warn
from probeprune.cli.values import names, size
from probeprune.data.windows import BATCH_SIZE, Text
from probeprune.errors import UsageError
from probeprune.foreign.literal import styled
from probeprune.methods import Method, check_untrained, get_method
from probeprune.model.loading import EMBEDDED_MODEL
from probeprune.ranges import RANGES

if TYPE_CHECKING:
    from collections.abc import Callable

    from probeprune.jobs.evaluate import Figure, Wanted
    from probeprune.model.loading import LoadedModel
    from probeprune.model.placing import Work
    from probeprune.runtime.attachment import Attachment


@dataclass(frozen=True)
class MethodOptions:
    """The method that runs while the model is measured."""

    method: Annotated[
        str | None,
        typer.Option(
            help="Pruning method to attach; `probeprune methods` lists all.",
            show_default="none, or the one that is kept with the model",
        ),
    ] = None
    ratio: Annotated[float | None, typer.Option(help=RATIO), RANGES["ratio"]] = None
    pays: PaysRule = None

    def chosen(self) -> Method | None:
        """The method; None for none. Raises `UsageError` for one that trains, or only half of the options."""
        if (self.method is None) != (self.ratio is None):
            raise UsageError("--method and --ratio go together; give both, or neither.")
        if self.method is None:
            if self.pays is not None:
                raise UsageError("--pays goes with --method; give both, or neither.")
            return None
        method = with_rule(get_method(self.method), self.pays, alone=True)
        check_untrained(method)
        return None if is_dense(method) else method


@dataclass(frozen=True)
class MeasureOptions:
    """What is measured."""

    panel: ClassVar[str] = "Measurements"
    texts: Annotated[
        str,
        typer.Option(help=f"Texts for perplexity and agreement, separated by commas: {TEXT}; none for none."),
    ] = "wikitext2,c4-held-out"
    windows: Annotated[int, typer.Option(help="Windows of each text, from its start."), RANGES["windows"]] = (
        32
    )
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Tasks, separated by commas: boolq, piqa, hellaswag, winogrande, arc_easy, arc_challenge, "
            "openbookqa (their items ship with the package), or any other of the LM evaluation harness.",
            show_default="none",
        ),
    ] = None
    limit: Annotated[
        int | None,
        typer.Option(help="Items of each task, from its start.", show_default="all"),
        RANGES["limit"],
    ] = None
    prompts: Annotated[
        int,
        typer.Option(
            help="With --base, prompts cut from the first text for greedy texts; 0 for no greedy texts."
        ),
        RANGES["Text.windows"],
    ] = 16
    prompt_length: Annotated[int, typer.Option(help="Tokens of such a prompt."), RANGES["length"]] = 64
    new_tokens: Annotated[int, typer.Option(help="Tokens of a greedy text."), RANGES["max_new_tokens"]] = 64
    batch_size: Annotated[
        int,
        typer.Option(
            help="Windows, options or prompts per forward pass; a dynamic method chooses for each pass."
        ),
        RANGES["batch_size"],
    ] = BATCH_SIZE

    def wanted(self, length: int) -> Wanted:
        """The measurements. Raises `UsageError` for names that are no lists."""
        from probeprune.jobs.evaluate import Wanted

        corpora = [] if self.texts == "none" else names(self.texts, "texts")
        first = corpora[0] if corpora else "wikitext2"
        return Wanted(
            texts=tuple(Text(c, self.windows, length) for c in corpora),
            tasks=() if self.tasks is None else tuple(names(self.tasks, "tasks")),
            limit=self.limit,
            prompts=Text(first, self.prompts, self.prompt_length) if self.prompts else None,
            new_tokens=self.new_tokens,
            batch_size=self.batch_size,
        )


@grouped
def evaluate(
    *,
    model: Model = EMBEDDED_MODEL,
    pruning: MethodOptions,
    base: Annotated[
        str | None,
        typer.Option(
            help="Base model, such as the dense one: everything is measured on it too and paired, and "
            "agreement with it is added. Each keeps its weights in memory, where there is room.",
            show_default="none",
        ),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json",
            help="Write all figures with their items to this file; - for standard output.",
            show_default="none",
        ),
    ] = None,
    measures: MeasureOptions,
    calibration: CalibrationOptions,
    load: LoadOptions,
    device_map: DeviceMap = None,
    memory: Memory = None,
) -> None:
    """Measure a model; with a base model also agreement, greedy text and paired differences.

    The model may be dense, pruned, or a folder that `prune` wrote with a dynamic method, which then runs.

    Example: [bold]probeprune eval probe-40 --base smollm2-135m --tasks piqa --limit 100[/bold]
    """
    from probeprune.jobs.evaluate import check_tasks
    from probeprune.jobs.evaluate import evaluate as run
    from probeprune.jobs.keep import attachment
    from probeprune.places import check_file
    from probeprune.runtime.attaching import attach_again

    method, wanted = pruning.chosen(), measures.wanted(calibration.length)
    text = calibration.text()
    check_tasks(wanted.tasks)
    if json_file is not None and str(json_file) != "-":
        check_file(json_file)
    limit = None if memory is None else size("memory", memory)
    work = _work(wanted, method, pruning.ratio or 0.0, text)
    kept: Attachment | None = None
    other: LoadedModel | None = None
    removed = 0.0
    with notices():
        loaded = load.open(model, limit, device_map, work, attached=True)
        if loaded.handle is not None:
            refuse_beside_kept(model, {"method": pruning.method, "ratio": pruning.ratio})
            kept, removed = loaded.handle.kept, loaded.handle.removed_share
            loaded.handle.detach()  # it begins anew for every measurement
        if base is not None:
            other = load.open(base, limit, device_map, _work(wanted, None, 0.0, text))
    with progress_bar() as show, notices():
        if method is not None:
            assert pruning.ratio is not None
            kept, removed = attachment(loaded, method, pruning.ratio, text, calibration.seed, progress=show)
        attached: Callable[[], AbstractContextManager[Any]] = nullcontext
        if kept is not None:
            again = kept

            def attached() -> AbstractContextManager[Any]:
                return attach_again(loaded.model, again)

        figures = run(loaded, wanted, base=other, attached=attached, progress=show)
    packages = ("lm-eval",) if wanted.tasks else ()  # which may be missing where no task needs it
    record = _record(loaded, other, kept, removed, figures, packages)
    if json_file is None or str(json_file) != "-":
        _print(record, figures)
    if json_file is not None:
        _write(record, json_file)
    if kept is not None:
        warn(filter(None, [missed(kept.method.name, kept.method.record(), kept.ratio, removed)]))


def _work(wanted: Wanted, method: Method | None, ratio: float, text: Text) -> Work:
    """What a model is opened for: batches as they are measured and, for a method, calibration."""
    from probeprune.jobs.forecast import comparing_work
    from probeprune.jobs.prune import Texts

    longest = max(wanted.texts, key=lambda t: t.length, default=Text("wikitext2", 1))
    measured = replace(longest, windows=longest.windows or wanted.batch_size)
    subject = (get_method("dense") if method is None else method, ratio)
    return comparing_work([subject], Texts(text, measured, batch_size=wanted.batch_size))


def _record(
    loaded: LoadedModel,
    base: LoadedModel | None,
    kept: Attachment | None,
    removed: float,
    figures: list[Figure],
    packages: tuple[str, ...],
) -> dict[str, Any]:
    from probeprune.provenance import dtype_name, versions

    return {
        "model": loaded.name,
        "method": None if kept is None else kept.method.record(),
        "ratio": None if kept is None else kept.ratio,
        "removed_share": removed,
        "pruning": loaded.cut and {k: loaded.cut.get(k) for k in ("base_model", "removed_share")},
        "base": None if base is None else base.name,
        "dtype": dtype_name(loaded.dtype),
        "device": str(loaded.device),
        "versions": versions(*packages),
        "results": [figure.record() for figure in figures],
    }


def _write(record: dict[str, Any], file: Path) -> None:
    import json

    from probeprune.files import write_json

    if str(file) == "-":
        print(json.dumps(record))
        return
    write_json(file, record)
    print_written([file])


def _print(record: dict[str, Any], figures: list[Figure]) -> None:
    """One table on standard output, and what its columns mean."""
    title = str(record["model"])
    if record["method"] is not None:
        title += f" under {record['method']['name']}, {record['removed_share']:.1%} of the blocks left out"
    paired = any(f.base is not None for f in figures)
    if record["base"] is not None:
        title += f", beside {record['base']}"
    table = Table(title=styled(title))
    for column in ("on", "metric"):
        table.add_column(styled(column))
    for column in ("model", *(("base", "paired difference") if paired else ())):
        table.add_column(styled(column), justify="right")
    for f in figures:
        cells = [f.of, f.metric, _figure(f, f.value, f.error)]
        if paired:
            base = "" if f.base is None else _figure(f, f.base, f.base_error or math.nan)
            cells += [base, _change(f)]
        table.add_row(*map(styled, cells))
    out().print(table)
    sentence = "± is one standard error over windows, items or prompts"
    if paired:
        sentence += "; differences are paired: perplexity over the base model's, accuracy in points"
    print_text(f"{sentence}.")


def _figure(f: Figure, value: float, error: float) -> str:
    """A figure with its error: perplexity and divergence as they are, shares in hundredths."""
    scale, digits, unit = (1, 2, "") if f.metric == "perplexity" else (100, 1, "%")
    if f.metric == "KL divergence":
        scale, digits, unit = 1, 4, ""
    spread = "" if math.isnan(error) else f" ± {scale * error:.{digits}f}"
    return f"{scale * value:.{digits}f}{spread}{unit}"


def _change(f: Figure) -> str:
    if f.change is None:
        return ""
    error = math.nan if f.change_error is None else f.change_error
    if f.metric == "perplexity":
        return f"{f.change:.3f}x" + ("" if math.isnan(error) else f" ± {error:.3f}")
    return f"{100 * f.change:+.1f}" + ("" if math.isnan(error) else f" ± {100 * error:.1f}")
