"""What an attached model refuses to others, before anything is wrong."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from probeprune.errors import UsageError
from probeprune.model.blocks import Block
from probeprune.model.forwards import replace_method
from probeprune.model.narrow_linear import refuse_to_load


def refuse_loading(model: nn.Module, names: Iterable[str]) -> list[Callable[[], None]]:
    """Refuse state dicts at every module that contains one of those named: a module loads before its
    children, so nothing has been loaded then. Returns functions that undo it."""
    parents = {name.rpartition(".")[0] for name in names}
    parents |= {p[:i] for p in parents for i, c in enumerate(p) if c == "."}
    return [
        model.get_submodule(name).register_load_state_dict_pre_hook(refuse_to_load).remove
        for name in sorted(parents | {""} if parents else ())
    ]


def refuse_continuous_batching(model: nn.Module) -> Callable[[], None]:
    """Refuse continuous batching where it starts; within it, errors go to a log. Returns a function that
    undoes it."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise UsageError(
            "continuous batching does not run under an attached method; use generate, or prune the model "
            "with one width for all layers (with_equal_widths)."
        )

    return replace_method(model, "init_continuous_batching", refuse)


Place = tuple[dict[str, nn.Module | None], str, nn.Module, str]
"""Where a linear map is: the children of its parent, its name there, the map, its path."""


def places_of(model: nn.Module, blocks: Sequence[Block]) -> list[Place]:
    """The places of all linear maps of the blocks."""
    places: list[Place] = []
    for m in (m for b in blocks for m in b.members):
        parent, _, key = m.name.rpartition(".")
        places.append((model.get_submodule(parent)._modules, key, m.linear, m.name))
    return places


def check_places(places: Iterable[Place]) -> None:
    """Raise `UsageError` where another module is in the place of a map."""
    for modules, key, linear, name in places:
        if modules[key] is not linear:
            raise UsageError(
                f"{name} was replaced by a {type(modules[key]).__name__} while a method is attached; "
                "detach the method first."
            )
