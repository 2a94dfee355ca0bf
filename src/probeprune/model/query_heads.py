"""Attention with an explicit key-value head for every query head.

When query heads are permuted or cut one by one, head `h` no longer reads key-value head `h // group_size`.
The functions here, registered in transformers' public attention registry, expand keys and values by the
module's `kv_index` and then call the implementation that the model already used. No modelling code changes.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from probeprune.errors import UsageError
from probeprune.model.modeling_pruned import ConfigView

_PREFIX = "probeprune_by_query_head_"
_SUPPORTED = ("sdpa", "eager")


def _attend_by_query_head(implementation: str) -> Callable[..., Any]:
    def attend(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> Any:
        # Eager attention lives in each model's own file, not in the registry.
        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        forward = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)
        index = module.kv_index
        assert isinstance(index, torch.Tensor)
        key, value = key.index_select(1, index), value.index_select(1, index)
        return forward(module, query, key, value, attention_mask, **kwargs)

    return attend


for _name in _SUPPORTED:
    AttentionInterface.register(_PREFIX + _name, _attend_by_query_head(_name))


def attention_overrides(module: nn.Module) -> dict[str, object]:
    """Attributes that make one attention module read key-value heads by its `kv_index`.

    The module gets its own view of the config, so masks and other layers keep the model's.
    Raises `UsageError` for an attention implementation other than sdpa and eager.
    """
    config: Any = module.config
    implementation = config._attn_implementation
    if implementation not in _SUPPORTED:
        raise UsageError(
            f"attention units 'query' and 'balanced' work with {' and '.join(_SUPPORTED)} attention, not "
            f"{implementation!r}; load the model with attn_implementation='sdpa' or use unit_kind='group'."
        )
    return {"config": ConfigView(config, attention_prefix=_PREFIX), "num_key_value_groups": 1}
