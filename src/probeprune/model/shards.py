"""Save a model whose layers are offloaded: a shard for each layer, one in memory at a time."""

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from probeprune.model.families import find_family
from probeprune.model.joined import published
from probeprune.model.offloading import changes_of, fetched, stored_in


def save_by_layer(model: PreTrainedModel, folder: Path) -> None:
    """Write config and weights of an offloaded model, as `save_pretrained` does.

    A layer that work has changed lies in a file of its own already: it becomes the shard, without a copy
    where both are on one file system.
    """
    groups = _groups(model)
    model.save_pretrained(folder, state_dict=groups.get("", {}))
    places: dict[str, str] = {}
    for number, (group, tensors) in enumerate(groups.items(), 1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        if group:
            _write(model, tensors, folder / file)
        else:
            (folder / SAFE_WEIGHTS_NAME).rename(folder / file)
        with safe_open(folder / file, framework="pt") as written:
            places |= dict.fromkeys(written.keys(), file)
    size = sum(tensor.nbytes for tensors in groups.values() for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def bytes_to_write(model: PreTrainedModel, folder: Path) -> int:
    """Bytes that `save_by_layer` puts on the disk of a folder that exists; a file that becomes a shard by a
    link takes none."""
    own, size = folder.stat().st_dev, 0
    for group, tensors in _groups(model).items():
        ready = _ready(model, tensors) if group else None
        if ready is None or ready.stat().st_dev != own:
            size += sum(tensor.nbytes for tensor in tensors.values())
    return size


def _groups(model: PreTrainedModel) -> dict[str, dict[str, torch.Tensor]]:
    """The parameters of each shard by name: those in memory under the empty name, those of a layer, given
    without numbers, under its own."""
    state = {n: t for n, t in model.state_dict().items() if n not in model.all_tied_weights_keys}
    layers = f"{find_family(model).layers}."
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in state.items():
        inside = name.startswith(layers)
        group = name.removeprefix(layers).partition(".")[0] if inside else name.rpartition(".")[0]
        groups.setdefault(group if tensor.is_meta else "", {})[name] = tensor
    return groups


def _ready(model: PreTrainedModel, shapes: Mapping[str, torch.Tensor]) -> Path | None:
    """The file of a changed layer that is the shard with these parameters as it stands; None without one."""
    sources = {tuple(file for file, _ in stored_in(model, name)) for name in shapes}
    changed = sources.pop() if len(sources) == 1 else ()
    if len(changed) != 1 or changed[0].parent != changes_of(model) or not _as_published(model, shapes):
        return None
    with suppress(OSError, SafetensorError), safe_open(changed[0], framework="pt") as file:
        if set(file.keys()) == set(shapes):
            return changed[0]
    return None  # a file that has gone is said when it is read


def _write(model: PreTrainedModel, shapes: Mapping[str, torch.Tensor], shard: Path) -> None:
    """Write one shard with some parameters, which are given without numbers."""
    ready = _ready(model, shapes)
    if ready is not None:
        try:
            os.link(ready, shard)
        except OSError:  # another file system, or one without links
            shutil.copyfile(ready, shard)
        return
    weights = published(model, {name: fetched(model, name) for name in shapes})
    save_file(weights, shard, metadata={"format": "pt"})


def _as_published(model: PreTrainedModel, shapes: Mapping[str, torch.Tensor]) -> bool:
    """Whether a checkpoint holds these parameters by their own names and as they are."""
    made = published(model, shapes)
    return made.keys() == shapes.keys() and all(made[name] is own for name, own in shapes.items())
