"""Checkpoints of pruned models: safetensors that open anywhere.

Layers of one width are saved under a plain config of the model's own family, or of one that computes exactly
the same, and open with transformers alone. Layers with widths of their own are saved with the small modelling
file `modeling_pruned.py` beside them. A save appears under its name only when complete.
"""

import copy
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, MistralConfig, PretrainedConfig, PreTrainedModel

from probeprune.errors import UsageError
from probeprune.files import writing
from probeprune.model import modeling_pruned
from probeprune.model.blocks import Block, find_blocks
from probeprune.model.families import PRUNED_PREFIX
from probeprune.quiet import quiet_libraries

Layout = Literal["uniform", "per-layer"]
"""`uniform`: a plain config; `per-layer`: every layer has widths of its own."""

_HEADROOM = 64 << 20
"""Bytes a save may need beside the weights: tokenizer, configs, the file system's own."""

for _model in modeling_pruned.MODELS:
    AutoConfig.register(_model.config_class.model_type, _model.config_class)
    AutoModelForCausalLM.register(_model.config_class, _model)


def save(
    model: Any,
    path: str | Path,
    *,
    tokenizer: Any = None,
    layout: Layout | None = None,
    card: str | None = None,
    record: dict[str, Any] | None = None,
    also: Callable[[Path], None] | None = None,
) -> PreTrainedModel:
    """Write a pruned (or dense) model as a checkpoint directory.

    Args:
        model: a causal LM of a supported family, as `prune` left it or a checkpoint gave it.
        path: a directory that does not exist or is empty.
        tokenizer: saved beside the model.
        layout: None for `uniform` where the model's widths allow it, else `per-layer`; naming one makes it
            an error where it cannot be had.
        card: the model card, Markdown, written as README.md.
        record: what was done, written as pruning.json.
        also: writes what else belongs into the directory.

    Returns:
        The model as the checkpoint describes it; its weights are those of `model`, not copies.

    Raises:
        UsageError: a directory in use, too little disk space, a model whose shape the layout cannot hold.
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
        if also is not None:
            also(folder)
    return exported


def check_free(target: Path) -> None:
    """Raise `UsageError` unless a checkpoint may be written to this directory."""
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists() or target.is_symlink():
        raise UsageError(f"{target} exists and is not empty; choose another directory.")


def check_space(target: Path, size: int) -> None:
    """Raise `UsageError` unless the disk has room for so many bytes of weights."""
    folder = next(p for p in (target.absolute(), *target.absolute().parents) if p.exists())
    free = shutil.disk_usage(folder).free
    if free < size + _HEADROOM:
        raise UsageError(
            f"{target} needs {(size + _HEADROOM) / 2**30:.2f} GiB and its disk has {free / 2**30:.2f} GiB "
            "left; free some or choose another directory."
        )


def export(model: Any, layout: Layout | None = None) -> PreTrainedModel:
    """The same weights in the class that opens them from a checkpoint; see `save`."""
    if layout not in (None, "uniform", "per-layer"):
        raise UsageError(f"unknown layout {layout!r}; choose uniform or per-layer.")
    blocks = find_blocks(model)
    refused: list[str] = []
    if layout != "per-layer":
        for config in _plain_configs(model, blocks, refused):
            exported, reason = _fitted(model, config)
            if exported is not None:
                return exported
            refused.append(f"{type(config).__name__} {reason}")
        if layout == "uniform":
            raise UsageError(
                f"no plain config describes this model ({'; '.join(refused)}); use layout per-layer, or "
                "prune with one width for all layers, MLPs alone (blocks mlp), or without compensation."
            )
    exported, reason = _fitted(model, _pruned_config(model))
    assert exported is not None, reason
    return exported


def _plain_configs(model: Any, blocks: Sequence[Block], refused: list[str]) -> Iterator[PretrainedConfig]:
    """Configs without widths of single layers that may describe the model; why not, in `refused`."""
    attention = {(b.query_heads, b.kv_heads, b.head_dim) for b in blocks if b.kind == "attention"}
    mlp = {b.units for b in blocks if b.kind == "mlp"}
    if len(attention) > 1 or len(mlp) > 1:
        refused.append("its layers have different widths")
        return
    ((query_heads, kv_heads, head_dim),) = attention
    base = _plain(model.config)
    wanted = {
        "num_attention_heads": query_heads,
        "num_key_value_heads": kv_heads,
        "ffn_dim" if hasattr(base, "ffn_dim") else "intermediate_size": mlp.pop(),
    }
    changes = {k: v for k, v in wanted.items() if getattr(base, k, v) != v}
    if getattr(base, "head_dim", None) not in (None, head_dim) or base.hidden_size != query_heads * head_dim:
        changes["head_dim"] = head_dim
    variants = [changes]
    biases = {
        name: True
        for name, kind in (("attention_bias", "attention"), ("mlp_bias", "mlp"))
        if getattr(base, name, None) is False
        and any(b.consumer.bias is not None for b in blocks if b.kind == kind)
    }
    if biases:
        variants.append({**changes, **biases})
    for variant in variants:
        try:
            yield _changed(base, variant)
        except Exception as error:  # a config's own validation raises what it likes
            said = str(error).strip().splitlines()
            refused.append(
                f"{type(base).__name__} says: {said[-1].strip() if said else type(error).__name__}"
            )
    if base.model_type == "llama":  # Mistral without a window is the same function with a free head count
        known = set(MistralConfig().to_dict()) - {"model_type", "architectures", "transformers_version"}
        same = {k: v for k, v in base.to_dict().items() if k in known}
        yield MistralConfig(**{**same, **changes, "head_dim": head_dim, "sliding_window": None})


def _plain(config: Any) -> PretrainedConfig:
    """A copy of a model's config as its family's own, without widths of single layers."""
    if not config.model_type.startswith(PRUNED_PREFIX):
        return copy.deepcopy(config)
    fields = config.to_dict()
    for name in ("model_type", "pruned", "auto_map", "architectures"):
        fields.pop(name, None)
    return AutoConfig.for_model(config.model_type.removeprefix(PRUNED_PREFIX), **fields)


def _changed(config: Any, changes: dict[str, Any]) -> PretrainedConfig:
    fields = {**config.to_dict(), **changes}
    fields.pop("model_type")
    return type(config)(**fields)


def _pruned_config(model: Any) -> PretrainedConfig:
    """A config that lists, module by module, what differs from the plain model of the same config."""
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
    pruned_type = PRUNED_PREFIX + base.model_type
    fields = base.to_dict()
    for name in ("model_type", "architectures"):
        fields.pop(name, None)
    return AutoConfig.for_model(pruned_type, **fields, pruned=pruned)


def _attribute(module: Any, name: str) -> Any:
    for part in name.split("."):
        module = getattr(module, part, None)
    return module


def empty_model(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model of that config without memory for its weights."""
    with torch.device("meta"), quiet_libraries(bars=False):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)


def _fitted(model: Any, config: PretrainedConfig) -> tuple[PreTrainedModel | None, str]:
    """A model of that config that holds `model`'s weights, or None and why they do not fit.

    Biases that the config wants and the model lacks are zeros; nothing else may be missing or left over.
    """
    try:
        exported = empty_model(config, model.dtype)
    except ValueError as error:  # OPT wants heads that divide its hidden size
        return None, f"says: {str(error).strip().rstrip('.')}"
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
            return None, f"has no {name}"
        if name not in state:
            return None, f"wants {name}"
        if state[name].shape != wanted[name].shape:
            return None, f"wants {name} of shape {tuple(wanted[name].shape)}, not {tuple(state[name].shape)}"
    exported.load_state_dict(state, strict=True, assign=True)
    exported.tie_weights()
    for name, buffer in list(exported.named_buffers()):
        if buffer.is_meta:  # no part of the state: rotary frequencies, scales
            owner, _, part = name.rpartition(".")
            exported.get_submodule(owner)._buffers[part] = model.get_buffer(name)
    exported.generation_config = copy.deepcopy(model.generation_config)
    return exported.eval(), ""
