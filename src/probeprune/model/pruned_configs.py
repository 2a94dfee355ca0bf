"""Configs that describe pruned models.

A config is plain, of the model's family or of one that computes the same function, where all layers have the
same width. Otherwise it has a `per_layer_config`, as transformers defines it, and beside it a list of what no
field of the family says (`modeling_pruned.py`). Knows nothing of weights but their shapes.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig, PreTrainedModel

from probeprune.errors import UsageError
from probeprune.foreign.quiet import quiet_libraries
from probeprune.model.blocks import Block, find_blocks
from probeprune.model.experts import Stack, entry_of, find_stacks
from probeprune.model.families import FAMILIES, INSIDE, find_family, is_supported
from probeprune.model.family_records import PRUNED_PREFIX, Family, Twin
from probeprune.model.layer_records import attribute
from probeprune.model.linear_maps import sizes
from probeprune.model.modeling_pruned import (
    MODEL_TYPES,
    has_own_layers,
    model_classes,
    pruned_config,
    pruned_model,
)
from probeprune.model.multimodal import (
    MULTIMODAL,
    Multimodal,
    multimodal_of,
    plain_fields,
    text_config,
)


def register_checkpoints(family: Family | Multimodal) -> None:
    """Let transformers' auto classes open those checkpoints of a family that no other code can open."""
    for model_type in family.model_types:
        pruned = pruned_config(CONFIG_MAPPING[model_type], "Pruned")
        AutoConfig.register(pruned.model_type, pruned, exist_ok=True)


for _family in (*FAMILIES, *INSIDE):
    register_checkpoints(_family)
for _multimodal in MULTIMODAL:
    register_checkpoints(_multimodal)


def read_config(folder: Path, fields: Mapping[str, Any], *, trust_remote_code: bool = False) -> Any:
    """The config of a checkpoint, per-layer ones included.

    Transformers knows `per_layer_config` and builds no models of it yet for most families; our counterpart of
    the family's config class does.

    Args:
        folder: where the checkpoint lies.
        fields: the content of its config.json.
        trust_remote_code: run code that comes with a checkpoint of an unknown family.
    """
    model_type = fields.get("model_type")
    own = str(model_type).removeprefix(PRUNED_PREFIX) == model_type
    ours = own and is_supported(model_type) and not has_own_layers(CONFIG_MAPPING[model_type])
    if "per_layer_config" in fields and ours:
        return pruned_config(CONFIG_MAPPING[model_type], "PerLayer").from_pretrained(folder)
    return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)


class Unfit(Exception):
    """A config that cannot describe a model; the text begins with the config's class."""


def plain_candidates(
    model: Any, blocks: Sequence[Block]
) -> list[tuple[type[PretrainedConfig], dict[str, Any]]]:
    """Plain configs (class, fields) that may describe a model's language model. Raises `Unfit` for layers of
    several widths."""
    sizes = {(b.query_heads, b.kv_heads, b.head_dim) for b in blocks if b.kind == "attention"}
    family = find_family(model)
    attention = next(b for b in blocks if b.kind == "attention")
    base = plain_config(text_config(model.config))
    own = has_own_layers(type(base))  # its heads are as the config has them, or do not fit
    if len(sizes) > 1 and not own:
        raise Unfit("its layers have different widths")
    widths = {} if own else _head_fields(attention)
    for layer in _width_fields(model, blocks).values():
        if any(widths.setdefault(name, value) != value for name, value in layer.items()):
            raise Unfit("its layers have different widths")
    if family.mlp.width_field is None and any(
        b.units != 4 * base.hidden_size for b in blocks if b.kind == "mlp"
    ):
        raise Unfit(f"{type(base).__name__} has no field for the width of its MLPs")
    changes = {k: v for k, v in widths.items() if _said(base, k, v) != v}
    head_dim = attention.head_dim
    if _says_head_dim(type(base), family):
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
        twin, shared = _twin_fields(family.twin, fields)
        candidates.append((twin, {**shared, **changes, "head_dim": head_dim}))
    return candidates


