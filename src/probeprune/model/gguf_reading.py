"""A model from a GGUF file of an architecture in our table, whose layers may differ in width.

Dequantised to float32. Knows nothing of tokenizers and of the cache.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import gguf
import numpy as np
import torch
from accelerate import init_empty_weights
from gguf import GGUFReader, ReaderTensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from probeprune.foreign.quiet import quiet_libraries
from probeprune.model.described import export
from probeprune.model.families import AttentionRecord, find_family
from probeprune.model.gguf_architectures import Architecture
from probeprune.model.gguf_config import groups_of, head_size, make_config, widths
from probeprune.model.gguf_rope import FACTORS, LONG, SHORT
from probeprune.model.gguf_tensors import Heads, Place, places, restored
from probeprune.model.modeling_pruned import narrow

_FACTORS = (FACTORS, LONG, SHORT)


def keys_of(reader: GGUFReader, architecture: str) -> dict[str, Any]:
    """The keys of an architecture in a file, without its name in front."""
    prefix = f"{architecture}."
    return {
        name.removeprefix(prefix): field.contents()
        for name, field in reader.fields.items()
        if name.startswith(prefix)
    }


def read_model(reader: GGUFReader, architecture: Architecture) -> PreTrainedModel:
    """The model of a file, in the class and with the config that a checkpoint of it has.

    Raises `ValueError`, `KeyError` or `TypeError` for tensors or keys that are missing or do not fit.
    """
    fields = keys_of(reader, architecture.name)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    for name in ("token_embd.weight", "output_norm.weight"):
        if name not in stored:
            raise ValueError(f"it has no tensor for '{name}'")
    vocabulary, tied = int(stored["token_embd.weight"].shape[-1]), "output.weight" not in stored
    factors = {name: _numbers(stored[f"{name}.weight"]) for name in _FACTORS if f"{name}.weight" in stored}
    config = make_config(architecture, fields, factors, vocabulary, tied)
    with init_empty_weights(include_buffers=False), quiet_libraries(bars=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    found = [
        place
        for place in places(architecture, find_family(model).layers, int(fields["block_count"]))
        if not (tied and place.name == "output")
    ]
    _check_names(found, stored)
    heads = [
        Heads(queries, groups, head_size(fields))
        for queries, groups in zip(widths(fields, "attention.head_count"), groups_of(fields), strict=True)
    ]
    mlps = widths(fields, "feed_forward_length")
    with init_empty_weights(include_buffers=False):
        narrow(model, _changes(model, found, stored, heads, mlps))
    model.load_state_dict(_state(model, found, stored, heads), strict=not tied, assign=True)
    model.tie_weights()
    return export(model)


def _numbers(tensor: ReaderTensor) -> torch.Tensor:
    """The numbers of a stored tensor, float32, in the shape of torch."""
    shape = [int(size) for size in reversed(tensor.shape)]
    return torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type))).view(shape)


def _check_names(found: Sequence[Place], stored: Mapping[str, ReaderTensor]) -> None:
    """Raise `ValueError` for a tensor that is missing, and for one that no place takes."""
    left = set(stored) - {f"{name}.weight" for name in _FACTORS}
    for place in found:
        weight, bias = f"{place.name}.weight", f"{place.name}.bias"
        if weight not in stored:
            raise ValueError(f"it has no tensor for '{weight}'")
        if place.part.bias == "always" and bias not in stored:
            raise ValueError(f"it has no tensor for '{bias}'")
        left -= {weight, bias} if place.part.bias != "no" else {weight}
    if left:
        raise ValueError(f"it holds '{min(left)}', for which its architecture has no place")


def _changes(
    model: Any,
    found: Sequence[Place],
    stored: Mapping[str, ReaderTensor],
    heads: Sequence[Heads],
    mlps: Sequence[int],
) -> dict[str, dict[str, Any]]:
    """What `narrow` has to change of a plain model for the widths and biases of a file."""
    changes: dict[str, dict[str, Any]] = {}
    family, hidden = find_family(model), model.config.hidden_size
    for place in found:
        if place.layer is None:
            continue
        sizes = heads[place.layer].sizes(hidden, mlps[place.layer], 0)
        for path, rows in place.part.modules.items():
            if place.part.columns is not None:
                changes[path] = {
                    "in_features": sizes[place.part.columns],
                    "out_features": sizes[rows],
                    "bias": f"{place.name}.bias" in stored,
                }
    assert isinstance(family.attention, AttentionRecord)  # of all families that a file's architecture carries
    for index, layer in enumerate(heads):
        path = f"{family.layers}.{index}.{family.attention.module}"
        if hasattr(model.get_submodule(path), "num_key_value_groups"):
            changes[path] = {"num_key_value_groups": layer.queries // layer.groups}
    return changes


def _state(
    model: Any, found: Sequence[Place], stored: Mapping[str, ReaderTensor], heads: Sequence[Heads]
) -> dict[str, torch.Tensor]:
    """The state dict, without a tied output matrix. Raises `ValueError` for a shape that does not fit."""
    state: dict[str, torch.Tensor] = {}
    for place in found:
        modules = {path: model.get_submodule(path) for path in place.part.modules}
        for kind in ("weight", "bias"):
            name = f"{place.name}.{kind}"
            if name not in stored:
                continue
            wanted = [tuple(getattr(module, kind).shape) for module in modules.values()]
            rows = [shape[0] for shape in wanted]
            numbers = _numbers(stored[name])
            if tuple(numbers.shape) != (sum(rows), *wanted[0][1:]):
                raise ValueError(f"its tensor '{name}' has the shape {tuple(numbers.shape)}")
            numbers = restored(numbers, place.part.order, heads[place.layer or 0])
            if kind == "weight" and place.part.shift:
                numbers = numbers - place.part.shift
            for path, part in zip(modules, numbers.split(rows), strict=True):
                state[f"{path}.{kind}"] = part.contiguous()
    return state
