"""The records that lie beside weights and say how they were made: `pruning.json` and `training.json`.

Only what later commands read of them is checked.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from probeprune.errors import UsageError, quoted
from probeprune.model.folder import check_inside, read_object

PRUNING = "pruning.json"
TRAINING = "training.json"
ATTACHED = "attached.json"
"""The file by which a folder is known that keeps a model with a method attached."""

_NUMBER = (int, float)
_OF_PRUNING: Mapping[str, tuple[type, ...]] = {"removed_share": _NUMBER, "method.name": (str,)}
_OF_TRAINING: Mapping[str, tuple[type, ...]] = {
    "corpus": (str,),
    "steps": (int,),
    "best_step": (int,),
    "tokens": (int,),
    "seconds": _NUMBER,
    "peak_memory": _NUMBER,
    "held_out_loss": (list,),
    "training.batch_size": (int,),
    "training.length": (int,),
    "training.learning_rate": _NUMBER,
}
"""Fields that are read, and the types that they may have."""


def read_pruning(folder: Path) -> dict[str, Any] | None:
    """The record that `prune` wrote beside a checkpoint; None for other models.

    Raises `UsageError` for a file that is no such record.
    """
    return _read(folder / PRUNING, _OF_PRUNING)


def read_training(folder: Path) -> dict[str, Any] | None:
    """The record that a training run wrote beside its result; None for other models.

    Raises `UsageError` for a file that is no such record.
    """
    record = _read(folder / TRAINING, _OF_TRAINING)
    if record is not None and record.get("pruning") is not None:
        _check(folder / TRAINING, record["pruning"], _OF_PRUNING)
    return record


def cut_record(pruning: dict[str, Any] | None, training: dict[str, Any] | None) -> dict[str, Any] | None:
    """What the two records of a model say of its pruning, before a training or while it was trained; None for
    a model that was not pruned."""
    if pruning is not None or training is None:
        return pruning
    return training if "removed_share" in training else training.get("pruning")


class HoldsAttached(UsageError):
    """A folder keeps a model with a method attached. Opened as any other, it would be another model than the
    one that was saved: the dense one.

    Attributes:
        folder: the folder, for hub models that in the hub's cache.
    """

    def __init__(self, folder: Path) -> None:
        record = read_object(folder / ATTACHED)
        base, method = record.get("base_model"), record.get("method")
        name = method.get("name") if isinstance(method, dict) else None
        super().__init__(
            f"'{folder}' keeps a model with method {quoted(name)} attached, which runs in `probeprune "
            "generate`, `probeprune eval` and probeprune.load_model; for anything else give the dense model"
            f"{f', {base!r}' if isinstance(base, str) else ''}."
        )
        self.folder = folder


def refuse_attached(folder: Path) -> None:
    """Raise `HoldsAttached` for a folder that keeps a model with a method attached."""
    if (folder / ATTACHED).is_file():
        raise HoldsAttached(folder)


def _read(file: Path, wanted: Mapping[str, tuple[type, ...]]) -> dict[str, Any] | None:
    if not file.exists() and not file.is_symlink():
        return None
    check_inside(file)
    record = read_object(file)
    _check(file, record, wanted)
    return record


def check_pruning(record: Any) -> None:
    """Raise `UsageError` for what cannot be the record of a pruning; None is no pruning."""
    if record is not None and _first_wrong(record, _OF_PRUNING) is not None:
        raise UsageError(
            "the model's pruning.json does not say by which method and how much it was pruned; delete that "
            "file, or prune again."
        )


def _check(file: Path, record: Any, wanted: Mapping[str, tuple[type, ...]]) -> None:
    wrong = _first_wrong(record, wanted)
    if wrong is not None:
        path, value = wrong
        raise UsageError(
            f"'{file}' is no record of probeprune, its {path} is {value!r}; delete it, or get the "
            "checkpoint again."
        )


def _first_wrong(record: Any, wanted: Mapping[str, tuple[type, ...]]) -> tuple[str, Any] | None:
    """Path and value of the first field that is missing or of another type; None where all are right."""
    for path, types in wanted.items():
        value = record
        for name in path.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if not isinstance(value, types) or isinstance(value, bool):
            return path, value
    return None
