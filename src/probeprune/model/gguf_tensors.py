"""The tensors of a GGUF file and the modules of a model that hold the same numbers, in both directions."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from probeprune.model.gguf_architectures import Architecture, Order, Part, Width


@dataclass(frozen=True)
class Place:
    """One `Part` of an architecture in one layer, or outside of them."""

    name: str
    """The tensor's name without `.weight` or `.bias`."""
    part: Part
    """With module paths relative to the model."""
    layer: int | None
    """None outside of the layers."""


def places(architecture: Architecture, layers_path: str, layers: int) -> Iterator[Place]:
    """All places of an architecture, in the order in which a file has them.

    Args:
        architecture: the file's.
        layers_path: the path of the model's list of layers.
        layers: their number.
    """
    first, *last = architecture.ends
    yield Place(first.name, first, None)
    for layer in range(layers):
        for part in architecture.layer:
            modules = {f"{layers_path}.{layer}.{path}": rows for path, rows in part.modules.items()}
            yield Place(f"blk.{layer}.{part.name}", replace(part, modules=modules), layer)
    for part in last:
        yield Place(part.name, part, None)


@dataclass(frozen=True)
class Heads:
    """The heads of a layer's attention."""

    queries: int
    groups: int
    """Key-value heads."""
    size: int

    def sizes(self, hidden: int, mlp: int, vocabulary: int) -> Mapping[Width, int]:
        """The numbers of rows or columns that a part may have."""
        heads, groups = self.queries * self.size, self.groups * self.size
        return {
            "hidden": hidden,
            "heads": heads,
            "groups": groups,
            "qkv": heads + 2 * groups,
            "mlp": mlp,
            "two mlps": 2 * mlp,
            "head": self.size,
            "vocabulary": vocabulary,
        }


def arranged(rows: torch.Tensor, order: Order, heads: Heads) -> torch.Tensor:
    """A weight or bias as the model has it, in the order of the file (see `Order`)."""
    match order:
        case "query pairs" | "key pairs":
            count = heads.queries if order == "query pairs" else heads.groups
            return rows.unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2)
        case "by head":
            return rows.unflatten(0, (heads.queries, 3, -1)).transpose(0, 1).flatten(0, 2)
    return rows


def restored(rows: torch.Tensor, order: Order, heads: Heads) -> torch.Tensor:
    """The reverse of `arranged`."""
    match order:
        case "query pairs" | "key pairs":
            count = heads.queries if order == "query pairs" else heads.groups
            return rows.unflatten(0, (count, -1, 2)).transpose(1, 2).flatten(0, 2)
        case "by head":
            return rows.unflatten(0, (3, heads.queries, -1)).transpose(0, 1).flatten(0, 2)
    return rows


def written(place: Place, model: Any, kind: str, heads: Heads) -> torch.Tensor | None:
    """What a file holds of a model at a place, float32; None for a bias that it does not hold.

    Args:
        place: of the architecture that carries the model.
        model: the model.
        kind: `weight` or `bias`.
        heads: of the place's layer; any outside of the layers.
    """
    modules = [model.get_submodule(path) for path in place.part.modules]
    tensors = [getattr(module, kind, None) for module in modules]
    given = [t.detach().float() for t in tensors if t is not None]
    if not given:
        if kind == "bias" and place.part.bias == "always":
            weight = modules[0].weight
            return torch.zeros(weight.shape[0], device=weight.device)
        return None
    # Only maps without biases are put together.
    joined = given[0] if len(given) == 1 else torch.cat(given)
    shift = place.part.shift if kind == "weight" else 0.0
    return arranged(joined, place.part.order, heads) + shift
