"""A stack of experts cut to some of its units, for a while or for good. Knows nothing of scores or ratios."""

from typing import Any

import torch
from torch import nn

from probeprune.model.experts import Stack, entry_of


class StackCut:
    """A stack of which some units alone are there, until `restore`.

    The model's own forward runs on copies of what stays, which take its memory beside the original; a cut for
    good drops the original.
    """

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self._tensors: list[tuple[dict[str, Any], str, torch.Tensor]] = []
        self._counts: list[tuple[nn.Module, str, int]] = []

    @torch.no_grad()
    def keep(self, units: torch.Tensor) -> None:
        """Show these units alone.

        Args:
            units: ids, ascending: LongTensor (kept,) of experts, or (experts, kept) of each expert's
                channels.
        """
        assert not self._tensors
        stack, record = self.stack, self.stack.record
        if stack.unit == "expert":
            for key in list(stack.module._parameters):
                self._put(stack.module, key, 0, units)
            self.keep_routes(units)
            return
        rows = units
        if record.interleaved:
            rows = torch.stack([2 * units, 2 * units + 1], -1).flatten(1)
        elif record.gated:
            rows = torch.cat([units, units + stack.width], 1)
        out, into = (2, 1) if record.transposed else (1, 2)
        self._put(stack.module, record.producer, out, rows)
        self._put(stack.module, "down_proj", into, units)
        if record.biases:
            self._put(stack.module, f"{record.producer}_bias", 1, rows)
        self._count(record.widths, units.shape[1])

    @torch.no_grad()
    def keep_routes(self, experts: torch.Tensor) -> None:
        """Have the router know these experts alone, by ids, ascending: LongTensor (kept,)."""
        for path in self.stack.record.router:
            owner, key = entry_of(self.stack.root, path)
            self._put(owner, key, _expert_axis(_held(owner, key)), experts)
        self._count(self.stack.record.counts, len(experts))

    @torch.no_grad()
    def forbid(self, expert: int) -> bool:
        """Have the router never take an expert; False where it has no correction of scores to say so."""
        for path in self.stack.record.router:
            owner, key = entry_of(self.stack.root, path)
            if key.endswith("correction_bias"):
                held = _held(owner, key)
                axis = _expert_axis(held)
                self._put(owner, key, axis, torch.arange(held.shape[axis], device=held.device))
                _held(owner, key).select(axis, expert).fill_(float("-inf"))
                return True
        return False

    @torch.no_grad()
    def replace_consumers(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Give the experts that are shown another `down_proj`, behind `keep`.

        Args:
            weight: of each (experts, hidden size, channels).
            bias: of each (experts, hidden size); None leaves what is there.
        """
        assert self._tensors  # what is shown is a copy
        own: Any = self.stack.module._parameters["down_proj"]
        own.copy_(weight.mT if self.stack.record.transposed else weight)
        if bias is not None:
            every = torch.arange(self.stack.experts, device=bias.device)
            self._put(
                self.stack.module, "down_proj_bias", 0, every
            )  # channels leave it as it is: no copy yet
            beside: Any = self.stack.module._parameters["down_proj_bias"]
            beside.copy_(bias)

    def _put(self, owner: nn.Module, key: str, axis: int, index: torch.Tensor) -> None:
        """Put the entries of a tensor that stay in its place; an index (experts, n) differs by expert."""
        table: dict[str, Any] = owner._parameters if key in owner._parameters else owner._buffers
        old: torch.Tensor = table[key]
        index = index.to(old.device)
        if index.ndim == 1:
            made = old.detach().index_select(axis, index)
        else:
            shape = list(old.shape)
            shape[axis] = index.shape[1]
            view = index if old.ndim == 2 else index.unsqueeze(3 - axis)
            made = old.detach().gather(axis, view.expand(shape))
        self._tensors.append((table, key, old))
        parameter = isinstance(old, nn.Parameter)
        table[key] = nn.Parameter(made, requires_grad=old.requires_grad) if parameter else made

    def _count(self, paths: tuple[str, ...], number: int) -> None:
        for path in paths:
            owner, name = entry_of(self.stack.root, path)
            self._counts.append((owner, name, getattr(owner, name)))
            setattr(owner, name, number)

    def restore(self) -> None:
        """Put the same tensors back in their place, and what forward passes read of them."""
        for table, key, old in reversed(self._tensors):
            now: torch.Tensor = table[key]
            if (now.device, now.dtype) != (old.device, old.dtype):  # the model was moved or cast
                old.data = old.data.to(now.device, now.dtype)
            table[key] = old
        for owner, name, number in self._counts:
            setattr(owner, name, number)
        self.forget()

    def forget(self) -> None:
        """Make the cut permanent."""
        self._tensors, self._counts = [], []


def _held(owner: nn.Module, key: str) -> torch.Tensor:
    held: Any = getattr(owner, key)
    return held


def _expert_axis(tensor: torch.Tensor) -> int:
    """The axis with one entry per expert: the first, or the second where the first has a single entry."""
    return 1 if tensor.ndim > 1 and tensor.shape[0] == 1 and tensor.shape[1] > 1 else 0
