"""Which weights an attached method holds, by storage, so that two models on the same storage are noticed."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch

from probeprune.errors import UsageError

_HELD: "weakref.WeakValueDictionary[int, Any]" = weakref.WeakValueDictionary()
"""Handles by the address of the storage that each holds."""


def claim(handle: object, weights: Iterable[torch.Tensor]) -> None:
    """Record that `handle` holds these weights. Raises `UsageError`, and records none, where another handle
    holds some of them."""
    addresses = {_address(w) for w in weights if not w.is_meta and w.numel()}
    if any(_HELD.get(a) not in (None, handle) for a in addresses):
        raise UsageError(
            "these weights are shared with another model that has a method attached; detach that one first."
        )
    for address in addresses:
        _HELD[address] = handle


def release(handle: object) -> None:
    """Release everything that `handle` holds."""
    for address in [a for a, holder in _HELD.items() if holder is handle]:
        del _HELD[address]


def _address(weight: torch.Tensor) -> int:
    return weight.untyped_storage().data_ptr()
