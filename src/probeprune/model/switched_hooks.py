"""Hooks that can be taken off their modules for a while, and come back to their places among others.

A module without any hook is called straight; with one, torch goes the long way round, which takes longer than
many a product with one token. Knows nothing of what the hooks do.
"""

from collections.abc import Sequence
from typing import Any

from torch.utils.hooks import RemovableHandle


class SwitchedHooks:
    """Hooks that are on or off together; they are on until `switch` says otherwise.

    Hooks on one module that come and go at the same times belong into one such group: apart, they would lose
    their order.
    """

    def __init__(self) -> None:
        self.on = True
        self._hooks: list[_Hook] = []

    def add(self, hooks: Sequence[RemovableHandle]) -> None:
        """Take in some hooks, as torch returned them on registration, while all are on."""
        self._hooks += [_Hook(h) for h in hooks]

    def switch(self, on: bool) -> None:
        """Put the hooks on their modules, or take them off. Harmless where they are so already."""
        if on == self.on:
            return
        if not on:
            for hook in self._hooks:
                hook.find_place()
        for hook in self._hooks:
            hook.put_back() if on else hook.take_off()
        self.on = on

    def remove(self) -> None:
        """Remove the hooks for good."""
        for hook in self._hooks:
            hook.handle.remove()
        self._hooks = []


class _Hook:
    """One hook. It lies under its id in the dict that torch calls hooks from, and perhaps in further ones."""

    def __init__(self, handle: RemovableHandle) -> None:
        self.handle = handle
        self._values: list[tuple[Any, Any]] = []
        self._before: set[int] = set()

    def find_place(self) -> None:
        own: Any = self.handle
        keys = [*own.hooks_dict_ref()]
        self._before = set(keys[: keys.index(own.id)])

    def take_off(self) -> None:
        own: Any = self.handle
        self._values = [
            (d, d.pop(own.id)) for ref in (own.hooks_dict_ref, *own.extra_dict_ref) if own.id in (d := ref())
        ]

    def put_back(self) -> None:
        for place, value in self._values:
            place[self.handle.id] = value
        hooks: Any = self._values[0][0]
        for key in [k for k in hooks if k not in self._before and k != self.handle.id]:
            hooks.move_to_end(key)  # those that were registered behind it, before or meanwhile
        self._values = []
