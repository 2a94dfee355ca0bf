"""Models under the config that describes them, sharing the weights of a pruned model."""

import copy
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from probeprune.errors import UsageError, unknown
from probeprune.model.blocks import find_blocks, find_layers
from probeprune.model.experts import find_stacks
from probeprune.model.families import find_family
from probeprune.model.modeling_pruned import (
    MODEL_TYPES,
    ConfigView,
    has_own_layers,
    pruned_model,
    view_layer,
    view_rest,
)
from probeprune.model.multimodal import nested_configs, with_text_config
from probeprune.model.nemotron_nas import llama_config
from probeprune.model.offloading import share_offloading
from probeprune.model.pruned_configs import (
    Unfit,
    class_like,
    empty_model,
    make_config,
    per_layer_config,
    plain_candidates,
    plain_class,
)
from probeprune.model.wrappers import unwrapped

Layout = Literal["uniform", "per-layer", "nemotron-nas"]
"""`uniform`: a plain config, one width for all layers. `per-layer`: each layer has its own widths.
`nemotron-nas`: the same heads in all layers, and a width for each MLP (`nemotron_nas.py`)."""


def export(model: Any, layout: Layout | None = None) -> PreTrainedModel:
    """The same weights in the class that opens them from a checkpoint.

    Args:
        model: a model of a supported family, pruned or dense.
        layout: None for `uniform` if the model's widths allow it, otherwise `per-layer`. Under `nemotron-nas`
            the model is a LLaMA with a `per_layer_config`; only its config.json is another.

    Raises:
        UsageError: the layout cannot hold the model.
    """
    model = unwrapped(model)
    if layout not in (None, *get_args(Layout)):
        raise UsageError(unknown("layout", str(layout), get_args(Layout)))
    if layout == "nemotron-nas":
        try:
            return _fitted(model, llama_config(model))
        except Unfit as error:
            raise UsageError(
                f"layout nemotron-nas cannot hold this model ({error}); use layout per-layer, which engines "
                "serve through transformers, or prune with the same heads in all layers (with_equal_heads)."
            ) from error
    if layout != "per-layer":
        try:
            return _uniform(model)
        except Unfit as error:
            if layout == "uniform":
                instead = (
                    ", or prune with one width for all layers, MLPs alone (blocks mlp), or without "
                    "compensation"
                )
                if find_family(model).mlp.width_field is None:
                    instead = ""
                raise UsageError(
                    f"no plain config describes this model ({error}); use layout per-layer{instead}."
                ) from error
    try:
        return _fitted(model, per_layer_config(model, in_place=False))
    except Unfit as error:
        raise UsageError(
            f"no checkpoint can hold this model ({error}); save the model as `prune` left it, without adding "
            "or removing modules."
        ) from error


def check_described(model: Any) -> None:
    """Raise `UsageError` for a model that its config does not describe: no checkpoint could hold it."""
    try:
        _check_fits(model.state_dict(), empty_like(model))
    except Unfit as error:
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
    plain = plain_class(model)
    own_class = type(model) not in (plain, *(pruned_model(plain, prefix) for prefix in MODEL_TYPES))
    model.__dict__.pop("save_pretrained", None)
    try:
        config = with_text_config(model.config, make_config(*plain_candidates(model, blocks)[0]))
        _check_fits(model.state_dict(), empty_model(plain, config, model))
        described = plain
    except Unfit:
        config = per_layer_config(model, in_place=True)
        described = class_like(model, type(config))
    config._attn_implementation = model.config._attn_implementation
    config._experts_implementation = model.config._experts_implementation
    config._name_or_path = model.config._name_or_path
    _put_config(model, config)
    counts = {stack.experts for stack in find_stacks(model)}
    if len(counts) == 1 and isinstance(getattr(model, "num_experts", None), int):
        model.num_experts = counts.pop()  # read by the loss that balances experts
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
    old, new = nested_configs(model.config), nested_configs(config)
    for name, own in old.items():  # the outer one first, which sets those inside
        new[name]._attn_implementation = own._attn_implementation
    replaced = {id(own): new[name] for name, own in old.items()}
    for module in model.modules():
        held = module.__dict__.get("config")
        if id(held) in replaced:
            module.config = replaced[id(held)]
        elif isinstance(held, ConfigView):
            module.config = held.on(config)
    if config.is_heterogeneous and not has_own_layers(type(config)):
        for layer, own in zip(find_layers(model), config.per_layer_config, strict=True):
            view_layer(layer, own, config)
        view_rest(model, config)


# -- weights ---------------------------------------------------------------------------------------


def _uniform(model: Any) -> PreTrainedModel:
    """The model under the first plain config that describes it. Raises `Unfit` with all reasons."""
    blocks = find_blocks(model)
    reasons = []
    for config_class, fields in plain_candidates(model, blocks):
        try:
            return _fitted(model, with_text_config(model.config, make_config(config_class, fields)))
        except Unfit as error:
            reasons.append(str(error))
    raise Unfit("; ".join(reasons))


def empty_like(model: Any) -> PreTrainedModel:
    """A model of the same config and dtype whose weights take no memory (device `meta`)."""
    return empty_model(class_like(model, type(model.config)), model.config, model)


def without_views(model: Any) -> PreTrainedModel:
    """The dense model of one that has a method attached: weights in their own order, in memory of their own
    as far as they are permuted."""
    return _fitted(unwrapped(model), unwrapped(model).config)


def _check_fits(state: Mapping[str, torch.Tensor], empty: PreTrainedModel) -> None:
    """Raise `Unfit` where the tensors of a state dict are not those of an empty model, by name and shape."""
    config = type(empty.config).__name__
    wanted = empty.state_dict()
    for name in sorted(state.keys() | wanted.keys()):
        if name not in wanted:
            raise Unfit(f"{config} has no {name}")
        if name not in state:
            raise Unfit(f"{config} needs {name}")
        if state[name].shape != wanted[name].shape:
            shapes = f"{tuple(wanted[name].shape)}, not {tuple(state[name].shape)}"
            raise Unfit(f"{config} needs {name} of shape {shapes}")


def _fitted(model: Any, config: PretrainedConfig) -> PreTrainedModel:
    """A model of this config that holds `model`'s weights. Raises `Unfit` if they do not fit.

    Biases that the config has and the model lacks become zeros; no other tensor may be missing or left over.
    """
    exported = empty_model(class_like(model, type(config)), config, model)
    state = dict(model.state_dict())
    added: dict[str, torch.Tensor] = {}
    linears = {n for n, m in exported.named_modules() if isinstance(m, nn.Linear)}
    for name, tensor in exported.state_dict().items():
        owner, _, part = name.rpartition(".")
        if name not in state and part == "bias" and f"{owner}.weight" in state and owner in linears:
            weight = state[f"{owner}.weight"]
            added[name] = torch.zeros(tensor.shape, dtype=weight.dtype, device=weight.device)
    state |= added
    _check_fits(state, exported)
    exported.load_state_dict(state, strict=True, assign=True)
    exported.tie_weights()
    for name, buffer in list(exported.named_buffers()):
        if buffer.is_meta:  # not in the state dict: rotary frequencies, scales
            owner, _, part = name.rpartition(".")
            exported.get_submodule(owner)._buffers[part] = model.get_buffer(name)
    share_offloading(model, exported, added)
    exported.generation_config = copy.deepcopy(getattr(model, "generation_config", None))
    return exported.eval()
