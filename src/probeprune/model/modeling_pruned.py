"""Models whose layers differ in width, as their checkpoints open them.

Self-contained: this file is copied next to the weights of such a checkpoint, so that transformers can open it
without probeprune (`trust_remote_code=True`). Every class of a family has two counterparts here, made when
they are first asked for. Both are the family's own model, and their forward pass is unchanged.

- `PerLayer...` (`PerLayerLlamaConfig`, `PerLayerLlamaForCausalLM`): each layer is built from the family's own
  code with the fields of `config.per_layer_config`, as transformers defines them (`intermediate_size`,
  `num_attention_heads`, ...). The `model_type` is the family's.
- `Pruned...`: for what no field of the family says, such as a bias on one linear map alone. Beside the
  former, `config.pruned` maps a module's path in the causal LM to what differs: for a linear map
  `in_features`, `out_features` or `bias`; for any other module the attributes that its forward reads
  (`config.x` for an attribute of its config), and under `tensors` the shapes of tensors of its own. The
  `model_type` begins with `pruned_`, so that nobody opens it
  without this file.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

if not hasattr(transformers.PretrainedConfig, "is_heterogeneous"):
    raise ImportError(
        "a checkpoint whose layers differ in width needs transformers 5.14 or newer, and this is "
        f"{transformers.__version__}."
    )

MODEL_TYPES = {"PerLayer": "", "Pruned": "pruned_"}
"""By prefix of a class's name, the prefix of its `model_type`."""

_HEADS = {
    "AutoModel": "MODEL_MAPPING",
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    "AutoModelForQuestionAnswering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING",
}
"""For each auto class, the name of its table of model classes in `modeling_auto`."""


class ConfigView:
    """Reads like `config`, with some fields replaced; whatever changes in `config` shows here too.

    Args:
        config: the original, or a view of it whose replaced fields are taken over.
        fields: values of fields that differ.
        attention_prefix: put in front of the attention implementation's name.
    """

    def __init__(self, config: Any, fields: dict[str, Any] | None = None, attention_prefix: str = "") -> None:
        if isinstance(config, ConfigView):
            attention_prefix = attention_prefix or config._prefix
            config, fields = config._config, {**config._fields, **(fields or {})}
        self.__dict__.update(_config=config, _fields=dict(fields or {}), _prefix=attention_prefix)

    def on(self, config: Any) -> "ConfigView":
        """A view of another config, with the same fields replaced."""
        return ConfigView(config, self._fields, self._prefix)

    def copy(self) -> "ConfigView":
        """Another view of the same config, with fields of its own."""
        return self.on(self._config)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_config" not in self.__dict__:  # while being copied
            raise AttributeError(name)
        if name in self._fields:
            return self._fields[name]
        value = getattr(self._config, name)
        return f"{self._prefix}{value}" if self._prefix and name == "_attn_implementation" else value

    def __setattr__(self, name: str, value: Any) -> None:
        self._fields[name] = value


def narrow(model: nn.Module, pruned: dict[str, dict[str, Any]]) -> None:
    """Give the modules of a plain model the sizes and attributes listed in `pruned`, by path.

    A model without a head has no prefix (`layers.0`, where the causal LM has `model.layers.0`).
    """
    body = str(model.base_model_prefix)
    absent = "" if hasattr(model, body) else f"{body}."
    for path, changes in pruned.items():
        path = path.removeprefix(absent)
        module = model.get_submodule(path)
        parent, _, name = path.rpartition(".")
        if isinstance(module, Conv1D):  # it stores its weight as (in, out)
            columns = changes.get("in_features", module.nx)
            made = Conv1D(changes.get("out_features", module.nf), columns)
            setattr(model.get_submodule(parent), name, made)
            continue
        if isinstance(module, nn.Linear) and "tensors" not in changes:
            sizes = {
                "in_features": module.in_features,
                "out_features": module.out_features,
                "bias": module.bias is not None,
                **changes,
            }
            setattr(model.get_submodule(parent), name, type(module)(**sizes))
            continue
        for name, value in changes.items():
            if name == "tensors":
                _resize(module, value)
                continue
            owner, _, attribute = name.rpartition(".")
            if owner == "config":
                module.config = ConfigView(module.config, {attribute: value})  # type: ignore[assignment]
            else:
                setattr(module, name, value)


