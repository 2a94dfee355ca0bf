"""Refitted consumers on disk: a refit takes minutes, and is needed again when a run goes on.

One safetensors file a refit, as large as the weights it stands for, and the inverse moments where it is to
follow batches.
"""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from probeprune.files import load_tensors, save_tensors
from probeprune.strategies.compensation import Consumer

_FIGURES = ("damping", "error", "error_before")


def store(path: Path, consumers: Mapping[str, Consumer]) -> None:
    """Write them; the file appears under its name only when complete."""
    tensors: dict[str, torch.Tensor] = {}
    figures = {}
    for name, consumer in consumers.items():
        figures[name] = {key: getattr(consumer, key) for key in _FIGURES}
        for f in fields(consumer):
            value = getattr(consumer, f.name)
            if isinstance(value, torch.Tensor):
                tensors[f"{name}/{f.name}"] = value
    save_tensors(path, tensors, {"figures": json.dumps(figures)})


def read(path: Path) -> dict[str, Consumer] | None:
    """The inverse of `store`; None where there is no such file, or not a whole one."""
    found = load_tensors(path)
    if found is None:
        return None
    tensors, metadata = found
    parts: dict[str, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        name, attribute = key.rsplit("/", 1)
        parts.setdefault(name, {"bias": None})[attribute] = tensor
    try:
        figures = json.loads(metadata["figures"])
        return {name: Consumer(**parts[name], **own) for name, own in figures.items()}
    except (KeyError, TypeError, ValueError):
        return None
