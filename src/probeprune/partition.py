"""Order and cut: a block's weights permuted in place, seen through a narrower window.

A block computes the same function when its units are permuted consistently. A `Partition` keeps the
units that stay in front, so a cut is a view (`weight[:k]`, `weight[:, :k]`), never a copy, and a new
choice swaps only the units that enter with those that leave. Original unit ids are remembered; `restore`
puts every parameter back bit for bit. Which units stay is somebody else's decision.
"""

import torch
from torch import nn

from probeprune.blocks import Block, Member
from probeprune.query_heads import attention_overrides

_ABSENT = object()


class Partition:
    """A block of a model, with its kept units first.

    Attributes:
        block: the block; its linear maps are changed in place until `restore`.
        order: LongTensor (units,), the original id of the unit at each position.
        kept: how many units, from position 0 on, the window shows.
        followers: tensors (..., block.width) in the order of the coupled activation's channels; they are
            permuted along with the weights.
    """

    def __init__(self, block: Block) -> None:
        self.block = block
        device = block.consumer.weight.device
        with torch.inference_mode(False):
            self.order = torch.arange(block.units, device=device)
        self.kept = block.units
        self.followers: list[torch.Tensor] = []
        self._parameters = [(m.linear, dict(m.linear._parameters)) for m in block.members]
        self._consumer_bias = block.consumer.bias
        self._windows: list[tuple[nn.Linear, str, nn.Parameter, nn.Parameter]] = []
        self._attributes: dict[str, object] = {}
        self._by_query_head = block.unit_kind != "group"
        if self._by_query_head:
            for name, value in attention_overrides(block.entry).items():
                self._set_attribute(name, value)
        self.widen()

    # -- order ---------------------------------------------------------------------------------

    @torch.no_grad()
    def keep(self, units: torch.Tensor) -> int:
        """Bring `units` to the front and show only them.

        Args:
            units: LongTensor (k,) of original ids, k >= 1; for `balanced` units the same number from
                every group.

        Returns:
            How many units were moved into the window.
        """
        moved = self._bring_to_front(units)
        if len(units) != self.kept or not self._windows:
            self.kept = len(units)
            self._open()
        self.narrow()
        return moved

    def _bring_to_front(self, units: torch.Tensor) -> int:
        k = len(units)
        if self.order.is_meta:  # shapes only: there is nothing to move
            return 0
        wanted = torch.zeros(self.block.units, dtype=torch.bool, device=self.order.device)
        wanted[units] = True
        if k != self.kept:
            # The first cut, or one of another width: lay out afresh. Ascending ids keep the query heads
            # of a group together.
            self._permute(torch.cat([wanted.nonzero().flatten(), (~wanted).nonzero().flatten()]))
            return k
        in_order = wanted[self.order]
        leave = (~in_order[:k]).nonzero().flatten()
        enter = in_order[k:].nonzero().flatten() + k
        if not len(leave):
            return 0
        if self.block.unit_kind == "balanced":  # a unit may only take the place of one of its own group
            group = self.order // self.block.group_size
            leave = leave[group[leave].argsort(stable=True)]
            enter = enter[group[enter].argsort(stable=True)]
        here, there = torch.cat([leave, enter]), torch.cat([enter, leave])
        for tensor, axis, width in self._tensors():
            a, b = _spread(here, width), _spread(there, width)
            tensor.index_copy_(axis, a, tensor.index_select(axis, b))
        self.order[here] = self.order[there]
        return len(leave)

    def _permute(self, order: torch.Tensor) -> None:
        """Lay the units out in the order of these original ids."""
        position = torch.empty_like(self.order)
        position[self.order] = torch.arange(len(self.order), device=self.order.device)
        source = position[order]
        for tensor, axis, width in self._tensors():
            tensor.copy_(tensor.index_select(axis, _spread(source, width)))
        self.order.copy_(order)

    def _tensors(self) -> list[tuple[torch.Tensor, int, int]]:
        """Everything a permutation moves: (tensor, axis, entries a unit)."""
        moved: list[tuple[torch.Tensor, int, int]] = []
        for m, (_, parameters) in zip(self.block.members, self._parameters, strict=True):
            weight, bias = parameters["weight"], parameters["bias"]
            assert weight is not None
            moved.append((weight.data, m.axis, m.width))
            if bias is not None and m.axis == 0:
                moved.append((bias.data, 0, m.width))
        moved += [(f, f.ndim - 1, self.block.unit_width) for f in self.followers]
        return moved

    # -- cut -----------------------------------------------------------------------------------

    def _open(self) -> None:
        """Make the window's parameters: views of the full ones, made once a width."""
        self._windows = []
        with torch.inference_mode(False):
            for m, (linear, parameters) in zip(self.block.members, self._parameters, strict=True):
                weight, bias = parameters["weight"], parameters["bias"]
                assert weight is not None
                self._windows.append((linear, "weight", weight, _window(weight, m, self.kept)))
                if bias is not None and m.axis == 0:
                    self._windows.append((linear, "bias", bias, _window(bias, m, self.kept)))

    def narrow(self) -> None:
        """Show the kept units only."""
        for linear, name, _, window in self._windows:
            linear._parameters[name] = window
        self._tell_attention(self.kept)

    def widen(self) -> None:
        """Show all units, in the present order (the dense block's function, to rounding)."""
        for linear, name, full, _ in self._windows:
            linear._parameters[name] = full
        self._tell_attention(self.block.units)

    def _tell_attention(self, units: int) -> None:
        if self.block.heads_attribute:
            self._set_attribute(self.block.heads_attribute, units * self.block.group_size)
        if self._by_query_head:
            self._set_attribute("kv_index", self.order[:units] // self.block.group_size)

    # -- the rest ------------------------------------------------------------------------------

    def add_bias(self, bias: torch.Tensor) -> None:
        """Add a vector (hidden size,) to the consumer's own bias, in place of any added before."""
        consumer = self.block.consumer
        own = self._consumer_bias
        total = bias if own is None else own.detach().float() + bias
        consumer._parameters["bias"] = nn.Parameter(total.to(consumer.weight.dtype), requires_grad=False)

    @property
    def consumer_weight(self) -> torch.Tensor:
        """The consumer's full weight (d, n), kept channels first."""
        full = next(p["weight"] for linear, p in self._parameters if linear is self.block.consumer)
        assert full is not None
        return full.data

    @property
    def kept_units(self) -> torch.Tensor:
        """Original ids of the units in the window, ascending: LongTensor (kept,)."""
        return self.order[: self.kept].sort().values

    @property
    def channels(self) -> torch.Tensor:
        """Original channel of `z` at each position: LongTensor (block.width,)."""
        return _spread(self.order, self.block.unit_width)

    @torch.no_grad()
    def restore(self) -> None:
        """Undo everything: same parameters, same bits, same attributes as before."""
        if not self.order.is_meta:
            self._permute(torch.arange(self.block.units, device=self.order.device))
        self.kept = self.block.units
        for linear, parameters in self._parameters:
            linear._parameters.update(parameters)
        for name, value in self._attributes.items():
            if value is _ABSENT:
                delattr(self.block.entry, name)
            else:
                setattr(self.block.entry, name, value)
        self._windows, self._attributes = [], {}

    def _set_attribute(self, name: str, value: object) -> None:
        module = self.block.entry
        self._attributes.setdefault(name, module.__dict__.get(name, _ABSENT))
        setattr(module, name, value)


def _spread(units: torch.Tensor, width: int) -> torch.Tensor:
    """Entries of these units where each has `width` consecutive ones."""
    if width == 1:
        return units
    return (units[:, None] * width + torch.arange(width, device=units.device)).flatten()


def _window(full: nn.Parameter, member: Member, kept: int) -> nn.Parameter:
    view = full.data.narrow(member.axis if full.ndim > 1 else 0, 0, kept * member.width)
    return nn.Parameter(view, requires_grad=False)
