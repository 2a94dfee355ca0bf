"""A model's own decoder layers, run one at a time on kept hidden states.

What the decoder tells its layers (positions, rotary angles, masks) is noted from its own calls. Nothing here
knows what is done between two layers.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from probeprune.blocks import find_family
from probeprune.passes import find_decoder

_ABSENT = object()


class Layers:
    """The decoder layers of a model, for batches of whole windows (no padding, no cache).

    Attributes:
        hidden: what the first layer is given, one tensor (batch, length, hidden) a batch of windows, in the
            model's dtype: windows x length x hidden numbers.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, batches: Sequence[torch.Tensor]) -> None:
        self._layers = cast(nn.ModuleList, model.get_submodule(find_family(model).layers))
        self._sizes = [len(b) for b in batches]
        self._calls: dict[int, list[dict[str, Any]]] = {}
        self.hidden: list[torch.Tensor] = []
        decoder = find_decoder(model)
        device = next(model.parameters()).device
        own = [layer.__dict__.get("forward", _ABSENT) for layer in self._layers]
        heard: list[tuple[torch.Tensor, dict[str, Any]]] = []

        def listen(hidden_states: torch.Tensor, **call: Any) -> torch.Tensor:
            heard.append((hidden_states, call))
            return hidden_states

        try:
            for layer in self._layers:
                layer.forward = listen
            for batch in batches:
                heard.clear()
                decoder(input_ids=batch.to(device), use_cache=False)
                self.hidden.append(heard[0][0])
                # Windows are whole, so batches of one size are told the same.
                self._calls.setdefault(len(batch), [call for _, call in heard])
        finally:
            for layer, forward in zip(self._layers, own, strict=True):
                if forward is _ABSENT:
                    del layer.forward
                else:
                    layer.forward = forward

    def __len__(self) -> int:
        return len(self._layers)

    def run(self, layer: int, batch: int, hidden: torch.Tensor) -> torch.Tensor:
        """The output of one layer for hidden states of one batch."""
        out: torch.Tensor = self._layers[layer](hidden, **self._calls[self._sizes[batch]][layer])
        return out
