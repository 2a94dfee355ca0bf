"""What an attached model refuses to others, before anything is wrong."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from probeprune.errors import UsageError
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
