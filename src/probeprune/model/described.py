"""Configs that describe pruned models, and models of such a config that share the weights.

A config is plain, of the model's family or of one that computes the same function, where all layers have the
same width. Otherwise it lists the differences of every module (`modeling_pruned.py`).
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig, PreTrainedModel

from probeprune.errors import UsageError, unknown
from probeprune.foreign.quiet import quiet_libraries
from probeprune.model.blocks import Block, attribute, find_blocks
from probeprune.model.families import FAMILIES, PRUNED_PREFIX, Family, find_family
from probeprune.model.modeling_pruned import ConfigView, model_classes, pruned_config, pruned_model
from probeprune.model.wrappers import unwrapped

Layout = Literal["uniform", "per-layer"]
"""`uniform`: a plain config, one width for all layers; `per-layer`: each layer has its own widths."""


def register_checkpoints(family: Family) -> None:
    """Let transformers' auto classes open per-layer checkpoints of a family."""
    for model_type in family.model_types:
        pruned = pruned_config(CONFIG_MAPPING[model_type])
        AutoConfig.register(pruned.model_type, pruned, exist_ok=True)


for _family in FAMILIES:
    register_checkpoints(_family)


class _Unfit(Exception):
    """A config that cannot describe a model; the text begins with the config's class."""


def export(model: Any, layout: Layout | None = None) -> PreTrainedModel:
    """The same weights in the class that opens them from a checkpoint.

    Args:
        model: a model of a supported family, pruned or dense.
        layout: None for `uniform` if the model's widths allow it, otherwise `per-layer`.

    Raises:
        UsageError: the layout cannot hold the model.
    """
    model = unwrapped(model)
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
        return _fitted(model, _per_layer_config(model))
    except _Unfit as error:
        raise UsageError(
            f"no checkpoint can hold this model ({error}); save the model as `prune` left it, without adding "
            "or removing modules."
        ) from error


def check_described(model: Any) -> None:
    """Raise `UsageError` for a model that its config does not describe: no checkpoint could hold it."""
    try:
        _check_fits(model.state_dict(), empty_like(model))
    except _Unfit as error:
        raise UsageError(
            f"this {type(model).__name__} is not as its config describes it ({error}), so no checkpoint "
            "could hold it; correct the config, or take off what was added and put it back after pruning."
        ) from error


def describe(model: Any) -> None:
    """Give a model pruned in place the config that describes it: `save_pretrained` then writes a checkpoint
    that opens.

    Layers of one width get a plain config where one describes the model exactly, others the config and the
    class of a per-layer checkpoint. Other models that share the old config object keep it.

    A class of the user's own stays as it is; where no plain config fits, its `save_pretrained` is refused.
    """
    blocks = find_blocks(model)
    plain = _plain_class(model)
    own_class = type(model) is not plain and type(model) is not pruned_model(plain)
    model.__dict__.pop("save_pretrained", None)
    try:
        config = _make_config(*_plain_candidates(model, blocks)[0])
        _check_fits(model.state_dict(), _empty(plain, config, model))
        described = plain
    except _Unfit:
        config, described = _per_layer_config(model), pruned_model(plain)
    config._attn_implementation = model.config._attn_implementation
    config._name_or_path = model.config._name_or_path
    _put_config(model, config)
    if not own_class:
        model.__class__ = described
    elif described is not plain:
        model.__dict__["save_pretrained"] = _refuse_save


def _refuse_save(*args: Any, **kwargs: Any) -> None:
    raise UsageError(
        "transformers cannot save a pruned model of a class of your own, whose layers differ in width; use "
        "probeprune.save."
    )


def _put_config(model: Any, config: PretrainedConfig) -> None:
    """Put `config` in place of the model's config, wherever a module refers to that."""
    old = model.config
    for module in model.modules():
        held = module.__dict__.get("config")
        if held is old:
            module.config = config
        elif isinstance(held, ConfigView):
            module.config = held.on(config)


def _plain_class(model: Any) -> Any:
    """The class of transformers that a model is of: without widths of single layers, or a user's subclass."""
    for made in type(model).__mro__:
        if made.__module__.startswith("transformers.models."):
            return made
    raise UsageError(
        f"{type(model).__name__} is no model of transformers; give the model inside it, with its head."
    )


def _class_like(model: Any, config_class: Any) -> Any:
    """The model class of a config class that has the same head as `model`. Raises `_Unfit` for none."""
    plain = _plain_class(model)
    if config_class is pruned_config(plain.config_class):
        return pruned_model(plain)
    if config_class is plain.config_class:
        return plain
    auto = next((a for a, m in model_classes(plain.config_class).items() if m is plain), None)
    if auto not in (classes := model_classes(config_class)):
        raise _Unfit(f"{config_class.__name__} has no {plain.__name__}")
    return classes[auto]


