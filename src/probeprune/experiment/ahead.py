"""What can be said of a grid before any cell runs: whether each model takes each method.

Knows shapes alone: no weights, no text, no results.
"""

from collections.abc import Iterable

from torch import nn

from probeprune.calibration.statistics import Statistics
from probeprune.errors import UsageError
from probeprune.experiment.cells import Cell, TaskMeasure, prunes
from probeprune.experiment.presets import Preset
from probeprune.foreign.extras import need
from probeprune.methods import Method, without_measured_widths
from probeprune.model.blocks import find_blocks
from probeprune.model.loading import is_local, open_shape
from probeprune.plan import widths
from probeprune.strategies.allocation import ALLOCATIONS


def check_methods(preset: Preset, trust_remote_code: bool = False) -> None:
    """Raise `UsageError` for the first method that a model of the preset takes at none of its ratios.

    The sentence begins with the method's line, where that is known. Left to the cells are models that are not
    on this machine or cannot be opened, and methods that fail at some ratios only: there the others count.
    """
    for name in preset.models:
        if not is_local(name):
            continue
        try:
            model = open_shape(name, trust_remote_code=trust_remote_code).model
        except UsageError:
            continue
        places = preset.places or [""] * len(preset.methods)
        for method, place in zip(preset.methods, places, strict=True):
            refusals = [_refusal(model, method, ratio) for ratio in preset.ratios]
            if refusals and all(refusals):
                where = f"{place}: " if place else ""
                raise UsageError(f"{where}method {method.name!r} cannot prune {name!r}: {refusals[0]}")


def check_extras(cells: Iterable[Cell]) -> None:
    """Raise `MissingExtra` unless the libraries are installed that these cells train and score tasks with."""
    for cell in cells:
        if cell.subject.method.when.trains:
            need("train")
        if isinstance(cell.measure, TaskMeasure):
            need("eval")


def check_ratio(method: Method, ratio: float, model: nn.Module) -> None:
    """Raise `UsageError` for a ratio that a method cannot reach on a model, where that needs no scores."""
    method = without_measured_widths(method)
    if prunes(method) and not ALLOCATIONS[method.allocation].needs_scores:
        widths(method, ratio, find_blocks(model, method.unit_kind), [], Statistics())


def _refusal(model: nn.Module, method: Method, ratio: float) -> str | None:
    """Why the model does not take the method at that ratio; None where it does, or nobody knows yet."""
    try:
        check_ratio(method, ratio, model)
    except UsageError as error:
        return str(error)
    return None
