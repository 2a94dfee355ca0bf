"""The teacher of a pruned checkpoint: the dense model it came from, as the records beside its weights say."""

from pathlib import Path
from typing import Any

from probeprune.errors import UsageError
from probeprune.model.loading import LoadedModel, load_model
from probeprune.model.making_records import cut_record, read_pruning, read_training
from probeprune.provenance import dtype_name


def dense_name(loaded: LoadedModel) -> str | None:
    """The name of the dense model that a checkpoint came from, through all cuts and trainings.

    None where the records do not say, as for a model that was never pruned. Raises `UsageError` for a damaged
    record.
    """
    name = _came_from(loaded.pruning, loaded.training)
    seen: set[str] = set()
    while name is not None and name not in seen:
        seen.add(name)
        folder = Path(name).expanduser()
        earlier = _came_from(read_pruning(folder), read_training(folder)) if folder.is_dir() else None
        name = name if earlier is None else earlier
    return name


def _came_from(pruning: dict[str, Any] | None, training: dict[str, Any] | None) -> str | None:
    """The model that one with these records was made from; None unless it was pruned."""
    pruned = cut_record(pruning, training)
    if pruned is None:
        return None
    name = pruned.get("base_model") or (training or {}).get("base_model")
    return name if isinstance(name, str) else None


def open_teacher(name: str, student: LoadedModel, *, trust_remote_code: bool = False) -> LoadedModel:
    """Open a teacher as its student was opened: in the same dtype, on the same device.

    Raises `UsageError` for what `load_model` refuses.
    """
    return load_model(
        name,
        dtype=dtype_name(student.dtype),
        device=str(student.device),
        trust_remote_code=trust_remote_code,
    )


def check_tokens(student: LoadedModel, teacher: LoadedModel) -> None:
    """Raise `UsageError` unless both tokenizers give every token the same id."""
    own, other = student.tokenizer.get_vocab(), teacher.tokenizer.get_vocab()
    if own == other:
        return
    token = min({*own, *other}, key=lambda t: (own.get(t) == other.get(t), t))
    ids = [f"id {v[token]}" if token in v else "no token" for v in (own, other)]
    raise UsageError(
        f"'{student.name}' and its teacher '{teacher.name}' have different tokenizers ({token!r} is {ids[0]} "
        f"in the first and {ids[1]} in the second); give the dense model that the first was pruned from."
    )