def make_config(config_class: type[PretrainedConfig], fields: dict[str, Any]) -> PretrainedConfig:
    """A config with these fields. Raises `Unfit` if its class rejects them."""
    try:
        return config_class(**fields)
    except Exception as error:  # configs validate themselves and may raise anything
        lines = str(error).strip().splitlines()
        reason = lines[-1].strip().rstrip(".") if lines else type(error).__name__
        raise Unfit(f"{config_class.__name__} rejects its sizes: {reason}") from error


def plain_config(config: Any) -> PretrainedConfig:
    """A copy of a model's config as a plain one of its family, without widths of single layers."""
    model_type = config.model_type.removeprefix(PRUNED_PREFIX)
    plain = not config.is_heterogeneous or has_own_layers(type(config))
    if plain and model_type == config.model_type:
        return copy.deepcopy(config)
    return AutoConfig.for_model(model_type, **plain_fields(config))


def per_layer_config(model: Any, *, in_place: bool) -> PretrainedConfig:
    """A config with the fields of each layer, and what no field of the family says beside them.

    Args:
        model: a pruned or dense model.
        in_place: whether the model itself gets the config. Otherwise it may be of another family that
            computes the same function, and have biases that the model lacks: the weights get zeros for them.
    """
    blocks = find_blocks(model)
    own = has_own_layers(type(model.config)) or find_family(model).mixers
    if multimodal_of(model.config.model_type) is not None or own:
        return _listed_config(model, blocks)
    best: tuple[Any, dict[str, Any], dict[str, Any]] | None = None
    for config_class, fields in _per_layer_candidates(model, blocks, in_place):
        try:
            config = make_config(pruned_config(config_class, "PerLayer"), fields)
            found = _differences(model, blocks, empty_model(class_like(model, type(config)), config, model))
        except Unfit:
            continue
        if not found:
            return config
        # A twin is worth the other name only if it needs no code of ours.
        own_family = config_class is plain_class(model).config_class
        if own_family and (best is None or len(found) < len(best[2])):
            best = config_class, fields, found
    assert best is not None  # a config without fields of its own for attention is as good as the dense one
    config_class, fields, found = best
    return make_config(pruned_config(config_class, "Pruned"), {**fields, "pruned": found})


def _listed_config(model: Any, blocks: Sequence[Block]) -> PretrainedConfig:
    """The config of a multimodal model or a hybrid, with all that differs listed beside it.

    Inside a config, transformers knows no fields of single layers; of hybrids, layers are made of more.
    """
    base: Any = plain_config(model.config)
    plain = empty_model(plain_class(model), base, model)
    found = _differences(model, blocks, plain)
    for stack in find_stacks(model):
        for path, differs in _stack_differences(stack, plain).items():
            found[path] = {**found.get(path, {}), **differs}
    fields = {k: v for k, v in base.to_dict().items() if k not in ("model_type", "architectures")}
    kind: Any = type(base)
    return make_config(pruned_config(kind, "Pruned"), {**fields, "pruned": found} if found else fields)


