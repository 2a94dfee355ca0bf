"""A block's shadow: the same computation on the same weights, run without anybody noticing.

Shadow modules share parameters and buffers with the model's own, and nothing else: hooks, recorders and
replaced forwards that others have hung on the model stay out of a run ahead. Weights are always whole,
whatever the block itself shows.
"""

from collections import OrderedDict
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from probeprune.model.blocks import Block, uncalled_consumer
from probeprune.model.modeling_pruned import ConfigView
from probeprune.model.narrow_linear import plain_kind
from probeprune.model.partition import Partition

_HOOKS = (
    "_backward_pre_hooks",
    "_backward_hooks",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


class _Tap(nn.Module):
    """Stands in for the consumer: hands back its input instead of multiplying."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: torch.Tensor | None = None

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        self.seen = z
        return z


class Shadow:
    """The part of a block in front of its consumer, on whole weights.

    Args:
        block: the block.
        partition: of the block, if it has one.
    """

    def __init__(self, block: Block, partition: Partition | None = None) -> None:
        self._block, self._partition = block, partition
        self._tap = _Tap()
        if partition is not None:
            partition.widen()  # attributes that say how many heads there are
        if block.activation is None:
            self._entry = twin(block.entry, {block.consumer: self._tap})
        else:
            self._entry = nn.Sequential(*(twin(m) for m in (*block.producers, block.activation)), self._tap)

    def run(self, x: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
        """The coupled activation `z` for the normalised input `x`, units in the partition's present order.

        Raises `UsageError` for a block whose forward does not call its consumer.
        """
        self._tap.seen = None
        if self._partition is not None:
            for name, value in self._partition.wide_attributes().items():
                setattr(self._entry, name, value)
        self._entry(x, **arguments)
        z, self._tap.seen = self._tap.seen, None
        if z is None:
            raise uncalled_consumer(self._block)
        return z


def twin(module: nn.Module, replaced: Mapping[nn.Module, nn.Module] = MappingProxyType({})) -> nn.Module:
    """A module that shares parameters, buffers and plain attributes with `module`, some children replaced.

    Nothing that others have hung on `module` is on it, and its linear maps show all of their weights.
    """
    if module in replaced:
        return replaced[module]
    made: nn.Module = object.__new__(plain_kind(module))
    made.__dict__.update(module.__dict__)
    made.__dict__.pop("forward", None)
    if isinstance(config := module.__dict__.get("config"), ConfigView):
        made.__dict__["config"] = config.copy()  # with all heads, whatever the block shows later
    for name in _HOOKS:
        made.__dict__[name] = OrderedDict()
    made.__dict__["_modules"] = {
        n: None if m is None else twin(m, replaced) for n, m in module._modules.items()
    }
    return made
