"""What passes through the blocks of a layer while it runs: their residual, coupled activation and output."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from probeprune.blocks import Block


class Seen:
    """What a forward pass of a layer shows of one block."""

    residual: torch.Tensor
    z: torch.Tensor
    output: torch.Tensor


class _Enough(Exception):
    """What was to be seen has been seen."""


@contextmanager
def watching(blocks: Sequence[Block], until: Block | None = None) -> Iterator[dict[str, Seen]]:
    """Note, by block kind, the residual in front of a layer's blocks and what passes their consumers.

    With `until` the pass, and the context with it, ends behind that block's consumer: what would come later
    is not looked at.
    """
    seen: dict[str, Seen] = {b.kind: Seen() for b in blocks}
    hooks: list[RemovableHandle] = []
    try:
        for block in blocks:
            hooks += _watch(block, seen[block.kind])
        if until is not None:
            hooks.append(until.consumer.register_forward_hook(_stop))
        with suppress(_Enough):
            yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _stop(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
    raise _Enough


def _watch(block: Block, seen: Seen) -> list[RemovableHandle]:
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.residual = args[0] if args else kwargs["hidden_states"]

    def after(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        seen.z, seen.output = args[0], output

    front = block.entry if block.norm is None else block.norm
    return [
        front.register_forward_pre_hook(before, with_kwargs=True),
        block.consumer.register_forward_hook(after),
    ]
