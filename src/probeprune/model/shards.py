"""Save a model whose layers are offloaded: a shard for each layer, one in memory at a time."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from probeprune.model.families import find_family
from probeprune.model.offloading import changes_of, fetched, origin


def save_by_layer(model: PreTrainedModel, folder: Path) -> None:
    """Write config and weights of an offloaded model, as `save_pretrained` does.

    A layer that work has changed lies in a file of its own already: it becomes the shard, without a copy
    where both are on one file system.
    """
    state = model.state_dict()
    model.save_pretrained(folder, state_dict={n: t for n, t in state.items() if not t.is_meta})
    layers = f"{find_family(model).layers}."
    groups: dict[str, list[str]] = {}
    for name in (n for n, t in state.items() if t.is_meta):
        inside = name.startswith(layers)
        group = name.removeprefix(layers).partition(".")[0] if inside else name.rpartition(".")[0]
        groups.setdefault(group, []).append(name)
    files = [f"model-{i + 1:05}-of-{len(groups) + 1:05}.safetensors" for i in range(len(groups) + 1)]
    (folder / SAFE_WEIGHTS_NAME).rename(folder / files[0])
    with safe_open(folder / files[0], framework="pt") as first:
        places = dict.fromkeys(first.keys(), files[0])
    for file, names in zip(files[1:], groups.values(), strict=True):
        _write(model, names, folder / file)
        places |= dict.fromkeys(names, file)
    index = {
        "metadata": {"total_size": sum(state[name].nbytes for name in places)},
        "weight_map": places,
    }
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write(model: PreTrainedModel, names: Sequence[str], shard: Path) -> None:
    """Write one shard with these parameters."""
    sources = {str(origin(model, name)[0]) for name in names}
    changed = Path(sources.pop()) if len(sources) == 1 else None
    if changed is not None and changed.parent == changes_of(model):
        with safe_open(changed, framework="pt") as file:
            same = set(file.keys()) == set(names)
        if same:
            try:
                os.link(changed, shard)
            except OSError:  # another file system, or one without links
                shutil.copyfile(changed, shard)
            return
    save_file({name: fetched(model, name) for name in names}, shard, metadata={"format": "pt"})
