"""`probeprune methods`, `probeprune models` and `probeprune engines`."""

import json
from dataclasses import asdict

from rich.table import Table

from probeprune.cli.facts import is_dense, moment
from probeprune.cli.groups import Json
from probeprune.cli.terminal import out
from probeprune.engines.wishes import ENGINES
from probeprune.methods import METHODS
from probeprune.model.families import FAMILIES
from probeprune.model.loading import EMBEDDED_MODEL


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
    """List the model families that can be pruned.

    Example: [bold]probeprune models[/bold]
    """
    if as_json:
        for family in FAMILIES:
            stay = family.attention if isinstance(family.attention, str) else None
            line = {"family": family.name, "model_types": family.model_types, "heads_stay_because": stay}
            print(json.dumps(line))
        return
    table = Table(
        "family", "model_type in config.json", "pruned", title="supported families", title_justify="left"
    )
    for family in FAMILIES:
        pruned = "MLPs alone" if isinstance(family.attention, str) else "heads, MLPs"
        table.add_row(family.name, ", ".join(family.model_types), pruned)
    out().print(table)
    out().print(
        f"A model is {EMBEDDED_MODEL} (embedded), a local directory, a GGUF file or a Hugging Face hub id."
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
