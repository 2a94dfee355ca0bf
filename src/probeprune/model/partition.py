"""Order and cut: a block's weights permuted in place, seen through narrower views.

A block computes the same function when its units are permuted consistently. A `Partition` puts the kept units
first, so a cut is a view (`weight[:k]`, `weight[:, :k]`), never a copy, and a new choice swaps only the units
that enter with those that leave. It tracks original unit ids: `restore` puts every parameter back bit for
bit; `cut` removes the other units for good. It does not decide which units are kept.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from probeprune.errors import UsageError
from probeprune.model.blocks import Block, kept_whole
from probeprune.model.linear_maps import LinearMap, oriented, replace_weight, sizes
from probeprune.model.modeling_pruned import ConfigView
from probeprune.model.narrow_linear import View, close_view, open_view
from probeprune.model.offloading import fetching_hook
from probeprune.model.query_heads import attention_overrides

_ABSENT = object()
_IN_CONFIG = "config."
_AUTOCAST = ("cpu", "cuda", "xpu")


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A partition's state at one moment: cached keys and values have the order of the heads then."""

    order: torch.Tensor
    replacement: torch.Tensor | None
    added_bias: torch.Tensor | None


class Partition:
    """A block of a model, with its kept units first.

    Attributes:
        block: the block; its linear maps are changed in place until `restore`.
        order: LongTensor (units,), the original id of the unit at each position.
        shown: number of units in view, from position 0 on.
        companions: tensors (..., block.width) in the order of the coupled activation's channels, permuted
            along with the weights.
    """

    def __init__(self, block: Block) -> None:
        """Raises `UsageError` for a block that stays whole, or whose weights are offloaded and not opened."""
        if block.whole is not None:
            raise kept_whole(block)
        for m in block.members:
            if fetching_hook(m.linear) is not None:
                raise UsageError(
                    f"{m.name} is offloaded, and this needs its weight in place; load the model without "
                    "offloading."
                )
        self.block = block
        device = block.consumer.weight.device
        with torch.inference_mode(False):
            self.order = torch.arange(block.units, device=device)
        self.shown = block.units
        self.companions: list[torch.Tensor] = []
        self._attributes: dict[str, object] = {}
        self._views: dict[LinearMap, View] = {}
        self._by_query_head = block.unit_kind != "group"
        # A single key-value head needs no index: all query heads read it.
        self._indexed = self._by_query_head and block.kv_heads > 1
        overrides = attention_overrides(block.entry) if self._indexed else {}
        for linear in dict.fromkeys(m.linear for m in block.members):
            axis = 1 if linear is block.consumer else 0
            self._views[linear] = open_view(linear, axis, self._original_of(linear))
        for name, value in overrides.items():
            self._set_attribute(name, value)
        self._take_config()
        self.widen()

    # -- order ---------------------------------------------------------------------------------

    @torch.no_grad()
    def keep(self, units: torch.Tensor) -> torch.Tensor:
        """Bring `units` to the front and show only them. Nothing here waits for an accelerator.

        Args:
            units: LongTensor (k,) of original ids, k >= 1; for `balanced` units the same number from
                every group.

        Returns:
            Number of units that came into view: LongTensor ().
        """
        moved = self._bring_to_front(units)
        if len(units) != self.shown or not self._views[self.block.consumer].ranges:
            self.shown = len(units)
            for linear, view in self._views.items():
                view.show(self._kept_ranges(linear))
        self.narrow()
        return moved

    def _bring_to_front(self, units: torch.Tensor) -> torch.Tensor:
        k = len(units)
        if self.order.is_meta:  # shapes only: there is nothing to move
            return self.order.new_zeros(())
        wanted = torch.zeros_like(self.order, dtype=torch.bool).index_fill_(0, units, True)
        if k != self.shown:
            # The first cut, or one of another width: lay out afresh. Ascending ids keep the query heads
            # of a group together.
            self._permute(wanted.argsort(descending=True, stable=True))
            return wanted.sum()
        in_order = wanted[self.order]
        leaves, enters = ~in_order[:k], in_order[k:]
        moved = leaves.sum()
        places = _places(moved, min(k, len(self.order) - k))
        if not places:
            return moved
        leave = self._first(leaves, self.order[:k])[:places]
        enter = self._first(enters, self.order[k:])[:places] + k
        changes = leaves[leave]
        here = torch.cat([leave, enter])
        there = torch.cat([torch.where(changes, enter, leave), torch.where(changes, leave, enter)])
        for tensor, axis, width in self._tensors():
            a, b = _spread(here, width), _spread(there, width)
            tensor.index_copy_(axis, a, tensor.index_select(axis, b))
        self.order[here] = self.order[there]
        self._stamp()
        return moved

    def _first(self, chosen: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
        """Indices with the chosen ones in front. A unit may only take the place of one of its own group where
        units are `balanced`: there the chosen come group by group."""
        group = units // self.block.group_size if self.block.unit_kind == "balanced" else units.new_zeros(())
        return torch.where(chosen, group, self.block.units).argsort(stable=True)

    def _permute(self, order: torch.Tensor) -> None:
        """Lay the units out in the order of these original ids."""
        position = torch.empty_like(self.order)
        position[self.order] = torch.arange(len(self.order), device=self.order.device)
        source = position[order]
        for tensor, axis, width in self._tensors():
            tensor.copy_(tensor.index_select(axis, _spread(source, width)))
        self.order.copy_(order)
        self._stamp()

    def _stamp(self) -> None:
        for view in self._views.values():
            view.stamp()

    def check(self) -> None:
        """Raise `UsageError` where other code has changed the block's weights.

        Compares addresses and version counters, not weights: nothing waits for a device.
        """
        for linear, view in self._views.items():
            if view.changed:
                name = next(m.name for m in self.block.members if m.linear is linear)
                raise UsageError(
                    f"the weights of {name} were changed while a method is attached, and its choice of units "
                    "does not fit them; detach it and attach it again."
                )

    def _tensors(self) -> list[tuple[torch.Tensor, int, int]]:
        """All tensors that a permutation moves: (tensor, axis, entries per unit)."""
        tensors: list[tuple[torch.Tensor, int, int]] = []
        for m in self.block.members:
            for name, axis in (("weight", m.axis), ("bias", 0)):
                parameter = m.linear._parameters[name]
                if parameter is None or (name == "bias" and m.axis == 1):  # a consumer's belongs to no unit
                    continue
                # Not `.data`: autograd must notice that a weight it has saved was moved.
                own = [parameter.detach()]
                if parameter.grad is not None:  # it lies as its weight does
                    own.append(parameter.grad.detach())
                for tensor in own:
                    part = m.part(oriented(m.linear, tensor), self.block.units)
                    tensors.append((part, axis, m.width))
        if self.order.device.type in _AUTOCAST and torch.is_autocast_enabled(self.order.device.type):
            torch.clear_autocast_cache()  # it holds casts of these weights as they were
        return [*tensors, *((c, c.ndim - 1, self.block.unit_width) for c in self.companions)]

    def _original_of(self, linear: LinearMap) -> Any:
        def original(name: str) -> torch.Tensor:
            """A parameter of the map with its units in their original order."""
            parameter: Any = linear._parameters[name]
            tensor: torch.Tensor = parameter.detach().clone()
            positions = self.order.argsort().to(tensor.device)
            for m in self.block.members:
                if m.linear is linear and (name == "weight" or m.axis == 0):
                    axis = m.axis if tensor.ndim > 1 else 0
                    part = m.part(oriented(linear, tensor), self.block.units)
                    part.copy_(part.index_select(axis, _spread(positions, m.width)))
            return tensor

        return original

    # -- cut -----------------------------------------------------------------------------------

    def _kept_ranges(self, linear: LinearMap) -> list[tuple[int, int]]:
        """(start, length) of the rows or columns in view; several for a fused map."""
        end = sizes(linear)[1 if linear is self.block.consumer else 0]
        ranges, position = [], 0
        for m in self.block.members:
            if m.linear is linear:
                ranges += [(position, m.start - position), (m.start, self.shown * m.width)]
                position = m.start + self.block.units * m.width
        return [r for r in [*ranges, (position, end - position)] if r[1]]

    def narrow(self) -> None:
        """Show the kept units only; all of them before the first choice."""
        for view in self._views.values():
            view.settle(bool(view.ranges))
        self._tell_attention(self.shown)

    def widen(self) -> None:
        """Show all units, in the present order (the dense block's function, to rounding)."""
        for view in self._views.values():
            view.settle(False)
        self._tell_attention(self.block.units)

    def _tell_attention(self, units: int) -> None:
        """Set the head counts that the module's forward reads."""
        self._set_counts(units)
        if self._indexed:
            self._set_attribute("kv_index", self.order[:units] // self.block.group_size)

    def wide_attributes(self) -> dict[str, object]:
        """Attributes of the attention module that depend on the order, for a view of all units."""
        return {"kv_index": self.order // self.block.group_size} if self._indexed else {}

    def _set_counts(self, units: int) -> None:
        block = self.block
        query_heads = units * (1 if self._by_query_head else block.group_size)
        kv_heads = block.kv_heads if self._by_query_head else units
        for name, value in block.counts(query_heads, kv_heads).items():
            if name.startswith(_IN_CONFIG):
                setattr(block.entry.config, name.removeprefix(_IN_CONFIG), value)
            else:
                self._set_attribute(name, value)
        if self._by_query_head and not self._indexed and hasattr(block.entry, "num_key_value_groups"):
            self._set_attribute("num_key_value_groups", query_heads)

    def _take_config(self) -> None:
        """Give the module its own config if its forward reads head counts from the config."""
        if any(name.startswith(_IN_CONFIG) for name in self.block.counts(1, 1)):
            self._set_attribute("config", ConfigView(self.block.entry.config))

    @torch.no_grad()
    def cut(self) -> None:
        """Remove the units out of view for good; `restore` no longer works.

        Call `find_blocks` again afterwards. Raises `UsageError` where groups of query heads would keep
        different numbers of them, which no model code can run.
        """
        block = self.block
        check_can_cut(block)
        self.widen()
        for linear, view in self._views.items():
            close_view(linear)
            weight, bias = linear._parameters["weight"], linear._parameters["bias"]
            assert weight is not None
            kept = view.replacement
            if kept is None:
                whole = oriented(linear, weight.data)
                kept = torch.cat([whole.narrow(view.axis, *r) for r in view.ranges], view.axis)
            replace_weight(linear, kept)
            if view.added_bias is not None:
                linear._parameters["bias"] = nn.Parameter(view.added_bias, requires_grad=False)
            elif bias is not None and view.axis == 0:
                rows = torch.cat([bias.data.narrow(0, *r) for r in view.ranges])
                linear._parameters["bias"] = nn.Parameter(rows, requires_grad=bias.requires_grad)
        self._views = {}
        if self._indexed:  # balanced: consecutive heads share a group again
            self._restore_attributes()
            block.entry.num_key_value_groups = self.shown // block.kv_heads  # type: ignore[assignment]
            self._take_config()
        self._set_counts(self.shown)

    # -- snapshots -----------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """The present order and replacements, to return to with `show_again`."""
        view = self._views[self.block.consumer]
        weight = view.replacement
        return Snapshot(self.order.clone(), None if weight is None else weight.clone(), view.added_bias)

    @torch.no_grad()
    def show_again(self, snapshot: Snapshot) -> None:
        """Lay out the units as in `snapshot`, taken while as many units were shown as now."""
        # Reading the order elsewhere than on a CPU would stall the queue.
        if self.order.device.type != "cpu" or not self.order.equal(snapshot.order):
            self._permute(snapshot.order)
        view = self._views[self.block.consumer]
        with torch.inference_mode(False):
            weight = snapshot.replacement
            view.replacement = None if weight is None else weight.to(self.consumer_weight)
            bias = snapshot.added_bias
            view.added_bias = None if bias is None else bias.to(self.consumer_weight)
        self.narrow()

    # -- the rest ------------------------------------------------------------------------------

    def add_bias(self, bias: torch.Tensor) -> None:
        """Add a vector (hidden size,) to the consumer's own bias while the block is narrow, replacing any
        added before."""
        own = self.consumer_bias
        total = bias if own is None else own.float() + bias
        self._views[self.block.consumer].added_bias = total.to(self.consumer_weight.dtype)
        self.narrow()

    def replace_consumer(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Replace the consumer's weight (hidden size, kept channels) and bias while the block is narrow.

        Columns are those of the kept units, in their present order. The replacement lasts until the number
        of units changes; the dense block keeps the original. With bias None the consumer's own bias stays.
        """
        view = self._views[self.block.consumer]
        if view.replacement is not None:
            view.replacement.copy_(weight)
        else:
            with torch.inference_mode(False):
                view.replacement = weight.to(self.consumer_weight.dtype, copy=True)
        if bias is not None:
            with torch.inference_mode(False):
                view.added_bias = bias.to(self.consumer_weight.dtype)
        self.narrow()

    @property
    def consumer_weight(self) -> torch.Tensor:
        """The consumer's full weight (d, n), kept channels first: a view."""
        full: Any = self.block.consumer._parameters["weight"]
        return oriented(self.block.consumer, full.detach())

    @property
    def consumer_bias(self) -> torch.Tensor | None:
        """The consumer's own bias (d,); None where it has none."""
        own = self.block.consumer._parameters["bias"]
        return None if own is None else own.detach()

    @property
    def kept_units(self) -> torch.Tensor:
        """Original ids of the units in view, ascending: LongTensor (shown,)."""
        return self.order[: self.shown].sort().values

    @property
    def channels(self) -> torch.Tensor:
        """Original channel of `z` at each position: LongTensor (block.width,)."""
        return _spread(self.order, self.block.unit_width)

    @torch.no_grad()
    def restore(self) -> None:
        """Undo everything: same parameters, same bits, same attributes as before."""
        if not self._views:
            return
        if not self.order.is_meta:
            device = self.consumer_weight.device
            if device != self.order.device:  # the model was moved; its companions were not
                self.order, self.companions = self.order.to(device), []
            self._permute(torch.arange(self.block.units, device=device))
        self.shown = self.block.units
        self.widen()
        for linear in self._views:
            close_view(linear)
        self._views = {}
        self._restore_attributes()

    def _restore_attributes(self) -> None:
        for name, value in self._attributes.items():
            if value is _ABSENT:
                delattr(self.block.entry, name)
            else:
                setattr(self.block.entry, name, value)
        self._attributes = {}

    def _set_attribute(self, name: str, value: object) -> None:
        module = self.block.entry
        self._attributes.setdefault(name, module.__dict__.get(name, _ABSENT))
        setattr(module, name, value)


def check_can_cut(block: Block) -> None:
    """Raise `UsageError` for units that can be hidden from view but not cut for good."""
    if block.unit_kind == "query":
        raise UsageError(
            "unit_kind='query' keeps different numbers of query heads from group to group, which no "
            "checkpoint can hold; use unit_kind='group' or 'balanced'."
        )


def _places(moved: torch.Tensor, most: int) -> int:
    """Number of places that a swap writes on either side of the cut, when `moved` units change sides.

    `moved` is a tensor on the device. On a CPU its value can be read; elsewhere reading it would stall the
    queue, so `most` places are written, unchanged ones with their own content.
    """
    return int(moved) if moved.device.type == "cpu" else most


def _spread(units: torch.Tensor, width: int) -> torch.Tensor:
    """Indices of the entries of these units, `width` consecutive ones each."""
    if width == 1:
        return units
    return (units[:, None] * width + torch.arange(width, device=units.device)).flatten()
