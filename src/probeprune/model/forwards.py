"""Change how a module runs for a while, and put it back exactly as it was.

Knows nothing of models or of why a module is changed.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> Callable[[], None]:
    """Replace `module.forward`; see `replace_method`."""
    return replace_method(module, "forward", forward)


def replace_method(module: nn.Module, name: str, method: Callable[..., Any]) -> Callable[[], None]:
    """Replace a method of one module and return a function that undoes it.

    A module may already have one in its instance dictionary: accelerate puts a `forward` there. Undoing
    restores that one; without one it removes ours, so that the class's own method shows again. Where others
    have put theirs in place of ours meanwhile, theirs stays.
    """
    had_one, previous = name in module.__dict__, module.__dict__.get(name)
    module.__dict__[name] = method

    def undo() -> None:
        if module.__dict__.get(name) is not method:
            return
        if had_one:
            module.__dict__[name] = previous
        else:
            del module.__dict__[name]

    return undo


@contextmanager
def temporary_hooks(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove hooks when the context ends.

    Args:
        handles: what torch returned on registration. From a generator that registers as it goes, the first
            hooks are removed even if a later one cannot be registered.
    """
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield
