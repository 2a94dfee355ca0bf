"""An attachment in a folder: `attached.json` and `statistics.safetensors`, written and read.

The weights of the model lie beside them, or elsewhere under a name. Knows nothing of how models are opened.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from probeprune import records
from probeprune.calibration.statistics import Statistics
from probeprune.errors import UsageError, quoted
from probeprune.files import write_json
from probeprune.methods import TABLES, Method
from probeprune.model.folder import check_inside, read_object
from probeprune.model.identity import config_fields, weights_fingerprint
from probeprune.model.making_records import ATTACHED
from probeprune.prepare import Prepared, load_prepared
from probeprune.provenance import dtype_name, versions
from probeprune.ranges import plain
from probeprune.runtime.attachment import Attachment
from probeprune.strategies.account import Costs
from probeprune.strategies.pruned_block import Cut
from probeprune.strategies.widths import Prunable

STATISTICS = "statistics.safetensors"

Weights = Literal["copy", "reference"]
"""Where the dense weights are: `copy` beside the attachment, `reference` elsewhere, under a name."""

_FORMAT = 1
_KEYS: Mapping[str, tuple[type, ...]] = {
    "method": (dict,),
    "ratio": (int, float),
    "removed_share": (int, float),
    "weights": (str,),
    "base_model": (str, type(None)),
    "dtype": (str,),
    "fingerprint": (str,),
    "config": (dict,),
    "cuts": (dict,),
    "statistics": (str,),
}
_DTYPES = {dtype_name(d): d for d in (torch.float32, torch.float16, torch.bfloat16)}


@dataclass(frozen=True, eq=False)
class Stored:
    """What a folder says of an attachment.

    Attributes:
        folder: the folder.
        record: the content of attached.json.
    """

    folder: Path
    record: Mapping[str, Any]

    @property
    def weights(self) -> Weights:
        """Where the dense weights are."""
        kind: Weights = self.record["weights"]
        return kind

    @property
    def base_model(self) -> str | None:
        """The name of the dense model; None where it was not known."""
        name: str | None = self.record["base_model"]
        return name

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the statistics were made in."""
        return _DTYPES[self.record["dtype"]]


def write_attachment(
    folder: Path,
    model: nn.Module,
    blocks: Sequence[Prunable],
    kept: Attachment,
    *,
    weights: Weights,
    base_model: str | None,
    removed_share: float,
    more: Mapping[str, Any],
) -> None:
    """Write both files into a folder that is not finished.

    Args:
        folder: it is there.
        model: the model that the method is attached to, or its dense form.
        blocks: its blocks.
        kept: the attachment.
        weights, base_model: see `Stored`.
        removed_share: share of all blocks' parameters that the cut removes.
        more: further facts for attached.json, such as what was measured.
    """
    parts = {f.name: dict(getattr(kept.statistics, f.name)) for f in fields(Statistics)}
    fingerprint = weights_fingerprint(model)
    combination = (kept.method, kept.ratio)
    prepared = Prepared(fingerprint, kept.text, (combination,), {k: v for k, v in parts.items() if v})
    prepared.save(folder / STATISTICS)
    dtype: Any = model.dtype
    record = {
        **more,
        "format": _FORMAT,
        "method": kept.method.record(),
        "ratio": kept.ratio,
        "removed_share": removed_share,
        "weights": weights,
        "base_model": base_model,
        "dtype": dtype_name(dtype),
        "fingerprint": fingerprint,
        "config": config_fields(model),
        "text": dict(kept.text),
        "statistics": _digest(folder / STATISTICS),
        "costs": None if kept.costs is None else kept.costs.record(),
        "cuts": {
            block.name: [cut.width, None if cut.units is None else cut.units.tolist()]
            for block, cut in zip(blocks, kept.cuts, strict=True)
        },
        "versions": versions(),
    }
    write_json(folder / ATTACHED, record)


def read_record(folder: Path) -> Stored:
    """What attached.json says. Raises `UsageError` for a file that is not as `write_attachment` writes it."""
    file = folder / ATTACHED
    check_inside(file)
    record = read_object(file)
    if record.get("format") != _FORMAT:
        raise UsageError(
            f"'{file}' was written by another version of probeprune; save the attached model again."
        )
    for key, kinds in _KEYS.items():
        if not isinstance(record.get(key), kinds) or isinstance(record[key], bool):
            raise _not_ours(file, key, record.get(key))
    if record["weights"] not in ("copy", "reference"):
        raise _not_ours(file, "weights", record["weights"])
    if record["dtype"] not in _DTYPES:
        raise _not_ours(file, "dtype", record["dtype"])
    return Stored(folder, record)


def read_attachment(stored: Stored) -> Attachment:
    """The attachment of a folder. Raises `UsageError` for a method that this version does not know, and for
    statistics that are missing, torn or of another attachment."""
    file, statistics = stored.folder / ATTACHED, stored.folder / STATISTICS
    try:
        method = records.from_json(Method, stored.record["method"], TABLES)
        ratio = plain("ratio", stored.record["ratio"])
        cuts = [_cut(value) for value in stored.record["cuts"].values()]
        costs = None if stored.record.get("costs") is None else Costs(**stored.record["costs"])
    except UsageError as error:
        raise UsageError(f"'{file}': {error}") from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"'{file}' is no record of probeprune ({type(error).__name__}: {error}); get the folder again, "
            "or save the attached model again."
        ) from None
    advice = "get the folder again, or save the attached model again"
    if not statistics.is_file():
        raise UsageError(f"'{stored.folder}' lacks {STATISTICS}, what {method.name!r} knows of it; {advice}.")
    check_inside(statistics)
    if _digest(statistics) != stored.record["statistics"]:
        raise UsageError(f"'{statistics}' is torn, or belongs to another {ATTACHED}; {advice}.")
    prepared = load_prepared(statistics)
    return Attachment(method, ratio, cuts, Statistics(**prepared.pieces), prepared.text, costs)


def check_base(model: nn.Module, stored: Stored) -> None:
    """Raise `UsageError` unless a dense model, in the dtype of the statistics, is the one that the method was
    attached to."""
    name = f"'{stored.base_model}'" if stored.weights == "reference" else f"the weights in '{stored.folder}'"
    now, then = config_fields(model), stored.record["config"]
    changed = [k for k in then if k in now and now[k] != then[k]]
    if changed:
        key = changed[0]
        what = f"its {key} was {quoted(then[key])} and is {quoted(now[key])}"
    elif weights_fingerprint(model) != stored.record["fingerprint"]:
        what = "its weights are others"
    else:
        return
    raise UsageError(
        f"{name} has changed since method {quoted(stored.record['method'].get('name'))} was attached to it "
        f"({what}); get that model again, or attach the method to this one and save it."
    )


def _cut(value: Any) -> Cut:
    width, units = value
    return Cut(int(width), None if units is None else torch.tensor(units, dtype=torch.long))


def _not_ours(file: Path, key: str, value: object) -> UsageError:
    return UsageError(
        f"'{file}' is no record of probeprune, its {key} is {quoted(value)}; get the folder again, or save "
        "the attached model again."
    )


def _digest(file: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with file.open("rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
