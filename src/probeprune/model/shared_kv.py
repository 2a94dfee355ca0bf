"""Keys and values that later layers read, beside the hidden states of a model that runs layer by layer.

The states between two layers are then hidden states, and behind them, along the last axis, the keys and
values of every earlier layer that shares its own. So they go wherever hidden states go: into files, into a
second stream, through a backward pass. Knows nothing of batches.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from probeprune.model.blocks import find_layers
from probeprune.model.families import find_family
from probeprune.model.layer_records import attribute
from probeprune.model.linear_maps import sizes
from probeprune.model.multimodal import text_config


@dataclass(frozen=True)
class Shared:
    """The keys and values that one layer leaves for later ones."""

    layer: int
    key: str
    """Where later layers look for them."""
    heads: int
    head_dim: int

    @property
    def width(self) -> int:
        """Numbers for one token."""
        return 2 * self.heads * self.head_dim


class Carried:
    """What passes from layer to layer: hidden states (batch, length, hidden), then keys and values.

    Attributes:
        argument: the name of the layers' argument for shared keys and values; None in a model without any.
        hidden_size: numbers of the hidden states.
        by_token: numbers that all layers together are given beside that, for one token.
    """

    def __init__(self, model: nn.Module) -> None:
        """Raises `UsageError` for an unsupported model."""
        family = find_family(model)
        record, config = family.attention, text_config(model.config)
        self.hidden_size = int(config.hidden_size)
        self._shared: list[Shared] = []
        self.argument: str | None = None
        beside = [m.output for m in family.mixers if m.module is None] if family.by_token else []
        maps = (attribute(layer, path) for layer in find_layers(model) for path in beside)
        self.by_token = sum(sizes(linear)[1] for linear in maps if linear is not None)
        if record.shared_kv is None:
            return
        for index, layer in enumerate(find_layers(model)):
            module = layer.get_submodule(record.module)
            if attribute(module, record.shared_kv.stores):
                head_dim = int(attribute(module, record.head_dim))
                heads = sizes(module.get_submodule(record.key))[0] // head_dim
                key = str(attribute(module, record.shared_kv.key))
                self._shared.append(Shared(index, key, heads, head_dim))
        if self._shared:
            self.argument = record.shared_kv.argument

    @property
    def given_flops(self) -> int:
        """FLOPs a token of what layers are given by token: one map of the embeddings makes it."""
        return 2 * self.hidden_size * self.by_token

    @property
    def width(self) -> int:
        """The most numbers that one token has between two layers."""
        return self.hidden_size + sum(one.width for one in self._shared)

    def before(self, layer: int, states: torch.Tensor) -> torch.Tensor:
        """States in front of some layer as the input of this later one: what layers in between would leave is
        zeros, to run it alone."""
        wanted = self.hidden_size + sum(one.width for one in self._shared if one.layer < layer)
        lacking = wanted - states.shape[-1]
        return nn.functional.pad(states, (0, lacking)) if lacking > 0 else states

    def hidden(self, states: torch.Tensor) -> torch.Tensor:
        """The hidden states alone."""
        return states if self.argument is None else states[..., : self.hidden_size].contiguous()

    def given(self, layer: int, states: torch.Tensor) -> dict[str, tuple[torch.Tensor, ...]]:
        """The keys and values (batch, heads, length, head size) that a layer finds, by key."""
        found, start = {}, self.hidden_size
        for one in self._shared:
            if one.layer < layer:
                # Contiguous, as in the model's own pass: kernels may round by strides.
                own = states[..., start : start + one.width].unflatten(-1, (2, one.heads, one.head_dim))
                found[one.key] = tuple(t.contiguous().transpose(1, 2) for t in own.unbind(2))
                start += one.width
        return found

    def behind(
        self, layer: int, out: torch.Tensor, states: torch.Tensor, shared: Mapping[str, Any]
    ) -> torch.Tensor:
        """The states behind a layer, from its output, those in front of it and what it left in `shared`."""
        new = [
            t.transpose(1, 2).flatten(2)
            for one in self._shared
            if one.layer == layer
            for t in shared[one.key]
        ]
        return torch.cat([out, states[..., self.hidden_size :].to(out.device), *new], -1)
