"""Stacks of experts: what can be pruned in the sparse layers of a mixture of experts.

A layer's experts lie in tensors with one entry per expert. Two kinds of units can go: whole experts, each
with its row of the router, or channels, of every expert the same number and each its own. A stack is no
`Block`: no linear map is behind it, and no narrower view shows a part of it; a cut copies what stays. To
importances each expert shows itself as a block does, by `Member`s (`Expert`). Knows nothing of scores or
ratios.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from probeprune.errors import UsageError, unknown
from probeprune.model.blocks import Block, UnitKind, find_blocks, find_layers
from probeprune.model.families import find_family
from probeprune.model.family_records import ExpertsRecord
from probeprune.model.layer_records import attribute
from probeprune.model.multimodal import text_config
from probeprune.model.permutable import refuse_shared
from probeprune.model.wrappers import unwrapped

ExpertUnit = Literal["channel", "expert"]
"""What one unit of a stack is.

- `channel`: one channel of every expert: the same number in each, chosen by each expert for itself.
- `expert`: a whole expert, with its row of the router.
"""
EXPERT_UNITS: tuple[ExpertUnit, ...] = ("channel", "expert")


@dataclass(frozen=True, eq=False)
class ExpertMember:
    """The part of one matrix of an expert that belongs to its channels, as `blocks.Member` says it of a
    linear map: channel `u` owns `width` consecutive rows (`axis` 0) or columns (`axis` 1), from `start + u *
    width`."""

    weight: torch.Tensor
    """(out, in), without gradients: a view."""
    axis: int
    width: int
    start: int = 0

    def part(self, tensor: torch.Tensor, units: int) -> torch.Tensor:
        """View of the first `units` channels in a weight (out, in)."""
        return tensor.narrow(self.axis, self.start, units * self.width)


@dataclass(frozen=True, eq=False)
class ExpertMap:
    """One matrix of one expert, as gradient criteria see a linear map (`blocks.Member`)."""

    stack: "Stack"
    key: str
    """Name of the tensor: `gate_up_proj`, of whose rows a channel has two, or `down_proj`."""
    expert: int

    @property
    def tensor(self) -> str:
        """Path of the tensor in the model."""
        return f"{self.stack.name}.{self.key}"

    @property
    def name(self) -> str:
        """A name of its own."""
        return f"{self.tensor}.{self.expert}"

    @property
    def axis(self) -> int:
        """0 where channels own rows, 1 where they own columns."""
        return int(self.key == "down_proj")

    @property
    def weight(self) -> torch.Tensor:
        """(out, in), without gradients: a view."""
        return self.stack.matrix(self.key, self.expert)

    def oriented(self, tensor: torch.Tensor) -> torch.Tensor:
        """View (out, in) of a tensor that lies as the matrix does in the model."""
        return tensor.T if self.stack.record.transposed else tensor


@dataclass(frozen=True, eq=False)
class Expert:
    """One expert of a stack, with the channels as its units, as importances see a block."""

    layer: int
    units: int
    members: tuple[ExpertMember, ...]
    unit_width: int = 1
    kind: Literal["experts"] = "experts"

    @property
    def consumer_weight(self) -> torch.Tensor:
        """The weight (hidden size, width) of `down_proj`."""
        return self.members[-1].weight


@dataclass(frozen=True, eq=False)
class Stack:
    """The experts of one layer."""

    name: str
    """Path in the model of the module that holds them."""
    layer: int
    record: ExpertsRecord
    root: nn.Module
    """The decoder layer."""
    module: nn.Module
    entry: nn.Module
    """The module whose input goes to the router and the experts."""
    unit: ExpertUnit
    experts: int
    """Number of experts."""
    width: int
    """Number of channels of each expert."""
    hidden_size: int
    """Width of what the experts read."""
    per_token: int
    """Number of experts that the router takes for a token."""
    router_entries: int
    """Parameters of the router that belong to one expert."""
    router_width: int = 0
    """Width of what the router reads; experts may read something narrower (`hidden_size`)."""
    beside: int = 0
    """Parameters around the experts that belong to none."""
    maps_beside: int = 0
    """Those of them that tokens are multiplied with."""
    groups: int = 1
    """Number of groups that the router deals experts into, all of one size."""
    groups_per_token: int = 1
    """Number of groups that it takes experts from for a token."""
    whole: str | None = None
    """Why no unit can go, to follow "because"; None where units can go."""
    kind: Literal["experts"] = "experts"
    unit_kind: UnitKind = "group"

    @property
    def units(self) -> int:
        """Number of units: of experts, or of channels of each."""
        return self.experts if self.unit == "expert" else self.width

    @property
    def fine(self) -> bool:
        """Whether units are channels."""
        return self.unit == "channel"

    @property
    def parts(self) -> int:
        """Number of parts that keep the same number of units each."""
        return self.groups if self.unit == "expert" else 1

    @property
    def least(self) -> int:
        """The smallest number of units that leaves a working layer: as many experts as are taken for a
        token."""
        if self.unit == "channel":
            return 1
        if self.groups == 1:
            return self.per_token
        # Groups are compared by their two best experts.
        return self.groups * max(2, -(-self.per_token // self.groups_per_token))

    @property
    def unit_parameters(self) -> int:
        """Parameters removed with one unit."""
        if self.unit == "channel":
            return self.experts * self._channel
        biases = self.hidden_size if self.record.biases else 0
        return self.width * self._channel + biases + self.router_entries

    @property
    def _channel(self) -> int:
        """Parameters of one channel of one expert."""
        rows = 2 if self.record.gated else 1
        return (rows + 1) * self.hidden_size + (rows if self.record.biases else 0)

    @property
    def parameters(self) -> int:
        """Parameters of all experts, of the router, and of what is beside it around the experts."""
        biases = self.hidden_size if self.record.biases else 0
        return self.experts * (self.width * self._channel + biases + self.router_entries) + self.beside

    def flops(self, kept: int, tokens: int) -> int:
        """FLOPs of the router, of the experts that `tokens` tokens are sent to and of what is beside the
        router, where `kept` units stay."""
        experts, width = (kept, self.width) if self.unit == "expert" else (self.experts, kept)
        seen = experts if self.record.scales_input else self.per_token
        maps = self.hidden_size * (3 if self.record.gated else 2)
        return 2 * tokens * (self.router_width * experts + maps * width * seen + self.maps_beside)

    def expert(self, index: int) -> Expert:
        """One expert, as importances see a block."""
        made, down = self.matrix(self.record.producer, index), self.matrix("down_proj", index)
        if self.record.interleaved:
            rows: tuple[ExpertMember, ...] = (ExpertMember(made, 0, 2),)
        elif self.record.gated:
            rows = (ExpertMember(made, 0, 1), ExpertMember(made, 0, 1, self.width))
        else:
            rows = (ExpertMember(made, 0, 1),)
        return Expert(self.layer, self.width, (*rows, ExpertMember(down, 1, 1)))

    @property
    def maps(self) -> list[ExpertMap]:
        """All matrices of all experts: expert by expert, those of one tensor first."""
        keys = ("gate_up_proj", "down_proj")
        return [ExpertMap(self, key, expert) for key in keys for expert in range(self.experts)]

    @property
    def device(self) -> torch.device:
        """Where the experts are."""
        weight: Any = self.module._parameters["down_proj"]
        return weight.device

    def matrix(self, name: str, index: int) -> torch.Tensor:
        """A matrix of one expert (out, in), without gradients: a view. `name` is that of the tensor."""
        weight: Any = self.module._parameters[name]
        own: torch.Tensor = weight.detach()[index]
        return own.T if self.record.transposed else own

    def coupled(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """What one expert makes of its inputs (tokens, hidden size) in front of `down_proj`: (tokens,
        width)."""
        module: Any = self.module
        made = x @ self.matrix(self.record.producer, index).T
        if self.record.biases:
            made = made + module._parameters[f"{self.record.producer}_bias"][index]
        if not self.record.gated:
            activated: torch.Tensor = module.act_fn(made)
            return activated
        if hasattr(module, "_apply_gate"):  # transformers' own, of every module with interchangeable kernels
            gated: torch.Tensor = module._apply_gate(made)
            return gated
        gate, up = made.chunk(2, dim=-1)
        product: torch.Tensor = module.act_fn(gate) * up
        return product

    def output(self, index: int, z: torch.Tensor) -> torch.Tensor:
        """What one expert makes of its coupled activations (tokens, width): (tokens, hidden size)."""
        made = z @ self.matrix("down_proj", index).T
        if self.record.biases:
            made = made + self.module._parameters["down_proj_bias"][index]  # type: ignore[index]
        return made


def find_stacks(model: nn.Module, unit: ExpertUnit = "channel", whole: str | None = None) -> list[Stack]:
    """The stacks of experts of a transformers causal LM, in the order in which they run; none of a dense one.

    Args:
        model: a causal LM of a supported family.
        unit: what one unit is.
        whole: why no unit of them can go, if so.

    Raises `UsageError` for an unsupported family, an unknown unit, or weights that cannot be cut (quantised,
    or shared between modules).
    """
    if unit not in EXPERT_UNITS:
        raise UsageError(unknown("unit of experts", unit, EXPERT_UNITS))
    model = unwrapped(model)
    family = find_family(model)
    record = family.experts
    if record is None:
        return []
    layers = enumerate(find_layers(model))
    sparse = [(i, layer) for i, layer in layers if attribute(layer, record.module) is not None]
    stacks = [
        _stack(f"{family.layers}.{i}", i, layer, record, text_config(model.config), unit, whole)
        for i, layer in sparse
    ]
    refuse_shared(model, {s.name: (s.module,) for s in stacks})
    return stacks


def find_parts(
    model: nn.Module, units: UnitKind = "group", unit: ExpertUnit = "channel", whole: str | None = None
) -> list[Block | Stack]:
    """Everything that a ratio counts, in order: by layer its attention, its MLP, its experts. Arguments and
    errors as in `find_blocks` and `find_stacks`."""
    parts: list[Block | Stack] = [*find_blocks(model, units), *find_stacks(model, unit, whole)]
    return sorted(parts, key=lambda part: part.layer)  # stable: experts come last


def check_kinds(parts: Collection[Block | Stack], kinds: Collection[str]) -> None:
    """Raise `UsageError` where nothing of these kinds can lose units."""
    asked = [p for p in parts if p.kind in kinds]
    if not asked:
        raise UsageError(
            f"this model has no {' and no '.join(kinds)} to prune; name other blocks, or none for all kinds."
        )
    if any(p.whole is None for p in asked):
        return
    heads = next((p for p in asked if p.kind == "attention"), None)
    stack = next((p for p in asked if p.kind == "experts"), None)
    no_head = "" if heads is None else f"no head of this model can go, because it {heads.whole}"
    if stack is None:
        raise UsageError(f"{no_head}; prune MLPs alone.")
    raise UsageError(
        f"experts stay whole, because {stack.whole}{no_head and f', and {no_head}'}; choose another method."
    )


def _stack(
    prefix: str,
    index: int,
    layer: nn.Module,
    record: ExpertsRecord,
    config: Any,
    unit: ExpertUnit,
    whole: str | None,
) -> Stack:
    name, module = f"{prefix}.{record.module}", layer.get_submodule(record.module)
    weights = [module._parameters.get(key) for key in (record.producer, "down_proj")]
    made = weights[0]
    plain = all(w is not None and type(w.data) is torch.Tensor and w.is_floating_point() for w in weights)
    if not plain or made is None:
        raise UsageError(
            f"{name} does not hold its experts as plain floating-point tensors; load the model unquantised "
            "and merge adapters first."
        )
    experts, rows, into = made.shape
    if record.transposed:
        rows, into = into, rows
    per_token = getattr(config, record.per_token_field)
    if isinstance(per_token, list):
        per_token = per_token[index]
    if not 0 < per_token <= experts:
        raise UsageError(
            f"the config says {record.per_token_field} {per_token}, and {name} holds {experts} experts; get "
            "the checkpoint again."
        )
    groups = [int(getattr(config, field) or 1) for field in record.group_fields or ()] or [1, 1]
    router = [owner._parameters.get(key) for owner, key in (entry_of(layer, path) for path in record.router)]
    entries = [p for p in router if p is not None]
    beside = [p for p in (attribute(layer, path) for path in record.beside) if p is not None]
    return Stack(
        name=name,
        layer=index,
        record=record,
        root=layer,
        module=module,
        entry=layer.get_submodule(record.entry),
        unit=unit,
        experts=experts,
        width=rows // 2 if record.gated else rows,
        hidden_size=into,
        per_token=int(per_token),
        router_entries=sum(p.numel() for p in entries) // experts,
        router_width=entries[0].numel() // experts,
        beside=sum(p.numel() for p in beside),
        maps_beside=sum(p.numel() for p in beside if p.ndim > 1),
        groups=groups[0],
        groups_per_token=groups[1],
        whole=whole,
    )


def entry_of(root: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that has a tensor or an attribute, and its name there."""
    owner, _, key = path.rpartition(".")
    return root.get_submodule(owner), key
