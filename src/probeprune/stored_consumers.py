"""Refitted consumers on disk: a refit takes minutes, and is needed again when a run goes on.

One safetensors file a refit, as large as the weights it stands for; with rests about twice that.
"""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from probeprune.calibration import load_tensors, save_tensors
from probeprune.compensation import Consumer
from probeprune.rest import Rest

_FIGURES = ("damping", "error", "error_before")


def store(path: Path, consumers: Mapping[str, Consumer]) -> None:
    """Write them; the file appears under its name only when complete."""
    tensors: dict[str, torch.Tensor] = {}
    figures = {}
    for name, consumer in consumers.items():
        figures[name] = {key: getattr(consumer, key) for key in _FIGURES}
        for part, owner in (("consumer", consumer), ("rest", consumer.rest)):
            for f in fields(owner) if owner is not None else ():
                value = getattr(owner, f.name)
                if isinstance(value, torch.Tensor):
                    tensors[f"{name}/{part}/{f.name}"] = value
        if consumer.rest is not None:
            figures[name]["units"] = consumer.rest.units
    save_tensors(path, tensors, {"figures": json.dumps(figures)})


def read(path: Path) -> dict[str, Consumer] | None:
    """The inverse of `store`; None where there is no such file, or not a whole one."""
    found = load_tensors(path)
    if found is None:
        return None
    tensors, metadata = found
    parts: dict[str, dict[str, dict[str, torch.Tensor]]] = {}
    for key, tensor in tensors.items():
        name, part, attribute = key.rsplit("/", 2)
        parts.setdefault(name, {}).setdefault(part, {})[attribute] = tensor
    try:
        figures = json.loads(metadata["figures"])
        return {name: _consumer(parts[name], own) for name, own in figures.items()}
    except (KeyError, TypeError, ValueError):
        return None


def _consumer(parts: Mapping[str, Mapping[str, torch.Tensor]], figures: Mapping[str, Any]) -> Consumer:
    values: dict[str, Any] = {"bias": None, **parts["consumer"], **{key: figures[key] for key in _FIGURES}}
    if "units" in figures:
        values["rest"] = Rest(units=figures["units"], **parts["rest"])
    return Consumer(**values)
