"""Save pruned models as safetensors checkpoints that open anywhere.

A model whose layers all have the same width is saved under a plain config of its own family, or of one that
computes the same function, and opens with transformers alone. A model whose layers differ in width is saved
with the small file `modeling_pruned.py` next to the weights. A checkpoint appears under its name only when it
is complete.
"""

import copy
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from probeprune.errors import UsageError, unknown
from probeprune.model.blocks import Block, find_blocks
from probeprune.model.families import FAMILIES, PRUNED_PREFIX, Family, find_family
from probeprune.model.modeling_pruned import pruned_config
from probeprune.places import check_free, resolved, writing
from probeprune.quiet import quiet_libraries

Layout = Literal["uniform", "per-layer"]
"""`uniform`: a plain config, one width for all layers; `per-layer`: each layer has its own widths."""

_HEADROOM = 64 << 20
"""Bytes that a save may need besides the weights: tokenizer, configs, the file system's own."""


def register_checkpoints(family: Family) -> None:
    """Let transformers' auto classes open per-layer checkpoints of a family."""
    for model_type in family.model_types:
        pruned = pruned_config(CONFIG_MAPPING[model_type])
        AutoConfig.register(pruned.model_type, pruned, exist_ok=True)


for _family in FAMILIES:
    register_checkpoints(_family)


class _Unfit(Exception):
    """A config that cannot describe a model; the text begins with the config's class."""


