"""Which weights attached methods hold, by storage, so that two models on the same storage are noticed."""

from collections.abc import Iterable
from typing import Protocol
from weakref import WeakSet

import torch

from probeprune.errors import UsageError


class Holder(Protocol):
    """An attached method."""

    def weights(self) -> Iterable[torch.Tensor]:
        """The parameters that it holds now: a move or a cast gives a model others."""


_HOLDERS: "WeakSet[Holder]" = WeakSet()
"""Methods attached in this process."""


def claim(holder: Holder) -> None:
    """Record that `holder` holds its weights. Raises `UsageError`, and records nothing, where another one
    holds some of them."""
    # Asked now, not remembered: the memory of weights that are gone may serve another model.
    taken = {address for other in _HOLDERS if other is not holder for address in _addresses(other)}
    if taken & _addresses(holder):
        raise UsageError(
            "these weights are shared with another model that has a method attached; detach that one first."
        )
    _HOLDERS.add(holder)


def release(holder: Holder) -> None:
    """Release everything that `holder` holds."""
    _HOLDERS.discard(holder)


def _addresses(holder: Holder) -> set[int]:
    return {w.untyped_storage().data_ptr() for w in holder.weights() if not w.is_meta and w.numel()}
