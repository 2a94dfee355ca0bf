"""`probeprune methods`, `probeprune models` and `probeprune engines`."""

import json
from collections.abc import Collection
from dataclasses import asdict

from rich.table import Table

from probeprune.cli.facts import is_dense, moment
from probeprune.cli.groups import Json
from probeprune.cli.terminal import out
from probeprune.engines.wishes import ENGINES
from probeprune.methods import METHODS
from probeprune.model.loading import EMBEDDED_MODEL
from probeprune.model.support import Support, all_support


def list_methods(as_json: Json = False) -> None:
    """List the methods and the strategies that each is composed of.

    Example: [bold]probeprune methods[/bold]
    """
    if as_json:
        for method in METHODS.values():
            print(json.dumps(method.record()))
        return
    columns = ("method", "importance", "allocation", "compensation", "when", "LoRA", "source")
    table = Table(
        *columns, title="methods: an order and a width for the units of every block", title_justify="left"
    )
    for method in METHODS.values():
        strategies = (method.importance, method.allocation, method.compensation.kind)
        table.add_row(
            method.name,
            *(("-",) * 3 if is_dense(method) else strategies),
            moment(method),
            "yes" if method.when.trains else "-",
            method.source,
        )
    out().print(table)


def list_models(as_json: Json = False) -> None:
    """List the model families and multimodal classes that can be pruned, and what each can do.

    Example: [bold]probeprune models[/bold]
    """
    rows = all_support()
    if as_json:
        for row in rows:
            print(json.dumps(asdict(row)))
        return
    table = Table(*COLUMNS, title="supported families", title_justify="left")
    for row in rows:
        table.add_row(*cells(row))
    out().print(table)
    for row in rows:
        if row.groups_stay_if is not None:
            out().print(
                f"{row.family}: with {row.groups_stay_if}, groups of heads stay in layers that share keys "
                "and values; query heads can go.",
                highlight=False,
            )
        if row.why is not None:
            stay = f"with {row.heads_stay_if}, heads stay" if row.heads_stay_if else "heads stay"
            out().print(f"{row.family}: {stay}, because a model {row.why}.", highlight=False)
    out().print("In brackets: the language models that a multimodal class may hold, which alone are pruned.")
    out().print(
        f"A model is {EMBEDDED_MODEL} (embedded), a local directory, a GGUF file or a Hugging Face hub id."
    )


COLUMNS = ("family", "model_type", "heads", "MLPs", "experts", "dynamic", "uniform", "nemotron-nas", "GGUF")
"""Columns of the table of families."""


def cells(row: Support) -> tuple[str, ...]:
    """The row of one family in the table, a text for each of `COLUMNS`."""

    def kinds(which: Collection[str]) -> str:
        named = [
            word
            for kind, word in (("attention", "heads"), ("mlp", "MLPs"), ("experts", "experts"))
            if kind in which
        ]
        return " ".join(named) or "-"

    return (
        row.family,
        ", ".join(row.model_types) + (f" ({', '.join(row.text_types)})" if row.text_types else ""),
        (", ".join(row.heads) or "stay") + (" *" if row.heads_stay_if or row.groups_stay_if else ""),
        "yes" if row.mlp else "-",
        ", ".join(row.experts) or "-",
        kinds(row.dynamic),
        kinds(row.uniform),
        "yes" if row.nemotron_nas else "-",
        ", ".join(row.gguf) or "-",
    )


def list_engines(as_json: Json = False) -> None:
    """List the inference engines, with the layout and the rounding that each likes.

    Example: [bold]probeprune engines[/bold]
    """
    if as_json:
        for engine in ENGINES.values():
            print(json.dumps(asdict(engine)))
        return
    table = Table("engine", "--layout", "--round-to", "why", title="prune --for ENGINE", title_justify="left")
    for engine in ENGINES.values():
        table.add_row(engine.name, engine.layout, str(engine.round_to), engine.why)
    out().print(table)
