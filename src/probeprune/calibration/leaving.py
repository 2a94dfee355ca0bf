"""What a layer's output changes by when one of its experts leaves, and the router takes others in its place.

The model's own router says which experts take over, and with which weights: it runs once more, for the tokens
of each expert, without that expert's rows. Knows nothing of methods.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from probeprune.calibration.routing import routed_tokens, routing
from probeprune.errors import UsageError
from probeprune.model.experts import Stack
from probeprune.model.stack_cut import StackCut

TOKENS = 512
"""Number of tokens at a time."""


def exchange_moment(stack: Stack, x: torch.Tensor) -> torch.Tensor:
    """Products of changes and contributions, summed over tokens: (2 E, 2 E), float32, for E experts.

    First come the changes `delta_e = y - y_-e` of what the experts of a layer add, `y`, when expert `e` alone
    leaves and the router takes others, then the contributions `c_e`, router's weights included. Both are zero
    for tokens that are not the expert's: that some routers (Qwen2-MoE's, whose weights add up to less than 1)
    weight the experts of all other tokens a little more then is left out.

    Takes about the FLOPs of the experts that a token is sent to and of those that take over, and for each
    expert of a token one pass of the router and of what runs in front of it.

    Args:
        stack: the experts.
        x: inputs of the router and the experts (tokens, hidden size).

    Raises `UsageError` for a router that deals experts out to groups and has no correction of scores.
    """
    total = torch.zeros(2 * stack.experts, 2 * stack.experts, dtype=torch.float32, device=x.device)
    if stack.per_token == stack.experts:  # none can go
        return total
    for few in x.split(TOKENS):
        made = _scaled_inputs(stack, few) if stack.record.scales_input else _scaled_outputs(stack, few)
        index, changes, terms = made
        both = torch.cat([changes, terms], 1)  # (tokens, 2 k, d)
        places = torch.cat([index, index + stack.experts], 1)
        products = both @ both.mT
        flat = places[:, :, None] * len(total) + places[:, None, :]
        total.view(-1).index_add_(0, flat.flatten(), products.flatten())
    return total


def route(stack: Stack, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What the module of the experts is called with for some inputs (tokens, hidden size)."""
    with routing(stack, stop=True) as seen:
        stack.entry(x[None])
    return seen.given


@contextmanager
def _without(stack: Stack, expert: int) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """Have the router without one expert inside the context; gives what makes ids of those it says there."""
    cut = StackCut(stack)
    others = torch.arange(stack.experts, device=stack.device)
    if stack.groups == 1:
        others = others[others != expert]
        cut.keep_routes(others)
    elif not cut.forbid(expert):
        raise UsageError(
            f"the router of {stack.name} deals experts out to groups, and none of its numbers forbids one; "
            "use another importance of experts."
        )
    try:
        yield lambda index: others[index]
    finally:
        cut.restore()


_Made = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""The experts of each token (tokens, k), the changes when each leaves, and what each adds: (tokens, k, d)."""


def _scaled_outputs(stack: Stack, x: torch.Tensor) -> _Made:
    """Of a router whose weights multiply outputs: an expert is run once for a token, whoever leaves."""
    x, index, weights = route(stack, x)[:3]
    weights = weights.float()
    tokens, k = index.shape
    shares = torch.zeros(tokens, k, stack.experts, dtype=torch.float32, device=x.device)
    shares.scatter_add_(2, index[:, None].expand(-1, k, -1), weights[:, None].expand(-1, k, -1))
    for expert in index.unique().tolist():
        token, place = (index == expert).nonzero(as_tuple=True)
        with _without(stack, expert) as named:
            _, others, now = route(stack, x[token])[:3]
        taken = torch.zeros(len(token), stack.experts, dtype=torch.float32, device=x.device)
        shares[token, place] -= taken.scatter_add_(1, named(others), now.float())
    changes = torch.zeros(tokens, k, stack.hidden_size, dtype=torch.float32, device=x.device)
    terms = torch.zeros_like(changes)
    seen = (shares != 0).any(1)
    seen.scatter_(1, index, True)
    for expert in seen.any(0).nonzero().flatten().tolist():
        token = seen[:, expert].nonzero().flatten()
        out = stack.output(expert, stack.coupled(expert, x[token])).float()
        changes[token] += shares[token, :, expert, None] * out[:, None]
        own = (index[token] == expert) * weights[token]
        terms[token] += own[:, :, None] * out[:, None]
    return index, changes, terms


def _scaled_inputs(stack: Stack, x: torch.Tensor) -> _Made:
    """Of a router whose weights multiply inputs: what an expert adds has to be computed for each weight."""
    k, d = stack.per_token, stack.hidden_size
    index = torch.zeros(len(x), k, dtype=torch.long, device=x.device)
    terms = torch.zeros(len(x), k, d, dtype=torch.float32, device=x.device)
    filled = torch.zeros(len(x), dtype=torch.long, device=x.device)
    for expert, token, rows, _ in routed_tokens(stack, route(stack, x)):
        index[token, filled[token]] = expert
        terms[token, filled[token]] = stack.output(expert, stack.coupled(expert, rows)).float()
        filled[token] += 1
    whole = terms.sum(1)
    changes = torch.zeros_like(terms)
    for expert in index.unique().tolist():
        token, place = ((index == expert) & (terms != 0).any(2)).nonzero(as_tuple=True)
        if not len(token):
            continue
        with _without(stack, expert) as named:
            given = route(stack, x[token])[0].view(-1, len(token), d)
        left = whole[token]
        for other, rows in zip(named(torch.arange(len(given), device=x.device)).tolist(), given, strict=True):
            own = (rows.abs().amax(-1) > 0).nonzero().flatten()
            if len(own):
                left[own] -= stack.output(other, stack.coupled(other, rows[own])).float()
        changes[token, place] = left
    return index, changes, terms
