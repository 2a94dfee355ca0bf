"""What the dense model predicts on a text, which every pruned one is compared with.

Taken down when the dense model is measured, and kept in the cache; otherwise the dense model runs once more.
"""

import hashlib
from pathlib import Path

import torch

from probeprune.evaluation.perplexity import perplexity
from probeprune.evaluation.predictions import Predictions, Recorder
from probeprune.experiment.cells import Cell, TextMeasure, dense_subject
from probeprune.experiment.workbench import Workbench
from probeprune.model.machine import cache_dir
from probeprune.processes import shares
from probeprune.progress import Progress


def recorder(text: torch.Tensor) -> Recorder:
    """What takes down the predictions on windows (count, length)."""
    return Recorder(len(text) * (text.shape[1] - 1))


def dense_predictions(bench: Workbench, cell: Cell, text: torch.Tensor, progress: Progress) -> Predictions:
    """Those on the text of a cell, whose windows (count, length) are given.

    Opens the dense model, to which nothing may be attached, where they are not kept.
    """
    measured = cell.measure
    assert isinstance(measured, TextMeasure)
    found = Predictions.load(_path(cell, text))
    if all(shares.gathered([found is not None])):
        assert found is not None
        return found
    taken = recorder(text)
    model = bench.dense(cell.subject).model
    perplexity(model, text, batch_size=measured.batch_size, see=taken, progress=progress)
    return keep_predictions(taken, cell, text)


def keep_predictions(taken: Recorder, cell: Cell, text: torch.Tensor) -> Predictions:
    """Keep what the dense model predicts on the text of a cell, and return it."""
    found = taken.predictions()
    if shares.leads():
        found.save(_path(cell, text))
    return found


def _path(cell: Cell, text: torch.Tensor) -> Path:
    """Where the predictions on these windows are kept: by the dense model's cell, and the windows."""
    dense = Cell(dense_subject(cell.subject), cell.measure)
    content = hashlib.blake2b(text.cpu().numpy().tobytes(), digest_size=8).hexdigest()
    return cache_dir() / "predictions" / f"{dense.key}-{content}.safetensors"