def _resize(module: nn.Module, shapes: dict[str, list[int]]) -> None:
    """Give parameters and buffers of a module, by name, other shapes; their numbers come from a file."""
    for name, shape in shapes.items():
        old: Any = getattr(module, name)
        made = torch.empty(shape, dtype=old.dtype, device=old.device)
        parameter = isinstance(old, nn.Parameter)
        setattr(module, name, nn.Parameter(made, requires_grad=old.requires_grad) if parameter else made)


class _Narrow(PreTrainedModel):
    """What the counterparts of all model classes have in common."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        if has_own_layers(type(config)):
            super().__init__(config, *args, **kwargs)
        else:
            with _without_overrides(config):
                super().__init__(config, *args, **kwargs)
            if config.is_heterogeneous:
                _rebuild_layers(self, config)
                view_rest(self, config)
        narrow(self, getattr(config, "pruned", {}))

    def initialize_weights(self) -> None:
        """As for the family's own classes: buffers that no checkpoint holds get their values too, which
        transformers leaves out for code that comes with a checkpoint."""
        own = ("is_custom_code", "is_remote_code")
        self.__dict__.update(dict.fromkeys(own, lambda: False))
        try:
            super().initialize_weights()
        finally:
            for name in own:
                del self.__dict__[name]

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, for models whose layers have the same key-value heads.

        Raises `ValueError` for others: the paged cache has one size for all layers.
        """
        makes_keys = ("k_proj", "kv_b_proj", "qkv_proj", "query_key_value", "c_attn")
        heads = {getattr(layer, "num_key_value_heads", None) for layer in self.config.per_layer_config}
        if len(heads) > 1 or any(path.endswith(makes_keys) for path in getattr(self.config, "pruned", {})):
            raise ValueError(
                "continuous batching needs the same number of key-value heads in every layer, and this "
                "pruned model has different ones; use generate, or prune with one width for all layers."
            )
        return super().init_continuous_batching(*args, **kwargs)


@contextmanager
def _without_overrides(config: Any) -> Iterator[None]:
    """Show the fields of the dense model: the family's code reads them from the config of all layers, which
    transformers forbids for fields that differ between layers."""
    overrides = config.__dict__.pop("_heterogeneity_spec", None)
    try:
        yield
    finally:
        if overrides is not None:
            config.__dict__["_heterogeneity_spec"] = overrides


def has_own_layers(config_class: Any) -> bool:
    """Whether every config of a class has fields of single layers, which the family's own code reads (Gemma
    4, whose layers have two sizes of heads)."""
    return bool(_default_config(config_class).is_heterogeneous)


@cache
def _default_config(config_class: Any) -> Any:
    return config_class()


def distinct_layers(config: Any) -> list[Any]:
    """The config of each layer that has fields of its own, and one for all the others.

    No longer than what the config lists, whatever it says of the number of layers.
    """
    if not config.is_heterogeneous:
        return [config]
    own = sorted(int(index) for index in config.to_dict().get("per_layer_config", {}))
    others = [i for i in range(min(config.num_hidden_layers, len(own) + 1)) if i not in own]
    return [config.per_layer_config[index] for index in (*own, *others[:1])]


def _layers(model: nn.Module, count: int) -> nn.ModuleList:
    """The list of decoder layers."""
    for module in model.modules():
        if not isinstance(module, nn.ModuleList) or len(module) != count:
            continue
        if all(isinstance(layer, GradientCheckpointingLayer) for layer in module):
            return module
    raise ValueError(f"{type(model).__name__} has no list of {count} decoder layers")


def _rebuild_layers(model: nn.Module, config: Any) -> None:
    """Build every layer anew, from its own config."""
    layers = _layers(model, config.num_hidden_layers)
    for index, own in enumerate(config.per_layer_config):
        layers[index] = type(layers[index])(own, index)
        view_layer(layers[index], own, config)