def _per_layer_candidates(
    model: Any, blocks: Sequence[Block], in_place: bool
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Plain configs (class, fields with `per_layer_config`) that may describe a model."""
    base = plain_config(model.config)
    fields = {k: v for k, v in base.to_dict().items() if k not in ("model_type", "architectures")}
    layers = _layer_fields(model, base, blocks, all if in_place else any)
    head_dim = next(b.head_dim for b in blocks if b.kind == "attention")
    yield type(base), _with_layers(fields, layers)
    if fields.get("head_dim") != head_dim and _says_head_dim(type(base), find_family(model)):
        yield type(base), _with_layers({**fields, "head_dim": head_dim}, layers)
    twin = find_family(model).twin
    if not in_place and twin is not None:
        config_class, shared = _twin_fields(twin, fields)
        yield config_class, _with_layers({**shared, "head_dim": head_dim}, layers)
    # Where the number of heads sets their size, as in OPT, no layer of the family has fewer heads.
    mlps = {i: {k: v for k, v in own.items() if k not in _HEAD_FIELDS} for i, own in layers.items()}
    yield type(base), _with_layers(fields, mlps)


def _with_layers(fields: dict[str, Any], layers: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    different = {index: own for index, own in layers.items() if own}
    return {**fields, "per_layer_config": different} if different else fields


def _twin_fields(twin: Twin, fields: Mapping[str, Any]) -> tuple[type[PretrainedConfig], dict[str, Any]]:
    """The config class of a family's twin, and those of the family's fields that it has."""
    config_class = CONFIG_MAPPING[twin.model_type]
    return config_class, {**own_fields(config_class, fields), **twin.fields}


def own_fields(config_class: Any, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Those fields of another family's config that a config class has too."""
    names = set(config_class().to_dict()) - {"model_type", "architectures", "transformers_version"}
    return {k: v for k, v in fields.items() if k in names}


_HEAD_FIELDS = frozenset({"num_attention_heads", "num_key_value_heads"})


def _layer_fields(
    model: Any, base: Any, blocks: Sequence[Block], count: Callable[[Iterable[bool]], bool]
) -> dict[int, dict[str, Any]]:
    """By layer, the fields of the family's config in which it differs from the dense model.

    A block has biases by its config if `any` or `all` of its linear maps have one.
    """
    family = find_family(model)
    layers: dict[int, dict[str, Any]] = {}
    for index, widths in _width_fields(model, blocks).items():
        layers[index] = {k: v for k, v in widths.items() if _said(base, k, v) != v}
    for block in blocks:
        if block.kind == "attention":
            record: Any = family.attention
            fields: dict[str, Any] = _head_fields(block)
        else:
            record, fields = family.mlp, {}
        if count(linear.bias is not None for linear in (*block.producers, block.consumer)):
            fields[record.bias_field] = True
        layer = layers.setdefault(block.layer, {})
        layer.update({k: v for k, v in fields.items() if _said(base, k, v) != v})
    return layers


def _width_fields(model: Any, blocks: Sequence[Block]) -> dict[int, dict[str, int]]:
    """By layer, the fields of the family's config that hold the widths of its MLP and its experts."""
    family = find_family(model)
    stacks = {s.layer: s for s in find_stacks(model)}
    fields: dict[int, dict[str, int]] = {layer: {} for layer in (*(b.layer for b in blocks), *stacks)}
    other_names: Mapping[str, str] = text_config(model.config).attribute_map
    for layer, stack in stacks.items():
        count, width = stack.record.count_field, stack.record.width_field
        fields[layer] |= {other_names.get(count, count): stack.experts, width: stack.width}
    for block in blocks:
        if block.kind != "mlp":
            continue
        own = stacks[block.layer].record.shared if block.layer in stacks else family.mlp
        if own is not None and own.width_field is not None:
            if block.units % block.times:
                raise Unfit("its layers have different widths")
            fields[block.layer] |= {own.width_field: block.units // block.times, **own.said_with}
    return fields


def _head_fields(block: Block) -> dict[str, Any]:
    """Fields of a config that hold the numbers of heads."""
    return {"num_attention_heads": block.query_heads, "num_key_value_heads": block.kv_heads}


def _says_head_dim(config_class: type, family: Family) -> bool:
    """Whether `head_dim` of configs of a class is the size of heads: Falcon's work it out, and where keys are
    made from latents it is that of the part with positions."""
    worked_out = isinstance(getattr(config_class, "head_dim", None), property)
    return not (family.attention.latents or worked_out or has_own_layers(config_class))


def _said(config: Any, name: str, default: Any) -> Any:
    """The value of a field of a config.

    Families that allow null for the width of their MLPs make them four times as wide as the hidden size then.
    """
    value = getattr(config, name, default)
    return 4 * config.hidden_size if value is None else value


def _differences(model: Any, blocks: Sequence[Block], plain: Any) -> dict[str, dict[str, Any]]:
    """What a described model of the same layers lacks, by module. It may have more biases: those are zero.

    Raises `Unfit` where it has heads or norms of another size.
    """
    head_dim = find_family(model).attention.head_dim
    found: dict[str, dict[str, Any]] = {}
    for block in blocks:
        for name in dict.fromkeys(m.name for m in block.members):
            ours, theirs = model.get_submodule(name), plain.get_submodule(name)
            differs: dict[str, Any] = {
                size: own
                for size, own, other in zip(
                    ("out_features", "in_features"), sizes(ours), sizes(theirs), strict=True
                )
                if own != other
            }
            if ours.bias is not None and theirs.bias is None:
                differs["bias"] = True
            if differs:
                found[name] = differs
        if block.kind == "attention":
            _check_norms(block, plain.get_submodule(block.name))
            if getattr(plain.get_submodule(block.name), head_dim) != block.head_dim:
                raise Unfit(f"{type(plain.config).__name__} gives {block.name} heads of another size")
            said = {
                **block.counts(block.query_heads, block.kv_heads),
                "num_key_value_groups": block.group_size,
            }
            counts = {
                name: value
                for name, value in said.items()
                if attribute(plain.get_submodule(block.name), name) not in (None, value)
            }
            if counts:
                found[block.name] = counts
    return found


def _stack_differences(stack: Stack, plain: nn.Module) -> dict[str, dict[str, Any]]:
    """What a described model of the same layers lacks of a stack of experts and its router, by module: shapes
    of tensors, and attributes that say them."""
    record, name = stack.record, stack.name.removesuffix(f".{stack.record.module}")
    found: dict[str, dict[str, Any]] = {}
    own = [(f"{record.module}.{key}", stack.module, key) for key in stack.module._parameters]
    for path, owner, key in (*own, *stack.router):
        where = f"{name}.{path.rpartition('.')[0]}"
        ours, theirs = getattr(owner, key), getattr(plain.get_submodule(where), key)
        if ours.shape != theirs.shape:
            found.setdefault(where, {}).setdefault("tensors", {})[key] = list(ours.shape)
    for path in (*record.counts, *record.widths):
        owner, key = entry_of(stack.root, path)
        where = f"{name}.{path.rpartition('.')[0]}"
        if getattr(owner, key) != getattr(plain.get_submodule(where), key):
            found.setdefault(where, {})[key] = getattr(owner, key)
    return found


def _check_norms(block: Block, plain: nn.Module) -> None:
    """Raise `Unfit` where norms inside an attention block have another size under a config."""
    linears = {m.linear for m in block.members}
    for name, module in block.entry.named_modules():
        if module in linears:
            continue
        for own, parameter in module.named_parameters(name, recurse=False):
            if parameter.shape != plain.get_parameter(own).shape:
                raise Unfit(f"{type(plain).__name__} has {own} of another shape")


def plain_class(model: Any) -> Any:
    """The class of transformers that a model is of: without widths of single layers, or a user's subclass."""
    for made in type(model).__mro__:
        if made.__module__.startswith("transformers.models."):
            return made
    raise UsageError(
        f"{type(model).__name__} is no model of transformers; give the model inside it, with its head."
    )


def class_like(model: Any, config_class: Any) -> Any:
    """The model class of a config class that has the same head as `model`. Raises `Unfit` for none."""
    plain = plain_class(model)
    for prefix in MODEL_TYPES:
        if config_class is pruned_config(plain.config_class, prefix):
            return pruned_model(plain, prefix)
    if config_class is plain.config_class:
        return plain
    auto = next((a for a, m in model_classes(plain.config_class).items() if m is plain), None)
    if auto not in (classes := model_classes(config_class)):
        raise Unfit(f"{config_class.__name__} has no {plain.__name__}")
    return classes[auto]


def empty_model(model_class: Any, config: PretrainedConfig, like: Any) -> PreTrainedModel:
    """A model of this class and config on `meta`, with the dtype of `like`. Raises `Unfit` for a config that
    its class rejects: OPT requires heads that divide its hidden size, for example."""
    try:
        with torch.device("meta"), quiet_libraries(bars=False):
            made: PreTrainedModel = model_class._from_config(copy.deepcopy(config), dtype=like.dtype)
    except ValueError as error:
        raise Unfit(f"{type(config).__name__} rejects its sizes: {str(error).strip().rstrip('.')}") from error
    return made
