"""Watch the experts of a layer in a pass: what they are given, and what they add.

Knows nothing of methods.
"""

from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

from probeprune.errors import UsageError
from probeprune.model.experts import Stack
from probeprune.model.forwards import temporary_hooks


class Routing:
    """What the experts of a layer are given in a pass, and what they add.

    Attributes:
        given: what their module is called with.
        added: the sum of what they add for each token (tokens, d), float32.
    """

    given: tuple[torch.Tensor, ...]
    added: torch.Tensor

    def __init__(self, stack: Stack) -> None:
        self.stack = stack

    def beside(self, out: torch.Tensor) -> torch.Tensor:
        """What else reaches the layer's output `out` (batch, length, d): (tokens, d), float32."""
        return out.flatten(0, -2).float() - self.added

    def parts(self, lacking: torch.Tensor) -> torch.Tensor:
        """What the output of each of a token's experts is to gain, for them to gain `lacking` (tokens, d)
        together: (tokens, d), the same for all of them."""
        if self.stack.record.scales_input:
            return lacking / self.stack.per_token
        total = self.given[2].float().sum(-1, keepdim=True)
        return torch.where(total > 0, lacking / total, 0.0)  # a weight may be too small for the dtype


class _Reached(Exception):
    """Stops a forward pass in front of the experts."""


@contextmanager
def routing(stack: Stack, stop: bool = False) -> Iterator[Routing]:
    """Watch the experts in the pass inside the context.

    With `stop`, the pass ends in front of them and leaves the context; nothing is added then. Raises
    `UsageError` where the model does not call the module that holds them.
    """
    seen = Routing(stack)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.given = (*args, *kwargs.values())
        if stop:
            raise _Reached

    def after(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        if stack.record.scales_input:
            output = output.view(stack.experts, -1, output.shape[-1]).sum(0)
        seen.added = output.flatten(0, -2).float().clone()

    def register() -> Iterator[Any]:
        yield stack.module.register_forward_pre_hook(before, with_kwargs=True)
        yield stack.module.register_forward_hook(after)

    with temporary_hooks(register()), suppress(_Reached):
        yield seen
    if not hasattr(seen, "given"):
        raise uncalled_experts(stack)


def uncalled_experts(stack: Stack) -> UsageError:
    """The error for a stack whose module is never called, though its weights may be used."""
    return UsageError(
        f"the model does not call the module {stack.name}; switch off the fused kernel that takes its place."
    )


def routed_tokens(
    stack: Stack, given: Sequence[torch.Tensor], only: Container[int] | None = None
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """The tokens of each expert that has some, from what the module of the experts is given.

    Args:
        stack: the experts.
        given: what its module's forward is called with.
        only: the experts that are asked for; None for all.

    Yields:
        The expert, the indices of its tokens (tokens,), its inputs (tokens, hidden size), and the router's
        weights for them (tokens,); None where the weights are in the inputs already.
    """
    if stack.record.scales_input:  # rows expert by expert, zero for tokens of others
        rows = given[0].view(stack.experts, -1, stack.hidden_size)
        for expert, own in enumerate(rows):
            token = (own.abs().amax(-1) > 0).nonzero().flatten()
            if len(token) and (only is None or expert in only):
                yield expert, token, own[token], None
        return
    x, index, weights = given[:3]
    for expert in index.unique().tolist():
        if only is None or expert in only:
            token, place = (index == expert).nonzero(as_tuple=True)
            yield expert, token, x[token], weights[token, place]