def view_layer(layer: nn.Module, own: Any, config: Any) -> None:
    """Let the modules of one layer read its own fields, and everything else from the model's config.

    A copy would keep the attention implementation, say, that the model had when it was made.

    Args:
        layer: a decoder layer.
        own: the layer's config, of `config.per_layer_config`.
        config: the model's config.
    """
    fields = {name: getattr(own, name) for name in config.per_layer_attributes}
    for module in layer.modules():
        held = module.__dict__.get("config")
        if held is not None:
            base = held if isinstance(held, ConfigView) else config
            module.config = ConfigView(base, fields)  # type: ignore[assignment]


def view_rest(model: nn.Module, config: Any) -> None:
    """Let the modules outside of layers read the dense model's fields where those of layers differ.

    Some kinds of RoPE read the number of heads, only to divide by it where the config has no head size.

    Args:
        model: whose layers read fields of their own (`view_layer`).
        config: the model's config.
    """
    names = config.per_layer_attributes
    with _without_overrides(config):  # layers may have fields that the family's config lacks
        fields = {name: getattr(config, name) for name in names if hasattr(config, name)}
    for module in model.modules():
        if module.__dict__.get("config") is config and not isinstance(module, PreTrainedModel):
            module.config = ConfigView(config, fields)  # type: ignore[assignment]


@cache
def pruned_config(family: Any, prefix: str) -> Any:
    """The counterpart of a family's config class, `PerLayer...` or `Pruned...`: a class too."""

    def __init__(self: Any, *args: Any, per_layer_config: Any = None, **kwargs: Any) -> None:
        family.__init__(self, *args, **kwargs)
        if per_layer_config is not None:
            self.per_layer_config = per_layer_config
            validate(self)
        # Only now: importing the modelling code of all families would slow down every start.
        for auto, plain in model_classes(family).items():
            getattr(transformers, auto).register(type(self), pruned_model(plain, prefix), exist_ok=True)
        self.auto_map = _auto_map(family, prefix)

    def validate(self: Any) -> None:
        # Layer by layer: the family's checks read fields that the config of all layers may not have.
        for layer in distinct_layers(self):
            family.validate(layer)

    members = {
        "__module__": __name__,
        "__init__": __init__,
        "validate": validate,
        "model_type": f"{MODEL_TYPES[prefix]}{family.model_type}",
        "prefix": prefix,
    }
    made: Any = type(f"{prefix}{family.__name__}", (family,), members)
    made.register_for_auto_class()  # saving copies this file and puts the class into config.json
    return made


def model_classes(family: Any) -> dict[str, Any]:
    """The family's own model classes, by auto class."""
    plain = {auto: getattr(modeling_auto, table).get(family, None) for auto, table in _HEADS.items()}
    # An auto class may open only a part of a model, whose config is another.
    return {
        auto: model
        for auto, model in plain.items()
        if isinstance(model, type) and getattr(model, "config_class", None) is family
    }


def _auto_map(family: Any, prefix: str) -> dict[str, str]:
    """For config.json: the class in this file that each auto class opens."""
    file = __name__.rpartition(".")[2]
    return {auto: f"{file}.{prefix}{plain.__name__}" for auto, plain in model_classes(family).items()}


@cache
def pruned_model(plain: Any, prefix: str) -> Any:
    """The counterpart of a family's model class, with any head: a class too."""
    config_class = pruned_config(plain.config_class, prefix)
    members = {"__module__": __name__, "config_class": config_class}
    made: Any = type(f"{prefix}{plain.__name__}", (_Narrow, plain), members)
    auto = next((a for a, model in model_classes(plain.config_class).items() if model is plain), None)
    if auto is not None:
        made.register_for_auto_class(auto)
    return made


def __getattr__(name: str) -> Any:
    """`PerLayerX` and `PrunedX` for any config or model class X of transformers."""
    for prefix in MODEL_TYPES:
        plain: Any = (
            getattr(transformers, name.removeprefix(prefix), None) if name.startswith(prefix) else None
        )
        if name.endswith("Config") and hasattr(plain, "model_type"):
            return pruned_config(plain, prefix)
        if hasattr(plain, "config_class") and issubclass(plain, PreTrainedModel):
            return pruned_model(plain, prefix)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
