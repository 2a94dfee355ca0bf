"""What can be said of a grid before any cell runs: whether each model takes each method.

Knows shapes alone: no weights, no text, no results.
"""

from collections.abc import Sequence

from torch import nn

from probeprune.calibration.statistics import Statistics
from probeprune.data.windows import CALIBRATION, Text
from probeprune.errors import UsageError
from probeprune.experiment.cells import Cell, TextMeasure, prunes
from probeprune.experiment.presets import Preset
from probeprune.jobs.forecast import comparing_work
from probeprune.jobs.prune import Texts
from probeprune.methods import Method, without_measured_widths
from probeprune.model.loading import is_local, open_shape
from probeprune.model.placing import Work
from probeprune.plan import parts_of, widths
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


def work_of(cells: Sequence[Cell]) -> Work:
    """What a model is opened for that these cells are measured on, for `load_model(work=)`."""
    calibrations = [c.subject.calibration for c in cells if c.subject.calibration is not None]
    calibration = max(calibrations, key=lambda t: t.windows * t.length, default=CALIBRATION)
    read = [c.measure for c in cells if isinstance(c.measure, TextMeasure)] or [TextMeasure()]
    text = max(read, key=lambda m: m.batch_size * m.length)
    evaluation = Text(text.corpus, text.windows or text.batch_size, text.length)
    subjects = dict.fromkeys((c.subject.method, c.subject.ratio) for c in cells)
    return comparing_work(subjects, Texts(calibration, evaluation, batch_size=text.batch_size))


def check_ratio(method: Method, ratio: float, model: nn.Module) -> None:
    """Raise `UsageError` for a ratio that a method cannot reach on a model, where that needs no scores."""
    method = without_measured_widths(method)
    if prunes(method) and not ALLOCATIONS[method.allocation].needs_scores:
        widths(method, ratio, parts_of(model, method), [], Statistics())


def _refusal(model: nn.Module, method: Method, ratio: float) -> str | None:
    """Why the model does not take the method at that ratio; None where it does, or nobody knows yet."""
    try:
        check_ratio(method, ratio, model)
    except UsageError as error:
        return str(error)
    return None
