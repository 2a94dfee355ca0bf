"""`probeprune methods` and `probeprune models`."""

import dataclasses
import json

from rich.table import Table

from probeprune.cli.common import JSON, out
from probeprune.methods import METHODS
from probeprune.model.families import FAMILIES


def list_methods(as_json: JSON = False) -> None:
    """List the methods and what each is composed of.

    Example: [bold]probeprune methods[/bold]
    """
    if as_json:
        for m in METHODS.values():
            print(json.dumps(dataclasses.asdict(m)))
        return
    columns = ("method", "importance", "allocation", "compensation", "when", "LoRA", "source")
    table = Table(*columns, title="methods: an order and a cut for every block", title_justify="left")
    for m in METHODS.values():
        parts = [m.importance, m.allocation, m.compensation] if m.when != "never" else ["-"] * 3
        table.add_row(m.name, *parts, {"batch": "every batch"}.get(m.when, m.when), m.training, m.source)
    out().print(table)


def list_models(as_json: JSON = False) -> None:
    """List the model families that can be pruned.

    Example: [bold]probeprune models[/bold]
    """
    if as_json:
        for f in FAMILIES:
            print(json.dumps({"family": f.name, "model_types": f.model_types}))
        return
    table = Table("family", "model_type in config.json", title="supported families", title_justify="left")
    for f in FAMILIES:
        table.add_row(f.name, ", ".join(f.model_types))
    out().print(table)
    out().print("A model is a local directory, a hub id, a GGUF file, or smollm2-135m, which is embedded.")
