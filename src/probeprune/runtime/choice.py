"""The choice of units under which a KV cache was filled, kept with the cache so that it can be continued."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from probeprune.errors import UsageError
from probeprune.model.blocks import Block
from probeprune.model.partition import Snapshot
from probeprune.model.passes import Pass, remember_length
from probeprune.strategies.widths import Prunable

_ATTRIBUTE = "_probeprune_choice"


@dataclass(eq=False)
class Choice:
    """The units that one prompt chose. Copies of a cache share it.

    Attributes:
        owner: identifies the attached method that made it.
        snapshots: of all blocks that follow the batch, while another choice is in view; None while this one
            is, or where it is lost because a pass failed.
        since_refresh: number of tokens since the last refresh, while another choice is in view.
    """

    owner: object
    snapshots: list[Snapshot] | None = None
    since_refresh: int = 0

    def __deepcopy__(self, memo: Any) -> "Choice":
        return self

    def __reduce__(self) -> Any:
        return Choice, (None,)  # in another process, no method owns it


def choice_of(cache: object, owner: object) -> Choice | None:
    """The choice of `owner` that a cache was filled under; None for a cache that others filled."""
    choice: Choice | None = getattr(cache, _ATTRIBUTE, None)
    return choice if choice is not None and choice.owner is owner else None


def mark(caches: Any, choice: Choice | None) -> None:
    """Record on every KV cache among `caches` the choice that filled it."""
    for cache in caches:
        if hasattr(cache, "get_seq_length"):
            setattr(cache, _ATTRIBUTE, choice)
            remember_length(cache)


def caches_of(started: Pass, output: Any) -> tuple[Any, ...]:
    """Everything in the arguments and the output of a pass that may be a KV cache."""
    parts = output if isinstance(output, tuple) else output.values() if isinstance(output, Mapping) else ()
    return started.cache, *parts


def check_layout(cache: Any, blocks: Sequence[Prunable], widths: Sequence[int], filled: bool = False) -> None:
    """Raise `UsageError` for a cache that was allocated, or filled, for a different number of heads."""
    what_to_do = (
        "it was filled under another method; run its prompt again"
        if filled
        else "let the first pass lay it out (no prefill_chunk_size with a static cache)"
    )
    layers = getattr(cache, "layers", ())
    for block, keep in zip(blocks, widths, strict=True):
        if not isinstance(block, Block) or block.kind != "attention" or block.layer >= len(layers):
            continue
        keys = getattr(layers[block.layer], "keys", None)
        heads = block.cached_heads(keep)
        if isinstance(keys, torch.Tensor) and keys.ndim == 4 and keys.shape[1] != heads:
            raise UsageError(
                f"the KV cache was laid out for {keys.shape[1]} key-value heads in {block.name}, which keeps "
                f"{heads}; {what_to_do}."
            )