def save(
    model: Any,
    path: str | Path,
    *,
    tokenizer: Any = None,
    layout: Layout | None = None,
    card: str | None = None,
    record: dict[str, Any] | None = None,
    write_extra: Callable[[Path], None] | None = None,
) -> PreTrainedModel:
    """Write a pruned (or dense) model as a checkpoint directory.

    Args:
        model: a causal LM of a supported family, after `prune` or loaded from a checkpoint.
        path: a directory that does not exist or is empty.
        tokenizer: saved next to the model.
        layout: None for `uniform` if the model's widths allow it, otherwise `per-layer`. A layout given by
            name is required: it is an error if it cannot hold the model.
        card: the model card in Markdown, written as README.md.
        record: a description of the pruning, written as pruning.json.
        write_extra: called with the directory before it gets its final name, to write further files.

    Returns:
        The model as the checkpoint describes it. It shares the weights of `model`.

    Raises:
        UsageError: a directory in use, too little disk space, a model that the layout cannot hold.
    """
    target = Path(path)
    check_free(target)
    exported = export(model, layout)
    tensors = {id(t): t for t in exported.state_dict().values()}.values()
    check_space(target, sum(t.numel() * t.element_size() for t in tensors))
    with writing(target) as folder:
        with quiet_libraries(bars=False):
            exported.save_pretrained(folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
        if card is not None:
            (folder / "README.md").write_text(card, encoding="utf-8")
        if record is not None:
            (folder / "pruning.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
        if write_extra is not None:
            write_extra(folder)
    return exported


def check_space(target: Path, size: int) -> None:
    """Raise `UsageError` unless the disk of `target` has room for `size` bytes of weights."""
    real = resolved(target)
    folder = next(p for p in (real, *real.parents) if p.exists())
    free = shutil.disk_usage(folder).free
    if free < size + _HEADROOM:
        raise UsageError(
            f"{target} needs {(size + _HEADROOM) / 2**30:.2f} GiB and its disk has {free / 2**30:.2f} GiB "
            "left; free some space or choose another directory."
        )


def export(model: Any, layout: Layout | None = None) -> PreTrainedModel:
    """The same weights in the class that opens them from a checkpoint; see `save`."""
    if layout not in (None, *get_args(Layout)):
        raise UsageError(unknown("layout", str(layout), get_args(Layout)))
    if layout != "per-layer":
        try:
            return _uniform(model)
        except _Unfit as error:
            if layout == "uniform":
                raise UsageError(
                    f"no plain config describes this model ({error}); use layout per-layer, or prune with "
                    "one width for all layers, MLPs alone (blocks mlp), or without compensation."
                ) from error
    try:
        return _fitted(model, _pruned_config(model))
    except _Unfit as error:
        raise UsageError(
            f"no checkpoint can hold this model ({error}); save the model as `prune` left it, without adding "
            "or removing modules."
        ) from error


def _uniform(model: Any) -> PreTrainedModel:
    """The model under the first plain config that describes it. Raises `_Unfit` with all reasons."""
    blocks = find_blocks(model)
    attention = {(b.query_heads, b.kv_heads, b.head_dim) for b in blocks if b.kind == "attention"}
    mlp = {b.units for b in blocks if b.kind == "mlp"}
    if len(attention) > 1 or len(mlp) > 1:
        raise _Unfit("its layers have different widths")
    reasons = []
    for config_class, fields in _plain_candidates(model, blocks):
        try:
            return _fitted(model, _make_config(config_class, fields))
        except _Unfit as error:
            reasons.append(str(error))
    raise _Unfit("; ".join(reasons))


def _plain_candidates(
    model: Any, blocks: Sequence[Block]
) -> list[tuple[type[PretrainedConfig], dict[str, Any]]]:
    """Plain configs (class, fields) that may describe a model whose layers all have one width."""
    family = find_family(model)
    attention = next(b for b in blocks if b.kind == "attention")
    mlp = next(b for b in blocks if b.kind == "mlp")
    base = _plain(model.config)
    widths = {
        "num_attention_heads": attention.query_heads,
        "num_key_value_heads": attention.kv_heads,
        family.mlp.width_field: mlp.units,
    }
    changes = {k: v for k, v in widths.items() if getattr(base, k, v) != v}
    head_dim = attention.head_dim
    tied = base.hidden_size == attention.query_heads * head_dim
    if getattr(base, "head_dim", None) not in (None, head_dim) or not tied:
        changes["head_dim"] = head_dim
    biases = {
        record.bias_field: True
        for record, kind in ((family.attention, "attention"), (family.mlp, "mlp"))
        if getattr(base, record.bias_field, None) is False
        and any(b.consumer.bias is not None for b in blocks if b.kind == kind)
    }
    fields = {k: v for k, v in base.to_dict().items() if k != "model_type"}
    candidates = [(type(base), {**fields, **changes})]
    if biases:
        candidates.append((type(base), {**fields, **changes, **biases}))
    if family.twin is not None:
        twin = CONFIG_MAPPING[family.twin.model_type]
        names = set(twin().to_dict()) - {"model_type", "architectures", "transformers_version"}
        shared = {k: v for k, v in fields.items() if k in names}
        candidates.append((twin, {**shared, **changes, "head_dim": head_dim, **family.twin.fields}))
    return candidates


def _make_config(config_class: type[PretrainedConfig], fields: dict[str, Any]) -> PretrainedConfig:
    """A config with these fields. Raises `_Unfit` if its class rejects them."""
    try:
        return config_class(**fields)
    except Exception as error:  # configs validate themselves and may raise anything
        lines = str(error).strip().splitlines()
        reason = lines[-1].strip().rstrip(".") if lines else type(error).__name__
        raise _Unfit(f"{config_class.__name__} rejects its sizes: {reason}") from error


def _plain(config: Any) -> PretrainedConfig:
    """A copy of a model's config as a plain one of its family, without widths of single layers."""
    if not config.model_type.startswith(PRUNED_PREFIX):
        return copy.deepcopy(config)
    fields = config.to_dict()
    for name in ("model_type", "pruned", "auto_map", "architectures"):
        fields.pop(name, None)
    return AutoConfig.for_model(config.model_type.removeprefix(PRUNED_PREFIX), **fields)


def _pruned_config(model: Any) -> PretrainedConfig:
    """A config that lists, for each module, the differences from the plain model."""
    base = _plain(model.config)
    plain = empty_model(base, model.dtype)
    blocks = find_blocks(model)
    pruned: dict[str, dict[str, Any]] = {}
    for block in blocks:
        for name in dict.fromkeys(m.name for m in block.members):
            ours, theirs = model.get_submodule(name), plain.get_submodule(name)
            differs: dict[str, Any] = {
                size: getattr(ours, size)
                for size in ("in_features", "out_features")
                if getattr(ours, size) != getattr(theirs, size)
            }
            if (ours.bias is None) != (theirs.bias is None):
                differs["bias"] = ours.bias is not None
            if differs:
                pruned[name] = differs
        if block.kind == "attention":
            counts = {
                name: value
                for name, value in (
                    (block.query_count, block.query_heads),
                    (block.kv_count, block.kv_heads),
                    ("num_key_value_groups", block.group_size),
                )
                if name is not None and _attribute(plain.get_submodule(block.name), name) not in (None, value)
            }
            if counts:
                pruned[block.name] = counts
    fields = base.to_dict()
    for name in ("model_type", "architectures"):
        fields.pop(name, None)
    plain_class: Any = type(base)
    config: PretrainedConfig = pruned_config(plain_class)(**fields, pruned=pruned)
    return config


def _attribute(module: Any, name: str) -> Any:
    for part in name.split("."):
        module = getattr(module, part, None)
    return module


def empty_model(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model of this config whose weights take no memory (device `meta`)."""
    with torch.device("meta"), quiet_libraries(bars=False):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)


def _fitted(model: Any, config: PretrainedConfig) -> PreTrainedModel:
    """A model of this config that holds `model`'s weights. Raises `_Unfit` if they do not fit.

    Biases that the config has and the model lacks become zeros; no other tensor may be missing or left over.
    """
    name_of_config = type(config).__name__
    try:
        exported = empty_model(config, model.dtype)
    except ValueError as error:  # for example, OPT requires heads that divide its hidden size
        raise _Unfit(f"{name_of_config} rejects its sizes: {str(error).strip().rstrip('.')}") from error
    state = dict(model.state_dict())
    wanted = exported.state_dict()
    linears = {n for n, m in exported.named_modules() if isinstance(m, nn.Linear)}
    for name, tensor in wanted.items():
        owner, _, part = name.rpartition(".")
        if name not in state and part == "bias" and owner in linears:
            weight = state[f"{owner}.weight"]
            state[name] = torch.zeros(tensor.shape, dtype=weight.dtype, device=weight.device)
    for name in state.keys() | wanted.keys():
        if name not in wanted:
            raise _Unfit(f"{name_of_config} has no {name}")
        if name not in state:
            raise _Unfit(f"{name_of_config} needs {name}")
        if state[name].shape != wanted[name].shape:
            shapes = f"{tuple(wanted[name].shape)}, not {tuple(state[name].shape)}"
            raise _Unfit(f"{name_of_config} needs {name} of shape {shapes}")
    exported.load_state_dict(state, strict=True, assign=True)
    exported.tie_weights()
    for name, buffer in list(exported.named_buffers()):
        if buffer.is_meta:  # not in the state dict: rotary frequencies, scales
            owner, _, part = name.rpartition(".")
            exported.get_submodule(owner)._buffers[part] = model.get_buffer(name)
    exported.generation_config = copy.deepcopy(model.generation_config)
    return exported.eval()
