"""Models whose layers differ in width, as their checkpoints open them.

Self-contained: this file is copied next to the weights of such a checkpoint, so that transformers can open it
without probeprune (`trust_remote_code=True`). Every class of the family has a counterpart here with `Pruned`
in front of its name (`PrunedLlamaConfig`, `PrunedLlamaForCausalLM`), made when it is first asked for. It is
the family's own model, with linear maps as narrow as `config.pruned` says; the forward pass is unchanged.

`config.pruned` maps a module's path to what differs from the plain model: for a linear map `in_features`,
`out_features` or `bias`; for any other module the attributes that its forward reads (`config.x` for an
attribute of its config).
"""

from copy import copy
from functools import cache
from typing import Any

import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING


def narrow(model: nn.Module, pruned: dict[str, dict[str, Any]]) -> None:
    """Give the modules of a plain model the sizes and attributes listed in `pruned`, by path."""
    for path, changes in pruned.items():
        module = model.get_submodule(path)
        if isinstance(module, nn.Linear):
            sizes = {
                "in_features": module.in_features,
                "out_features": module.out_features,
                "bias": module.bias is not None,
                **changes,
            }
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, nn.Linear(**sizes))
            continue
        for name, value in changes.items():
            owner, _, attribute = name.rpartition(".")
            if owner == "config":
                if module.config is model.config:  # shared by all layers
                    module.config = copy(model.config)
                setattr(module.config, attribute, value)
            else:
                setattr(module, name, value)


class _Pruned(PreTrainedModel):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        narrow(self, config.pruned)


@cache
def pruned_config(family: Any) -> Any:
    """The counterpart of a family's config class: a class too."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        family.__init__(self, *args, **kwargs)
        # Only now: importing the modelling code of all families would slow down every start.
        AutoModelForCausalLM.register(type(self), pruned_model(family), exist_ok=True)

    members = {"__module__": __name__, "__init__": __init__, "model_type": f"pruned_{family.model_type}"}
    made: Any = type(f"Pruned{family.__name__}", (family,), members)
    made.register_for_auto_class()  # saving copies this file and puts the class into config.json
    return made


@cache
def pruned_model(family: Any) -> Any:
    """The counterpart of the causal LM that belongs to a family's config class: a class too."""
    plain = MODEL_FOR_CAUSAL_LM_MAPPING[family]
    members = {"__module__": __name__, "config_class": pruned_config(family)}
    made: Any = type(f"Pruned{plain.__name__}", (_Pruned, plain), members)
    made.register_for_auto_class("AutoModelForCausalLM")
    return made


def __getattr__(name: str) -> Any:
    """`PrunedXConfig` or `PrunedXForCausalLM`, for any family X of transformers."""
    if name.startswith("Pruned"):
        plain: Any = getattr(transformers, name.removeprefix("Pruned"), None)
        if name.endswith("Config") and hasattr(plain, "model_type"):
            return pruned_config(plain)
        if name.endswith("ForCausalLM") and hasattr(plain, "config_class"):
            return pruned_model(plain.config_class)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
