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
    state = {n: t for n, t in model.state_dict().items() if n not in model.all_tied_weights_keys}
    model.save_pretrained(folder, state_dict={n: t for n, t in state.items() if not t.is_meta})
    layers = f"{find_family(model).layers}."
    groups: dict[str, list[str]] = {}
    for name, tensor in state.items():
        inside = name.startswith(layers)
        group = name.removeprefix(layers).partition(".")[0] if inside else name.rpartition(".")[0]
        groups.setdefault(group if tensor.is_meta else "", []).append(name)
    places: dict[str, str] = {}
    for number, (group, names) in enumerate(groups.items(), 1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        if group:
            _write(model, {name: state[name] for name in names}, folder / file)
        else:
            (folder / SAFE_WEIGHTS_NAME).rename(folder / file)
        with safe_open(folder / file, framework="pt") as written:
            places |= dict.fromkeys(written.keys(), file)
    index = {
        "metadata": {"total_size": sum(state[name].nbytes for names in groups.values() for name in names)},
        "weight_map": places,
    }
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write(model: PreTrainedModel, shapes: Mapping[str, torch.Tensor], shard: Path) -> None:
    """Write one shard with some parameters, which are given without numbers."""
    sources = {tuple(file for file, _ in stored_in(model, name)) for name in shapes}
    changed = sources.pop() if len(sources) == 1 else ()
    if len(changed) == 1 and changed[0].parent == changes_of(model) and _as_published(model, shapes):
        same = False
        with suppress(OSError, SafetensorError), safe_open(changed[0], framework="pt") as file:
            same = set(file.keys()) == set(shapes)
        if same:  # a file that has gone is said below
            try:
                os.link(changed[0], shard)
            except OSError:  # another file system, or one without links
                shutil.copyfile(changed[0], shard)
            return
    weights = published(model, {name: fetched(model, name) for name in shapes})
    save_file(weights, shard, metadata={"format": "pt"})


def _as_published(model: PreTrainedModel, shapes: Mapping[str, torch.Tensor]) -> bool:
    """Whether a checkpoint holds these parameters by their own names and as they are."""
    made = published(model, shapes)
    return made.keys() == shapes.keys() and all(made[name] is own for name, own in shapes.items())
