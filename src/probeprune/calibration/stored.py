"""Convert parts of `Statistics` to tensors and JSON values, and back, for safetensors files."""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from probeprune.algebra.moments import Moments
from probeprune.algebra.routed_moments import RoutedMoments
from probeprune.files import load_tensors, save_tensors
from probeprune.processes import shares
from probeprune.strategies import Part
from probeprune.strategies.compensation import Consumer
from probeprune.strategies.widths import Damage

logger = logging.getLogger(__name__)

Tensors = dict[str, torch.Tensor]
Values = dict[str, Any]

_FIGURES = ("damping", "error", "error_before")


@dataclass(frozen=True)
class Codec:
    """Conversion of one part to tensors and JSON values, and back."""

    pack: Callable[[Mapping[str, Any]], tuple[Tensors, Values]]
    unpack: Callable[[Tensors, Values], dict[str, Any]]
    """Raises `AttributeError`, `KeyError`, `TypeError` or `ValueError` for anything that `pack` did not
    return."""


def _by_name(tensors: Tensors) -> dict[str, Tensors]:
    """Group tensors named `name/field` into one mapping per name."""
    sorted_: dict[str, Tensors] = {}
    for key, tensor in tensors.items():
        name, _, field = key.rpartition("/")
        sorted_.setdefault(name, {})[field] = tensor
    return sorted_


def _pack_moments(moments: Mapping[str, Moments | RoutedMoments]) -> tuple[Tensors, Values]:
    return {f"{name}/{field}": t for name, m in moments.items() for field, t in m.state().items()}, {}


def _unpack_moments(tensors: Tensors, values: Values) -> dict[str, Moments]:
    return {name: Moments.from_state(state) for name, state in _by_name(tensors).items()}


def _unpack_routed(tensors: Tensors, values: Values) -> dict[str, RoutedMoments]:
    return {name: RoutedMoments.from_state(state) for name, state in _by_name(tensors).items()}


def _pack_damages(damages: Mapping[str, Damage]) -> tuple[Tensors, Values]:
    return {n: d.curve for n, d in damages.items()}, {n: [d.saving, d.whole] for n, d in damages.items()}


def _unpack_damages(tensors: Tensors, values: Values) -> dict[str, Damage]:
    return {name: Damage(tensors[name], *amounts) for name, amounts in values.items()}


def _pack_consumers(consumers: Mapping[str, Consumer]) -> tuple[Tensors, Values]:
    tensors = {
        f"{name}/{f.name}": value
        for name, consumer in consumers.items()
        for f in fields(consumer)
        if isinstance(value := getattr(consumer, f.name), torch.Tensor)
    }
    return tensors, {name: {f: getattr(c, f) for f in _FIGURES} for name, c in consumers.items()}


def _unpack_consumers(tensors: Tensors, values: Values) -> dict[str, Consumer]:
    parts = _by_name(tensors)
    return {name: Consumer(**{"bias": None, **parts[name], **figures}) for name, figures in values.items()}


TENSORS = Codec(lambda tensors: (dict(tensors), {}), lambda tensors, values: dict(tensors))
"""One tensor for each name."""

CODECS: Mapping[Part, Codec] = {
    "moments": Codec(_pack_moments, _unpack_moments),
    "routed": Codec(_pack_moments, _unpack_routed),
    "saliences": TENSORS,
    "gates": TENSORS,
    "damages": Codec(_pack_damages, _unpack_damages),
    "consumers": Codec(_pack_consumers, _unpack_consumers),
}
"""Codecs by part."""


def codec(part: Part | Codec) -> Codec:
    """The codec of a part, or one that is given."""
    return part if isinstance(part, Codec) else CODECS[part]


def store(path: Path, part: Part | Codec, value: Mapping[str, Any]) -> None:
    """Write a part, in the same bytes each time; the file appears under its name only when complete."""
    tensors, values = codec(part).pack(value)
    # Under one key: safetensors writes several in any order.
    save_tensors(path, tensors, {"values": json.dumps(values)})


def read(path: Path, part: Part | Codec) -> dict[str, Any] | None:
    """Read the part written by `store`; None if the file is missing or damaged."""
    stored = load_tensors(path)
    value = None if stored is None else _unpacked(part, *stored)
    if value is not None:
        _say_read(part, path)
    return value


def read_by_first(path: Path, part: Part | Codec) -> dict[str, Any] | None:
    """As `read`; where work is shared out, the first process reads, and all get what it has."""
    if not shares.active():
        return read(path, part)
    stored = load_tensors(path) if shares.leads() else None
    if stored is not None and _unpacked(part, *stored) is None:
        stored = None
    if not shares.agreed(stored is not None):
        return None
    _say_read(part, path)
    tensors, metadata = stored or ({}, {})
    return _unpacked(part, shares.agreed_tensors(tensors), shares.agreed(metadata))


def _say_read(part: Part | Codec, path: Path) -> None:
    logger.info("%s, computed before: %s", part if isinstance(part, str) else "tensors", path)


def _unpacked(part: Part | Codec, tensors: Tensors, metadata: Mapping[str, str]) -> dict[str, Any] | None:
    try:
        return codec(part).unpack(tensors, json.loads(metadata["values"]))
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
