"""Order and cut: a block's weights permuted in place, seen through narrower views.

A block computes the same function when its units are permuted consistently. A `Partition` keeps the units
that stay in front, so a cut is a view (`weight[:k]`, `weight[:, :k]`), never a copy, and a new choice swaps
only the units that enter with those that leave. It remembers original unit ids: `restore` puts every
parameter back bit for bit, `cut` drops the rest for good. It does not decide which units stay.
"""

from collections.abc import Callable, Sequence
from copy import copy

import torch
from torch import nn
from torch.nn.functional import linear as multiply

from probeprune.errors import UsageError
from probeprune.model.blocks import Block
from probeprune.model.query_heads import attention_overrides

_ABSENT = object()
_IN_CONFIG = "config."


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
        self.block = block
        device = block.consumer.weight.device
        with torch.inference_mode(False):
            self.order = torch.arange(block.units, device=device)
        self.shown = block.units
        self.companions: list[torch.Tensor] = []
        self._parameters = {m.linear: dict(m.linear._parameters) for m in block.members}
        self._own_bias = self._shown_bias = block.consumer.bias
        self._refitted: nn.Parameter | None = None
        self._views: list[tuple[nn.Linear, str, nn.Parameter, nn.Parameter]] = []
        self._forwards: list[tuple[nn.Linear, Callable[[torch.Tensor], torch.Tensor]]] = []
        self._attributes: dict[str, object] = {}
        self._by_query_head = block.unit_kind != "group"
        if self._by_query_head:
            for name, value in attention_overrides(block.entry).items():
                self._set_attribute(name, value)
        self._take_config()
        self.widen()

    # -- order ---------------------------------------------------------------------------------

    @torch.no_grad()
    def keep(self, units: torch.Tensor) -> torch.Tensor:
        """Bring `units` to the front and show only them. On an accelerator nothing here waits for it.

        Args:
            units: LongTensor (k,) of original ids, k >= 1; for `balanced` units the same number from
                every group.

        Returns:
            Number of units that came into view: LongTensor ().
        """
        moved = self._bring_to_front(units)
        if len(units) != self.shown or not self._views:
            self.shown = len(units)
            self._open()
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

    def _tensors(self) -> list[tuple[torch.Tensor, int, int]]:
        """Everything a permutation moves: (tensor, axis, entries a unit)."""
        moved: list[tuple[torch.Tensor, int, int]] = []
        for m in self.block.members:
            parameters = self._parameters[m.linear]
            weight, bias = parameters["weight"], parameters["bias"]
            assert weight is not None
            moved.append((m.part(weight.data, self.block.units), m.axis, m.width))
            if bias is not None and m.axis == 0:
                moved.append((m.part(bias.data, self.block.units), 0, m.width))
        moved += [(f, f.ndim - 1, self.block.unit_width) for f in self.companions]
        return moved

    # -- cut -----------------------------------------------------------------------------------

    def _open(self) -> None:
        """Make the views of the full parameters, once per width."""
        self.widen()
        self._views, self._forwards = [], []
        self._refitted, self._shown_bias = None, self._own_bias
        with torch.inference_mode(False):
            for linear, parameters in self._parameters.items():
                kept = self._kept_ranges(linear)
                views = {
                    name: [nn.Parameter(full.data.narrow(axis, *r), requires_grad=False) for r in kept]
                    for name, full, axis in self._cut_parameters(linear, parameters)
                }
                if len(kept) == 1:
                    for name, (view,) in views.items():
                        full = parameters[name]
                        assert full is not None
                        self._views.append((linear, name, full, view))
                else:
                    biases: Sequence[nn.Parameter | None] = views.get("bias") or [None] * len(kept)
                    self._forwards.append((linear, _side_by_side(views["weight"], biases)))

    def _cut_parameters(
        self, linear: nn.Linear, parameters: dict[str, nn.Parameter | None]
    ) -> list[tuple[str, nn.Parameter, int]]:
        """Parameters of a linear map that a cut makes narrower: (name, full, axis)."""
        weight, bias = parameters["weight"], parameters["bias"]
        assert weight is not None
        if linear is self.block.consumer:
            return [("weight", weight, 1)]
        return [("weight", weight, 0)] + ([] if bias is None else [("bias", bias, 0)])

    def _kept_ranges(self, linear: nn.Linear) -> list[tuple[int, int]]:
        """(start, length) of the rows or columns in view; several for a fused map."""
        consumer = linear is self.block.consumer
        end = linear.in_features if consumer else linear.out_features
        ranges, position = [], 0
        for m in self.block.members:
            if m.linear is linear:
                ranges += [(position, m.start - position), (m.start, self.shown * m.width)]
                position = m.start + self.block.units * m.width
        return [r for r in [*ranges, (position, end - position)] if r[1]]

    def narrow(self) -> None:
        """Show the kept units only."""
        for linear, name, _, view in self._views:
            linear._parameters[name] = view
        self.block.consumer._parameters["bias"] = self._shown_bias
        for linear, forward in self._forwards:
            linear.forward = forward  # type: ignore[method-assign, assignment]
        self._tell_attention(self.shown)

    def widen(self) -> None:
        """Show all units, in the present order (the dense block's function, to rounding)."""
        for linear, name, full, _ in self._views:
            linear._parameters[name] = full
        self.block.consumer._parameters["bias"] = self._own_bias
        for linear, _ in self._forwards:
            linear.__dict__.pop("forward", None)
        self._tell_attention(self.block.units)

    def _tell_attention(self, units: int) -> None:
        """Tell the module's forward how many heads there are, where it asks."""
        self._set_counts(units)
        if self._by_query_head:
            self._set_attribute("kv_index", self.order[:units] // self.block.group_size)

    def _set_counts(self, units: int) -> None:
        block = self.block
        query_heads = units * (1 if self._by_query_head else block.group_size)
        kv_heads = block.kv_heads if self._by_query_head else units
        for name, heads in ((block.query_count, query_heads), (block.kv_count, kv_heads)):
            if name is not None and name.startswith(_IN_CONFIG):
                setattr(block.entry.config, name.removeprefix(_IN_CONFIG), heads)
            elif name is not None:
                self._set_attribute(name, heads)

    def _take_config(self) -> None:
        """Give the module a config of its own where its forward reads head counts there."""
        if any(
            c is not None and c.startswith(_IN_CONFIG) for c in (self.block.query_count, self.block.kv_count)
        ):
            self._set_attribute("config", copy(self.block.entry.config))

    @torch.no_grad()
    def cut(self) -> None:
        """Drop the units out of view for good. There is nothing left to restore.

        The block must be found anew afterwards. Raises `UsageError` where groups of query heads would keep
        different numbers of them, which no model code can run.
        """
        block = self.block
        check_can_cut(block)
        self.widen()
        block.consumer._parameters["bias"] = self._shown_bias
        for linear, parameters in self._parameters.items():
            kept = self._kept_ranges(linear)
            for name, full, axis in self._cut_parameters(linear, parameters):
                rest = torch.cat([full.data.narrow(axis, *r) for r in kept], axis)
                linear._parameters[name] = nn.Parameter(rest, requires_grad=full.requires_grad)
            if linear is block.consumer and self._refitted is not None:
                wanted = linear.weight.requires_grad
                linear._parameters["weight"] = nn.Parameter(self._refitted.data, requires_grad=wanted)
            linear.out_features, linear.in_features = linear.weight.shape
            parameters.clear()  # frees the dense weight before the next map is copied
        self._views, self._forwards, self._refitted = [], [], None
        if self._by_query_head:  # balanced: consecutive heads share a group again
            self._restore_attributes()
            block.entry.num_key_value_groups = self.shown // block.kv_heads  # type: ignore[assignment]
            self._take_config()
        self._set_counts(self.shown)

    # -- the rest ------------------------------------------------------------------------------

    def add_bias(self, bias: torch.Tensor) -> None:
        """Add a vector (hidden size,) to the consumer's own bias while the block is narrow, in place of any
        added before."""
        consumer, own = self.block.consumer, self._own_bias
        total = bias if own is None else own.detach().float() + bias
        self._shown_bias = nn.Parameter(total.to(consumer.weight.dtype), requires_grad=False)
        self.narrow()

    def replace_consumer(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Show another weight (hidden size, kept channels) and bias of the consumer while the block is
        narrow.

        Columns are those of the kept units, in their present order. The replacement lasts until the number of
        units changes; the dense block keeps its own. Without a bias the consumer's own stays.
        """
        consumer = self.block.consumer
        if self._refitted is not None:
            self._refitted.data.copy_(weight)
        else:
            with torch.inference_mode(False):
                self._refitted = nn.Parameter(
                    weight.to(self.consumer_weight.dtype, copy=True), requires_grad=False
                )
            full = self._parameters[consumer]["weight"]
            assert full is not None
            self._views = [v for v in self._views if v[0] is not consumer]
            self._views.append((consumer, "weight", full, self._refitted))
        if bias is not None:
            with torch.inference_mode(False):
                self._shown_bias = nn.Parameter(bias.to(self.consumer_weight.dtype), requires_grad=False)
        self.narrow()

    @property
    def consumer_weight(self) -> torch.Tensor:
        """The consumer's full weight (d, n), kept channels first."""
        full = self._parameters[self.block.consumer]["weight"]
        assert full is not None
        return full.data

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
        if not self.order.is_meta:
            self._permute(torch.arange(self.block.units, device=self.order.device))
        self.shown = self.block.units
        self.widen()
        for linear, parameters in self._parameters.items():
            linear._parameters.update(parameters)
        self._views, self._forwards, self._refitted = [], [], None
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
    """How many places a swap writes on either side of the cut, where `moved` units change sides.

    That number is known on the device alone. A CPU may ask for it; elsewhere asking would stall the queue, so
    `most` places are written, those that do not change with what they hold.
    """
    return int(moved) if moved.device.type == "cpu" else most


def _spread(units: torch.Tensor, width: int) -> torch.Tensor:
    """Entries of these units where each has `width` consecutive ones."""
    if width == 1:
        return units
    return (units[:, None] * width + torch.arange(width, device=units.device)).flatten()


def _side_by_side(
    weights: Sequence[nn.Parameter], biases: Sequence[nn.Parameter | None]
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The forward of a fused map of which several ranges of rows are shown.

    They do not lie together, so each multiplies alone and the results are put side by side.
    """
    parts = list(zip(weights, biases, strict=True))

    def forward(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([multiply(x, weight, bias) for weight, bias in parts], dim=-1)

    return forward