# -- configs ---------------------------------------------------------------------------------------


def _uniform(model: Any) -> PreTrainedModel:
    """The model under the first plain config that describes it. Raises `_Unfit` with all reasons."""
    blocks = find_blocks(model)
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
    """Plain configs (class, fields) that may describe a model. Raises `_Unfit` for layers of several
    widths."""
    sizes = {(b.query_heads, b.kv_heads, b.head_dim) for b in blocks if b.kind == "attention"}
    if len(sizes) > 1 or len({b.units for b in blocks if b.kind == "mlp"}) > 1:
        raise _Unfit("its layers have different widths")
    family = find_family(model)
    attention = next(b for b in blocks if b.kind == "attention")
    mlp = next(b for b in blocks if b.kind == "mlp")
    base = _plain_config(model.config)
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


def _plain_config(config: Any) -> PretrainedConfig:
    """A copy of a model's config as a plain one of its family, without widths of single layers."""
    if not config.model_type.startswith(PRUNED_PREFIX):
        return copy.deepcopy(config)
    fields = config.to_dict()
    for name in ("model_type", "pruned", "auto_map", "architectures"):
        fields.pop(name, None)
    return AutoConfig.for_model(config.model_type.removeprefix(PRUNED_PREFIX), **fields)


def _per_layer_config(model: Any) -> PretrainedConfig:
    """A config that lists, for each module, the differences from the plain model."""
    base = _plain_config(model.config)
    plain = _empty(_plain_class(model), base, model)
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
                if name is not None and attribute(plain.get_submodule(block.name), name) not in (None, value)
            }
            if counts:
                pruned[block.name] = counts
    fields = base.to_dict()
    for name in ("model_type", "architectures"):
        fields.pop(name, None)
    plain_class: Any = type(base)
    config: PretrainedConfig = pruned_config(plain_class)(**fields, pruned=pruned)
    return config


# -- weights ---------------------------------------------------------------------------------------


def empty_like(model: Any) -> PreTrainedModel:
    """A model of the same config and dtype whose weights take no memory (device `meta`)."""
    return _empty(_class_like(model, type(model.config)), model.config, model)


def _empty(model_class: Any, config: PretrainedConfig, like: Any) -> PreTrainedModel:
    """A model of this class and config on `meta`, with the dtype of `like`. Raises `_Unfit` for a config that
    its class rejects: OPT requires heads that divide its hidden size, for example."""
    try:
        with torch.device("meta"), quiet_libraries(bars=False):
            made: PreTrainedModel = model_class._from_config(copy.deepcopy(config), dtype=like.dtype)
    except ValueError as error:
        raise _Unfit(
            f"{type(config).__name__} rejects its sizes: {str(error).strip().rstrip('.')}"
        ) from error
    return made


def _check_fits(state: Mapping[str, torch.Tensor], empty: PreTrainedModel) -> None:
    """Raise `_Unfit` where the tensors of a state dict are not those of an empty model, by name and shape."""
    config = type(empty.config).__name__
    wanted = empty.state_dict()
    for name in sorted(state.keys() | wanted.keys()):
        if name not in wanted:
            raise _Unfit(f"{config} has no {name}")
        if name not in state:
            raise _Unfit(f"{config} needs {name}")
        if state[name].shape != wanted[name].shape:
            shapes = f"{tuple(wanted[name].shape)}, not {tuple(state[name].shape)}"
            raise _Unfit(f"{config} needs {name} of shape {shapes}")


def _fitted(model: Any, config: PretrainedConfig) -> PreTrainedModel:
    """A model of this config that holds `model`'s weights. Raises `_Unfit` if they do not fit.

    Biases that the config has and the model lacks become zeros; no other tensor may be missing or left over.
    """
    exported = _empty(_class_like(model, type(config)), config, model)
    state = dict(model.state_dict())
    linears = {n for n, m in exported.named_modules() if isinstance(m, nn.Linear)}
    for name, tensor in exported.state_dict().items():
        owner, _, part = name.rpartition(".")
        if name not in state and part == "bias" and f"{owner}.weight" in state and owner in linears:
            weight = state[f"{owner}.weight"]
            state[name] = torch.zeros(tensor.shape, dtype=weight.dtype, device=weight.device)
    _check_fits(state, exported)
    exported.load_state_dict(state, strict=True, assign=True)
    exported.tie_weights()
    for name, buffer in list(exported.named_buffers()):
        if buffer.is_meta:  # not in the state dict: rotary frequencies, scales
            owner, _, part = name.rpartition(".")
            exported.get_submodule(owner)._buffers[part] = model.get_buffer(name)
    exported.generation_config = copy.deepcopy(getattr(model, "generation_config", None))
    return exported.eval()
