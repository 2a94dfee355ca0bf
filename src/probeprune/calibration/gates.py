"""Gates: a scale in [0, 1] for every unit, learned with all weights frozen.

The dense model's own predictions are the goal: the loss is the KL divergence from them. The model is there
once; a pass without gates is the teacher. A budget says what leaves, so units compete: their scales come from
one score each by a soft threshold (`algebra/soft_threshold.py`), which hardens while the budget grows.
Continuous masks trained under a budget are those of L0 regularisation (Louizos et al., ICLR 2018), CoFi (Xia
et al., ACL 2022) and Sheared LLaMA (Xia et al., ICLR 2024); here the weights are frozen, no noise is drawn,
and the budget holds at every step in place of a penalty. Knows nothing of methods.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from probeprune.algebra.divergence import divergence, target
from probeprune.algebra.precision import exact
from probeprune.algebra.soft_threshold import soft_keep
from probeprune.calibration.backward import weights_at_rest
from probeprune.errors import UsageError
from probeprune.model.blocks import Block, uncalled_consumer
from probeprune.model.decoding import next_token_logits, vocabulary
from probeprune.model.forwards import temporary_hooks
from probeprune.model.offloading import device_of, is_offloaded
from probeprune.model.passes import check_eval, find_decoder, token_windows
from probeprune.processes import shares
from probeprune.progress import Progress, silent
from probeprune.strategies.gates import Gates
from probeprune.strategies.widths import Request, candidates

RAMP = 0.6
"""Share of the steps in which the budget grows to what is asked for."""
TEMPERATURES = (1.0, 0.1)
"""Of the soft threshold, at the first step and at the last; in between it falls by one factor a step."""
LOGITS = 1 << 24
"""Numbers in the logits that are in memory at once: 64 MiB in float32. A step holds a few such tensors."""


@dataclass(frozen=True)
class Budget:
    """Blocks whose units compete under one threshold."""

    blocks: Sequence[Block]
    parameters: float
    """What has to go of them in the end."""


def budgets(request: Request, widths: Sequence[int]) -> list[Budget]:
    """What has to go: of each block that has a width of its own, or of all that may lose units together.

    Args:
        request: the ratio, and which blocks may lose units; experts stay.
        widths: number of units that every block keeps; empty where that is left to the gates.
    """
    if widths:
        cut = zip(request.blocks, widths, strict=True)
        return [
            Budget([b], (b.units - w) * b.unit_parameters)
            for b, w in cut
            if isinstance(b, Block) and w < b.units
        ]
    together = [request.blocks[i] for i in candidates(request)[0]]
    parameters = request.ratio * sum(b.parameters for b in request.blocks)
    return [Budget([b for b in together if isinstance(b, Block)], parameters)]


@exact()
def learn_gates(
    model: nn.Module,
    windows: torch.Tensor,
    budgets: Sequence[Budget],
    start: Mapping[str, torch.Tensor],
    how: Gates,
    *,
    seed: int = 0,
    progress: Progress = silent,
) -> dict[str, torch.Tensor]:
    """Scores of the units of some blocks, learned under budgets of parameters.

    Where work is shared out, each process takes some windows of every step, and all have the same gates.

    Memory: the activations of one step (`how.batch_size` x `how.length` tokens, of one process) in all
    layers, as for training, but no gradient of a weight and no state of an optimiser beyond the gates'; and
    logits of a few tokens.

    Args:
        model: a supported causal LM in eval mode, in memory as a whole, nothing attached.
        windows: LongTensor (count, length) of token ids, at least `how.length` long.
        budgets: what leaves; of other blocks nothing does.
        start: scores of their units by block name (units,), of which the ranks count.
        how: settings of the training.
        seed: for the order of the windows.
        progress: called with (`gates`, steps done, steps in all).

    Returns:
        By block name (units,), float32 on the CPU: larger is more important, comparable within a budget.

    Raises:
        UsageError: a model that is not in memory as a whole, or windows too short.
        FloatingPointError: a loss or a gradient that is NaN or infinite.
    """
    if not budgets:
        return {}
    check_whole(model)
    check_eval(model, "gates need")
    pieces = _pieces(token_windows(model, windows), how.length)
    device = device_of(model)
    with torch.inference_mode(False), torch.enable_grad(), weights_at_rest(model):
        scores = [
            torch.cat([_logits_of_ranks(start[b.name]) for b in budget.blocks]).to(device)
            for budget in budgets
        ]
        for own in scores:
            own.requires_grad_(True)
        costs = [
            torch.cat([_full(b.units, b.unit_parameters) for b in budget.blocks]).to(device)
            for budget in budgets
        ]
        blocks = [b for budget in budgets for b in budget.blocks]
        adam = torch.optim.Adam(scores, lr=how.learning_rate, betas=(0.9, 0.99))
        generator = torch.Generator("cpu").manual_seed(seed)
        for step, batch in enumerate(_batches(pieces, how, generator)):
            progress("gates", step, how.steps)
            share, temperature = _schedule(step, how.steps)
            gates: dict[str, torch.Tensor] = {}
            for budget, own, cost in zip(budgets, scores, costs, strict=True):
                kept = soft_keep(own, cost, share * budget.parameters, temperature)
                gates |= _by_block(budget.blocks, kept)
            leaves = {name: g.detach().requires_grad_(True) for name, g in gates.items()}
            with shares.alike():
                loss = _backward(model, blocks, leaves, shares.own_rows(batch).to(device), batch.numel())
            found = [torch.zeros_like(g) if g.grad is None else g.grad for g in leaves.values()]
            shares.add_up(loss, *found)
            if not all(bool(torch.isfinite(t).all()) for t in (loss, *found)):
                raise FloatingPointError(
                    f"the loss of the gates, or its gradient, is NaN or infinite at step {step + 1} of "
                    f"{how.steps}; use float32 or bfloat16."
                )
            adam.zero_grad()
            grown = [(g, d) for g, d in zip(gates.values(), found, strict=True) if g.requires_grad]
            torch.autograd.backward([g for g, _ in grown], [d for _, d in grown])
            adam.step()
    progress("gates", how.steps, how.steps)
    learned: dict[str, torch.Tensor] = {}
    for budget, own in zip(budgets, scores, strict=True):
        learned |= _by_block(budget.blocks, own.detach().cpu())
    return {name: s.clone() for name, s in learned.items()}


def check_whole(model: nn.Module) -> None:
    """Raise `UsageError` for a model whose layers are not in memory all at once."""
    if is_offloaded(model):
        raise UsageError(
            "gates are trained by passes through the whole model, and its layers are offloaded; load it "
            "without offloading (a higher --memory), or choose another importance."
        )


def check_length(given: int, length: int) -> None:
    """Raise `UsageError` for calibration windows of fewer tokens than gates are trained on."""
    if given < length:
        raise UsageError(
            f"gates are trained on windows of {length} tokens, and calibration has {given}; give longer "
            "ones, or compose the method with gates=Gates(length=...)."
        )


def _pieces(windows: torch.Tensor, length: int) -> torch.Tensor:
    """The windows cut into pieces of `length` tokens; an incomplete last one of a window is left out."""
    check_length(windows.shape[1], length)
    return windows[:, : windows.shape[1] // length * length].reshape(-1, length)


def _batches(pieces: torch.Tensor, how: Gates, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """The windows of each step: all in a random order, and then again in another."""
    order: list[int] = []
    for _ in range(how.steps):
        while len(order) < how.batch_size:
            order += torch.randperm(len(pieces), generator=generator, device="cpu").tolist()
        yield pieces[order[: how.batch_size]]
        del order[: how.batch_size]


def _schedule(step: int, steps: int) -> tuple[float, float]:
    """The share of the budget that is asked for at a step, and the temperature."""
    grown = min((step + 1) / (RAMP * steps), 1.0)
    first, last = TEMPERATURES
    return 1 - (1 - grown) ** 3, first * (last / first) ** (step / max(steps - 1, 1))


def _logits_of_ranks(scores: torch.Tensor) -> torch.Tensor:
    """The logit of the share of a block's units that a unit is above: float32 (units,). Where a share leaves,
    it is the same from all blocks at the start."""
    ranks = scores.argsort(stable=True).argsort(stable=True)
    return ((ranks + 0.5) / len(scores)).logit().float()


def _full(count: int, value: float) -> torch.Tensor:
    return torch.full((count,), float(value), dtype=torch.float32, device="cpu")


def _by_block(blocks: Sequence[Block], values: torch.Tensor) -> dict[str, torch.Tensor]:
    names = [b.name for b in blocks]
    return dict(zip(names, values.split([b.units for b in blocks]), strict=True))


@torch.enable_grad()
def _backward(
    model: nn.Module,
    blocks: Sequence[Block],
    gates: Mapping[str, torch.Tensor],
    ids: torch.Tensor,
    tokens: int,
) -> torch.Tensor:
    """The divergence of some windows, summed over their tokens and divided by `tokens`, a scalar; adds its
    gradient to that of the gates."""
    total = torch.zeros((), dtype=torch.float32, device=ids.device)
    if not len(ids):  # this process has no window
        return total
    decoder: Callable[..., Any] = find_decoder(model)
    with torch.no_grad():
        wanted = decoder(input_ids=ids, use_cache=False)[0].flatten(0, 1)
    with gated(blocks, gates):
        hidden = decoder(input_ids=ids, use_cache=False)[0].flatten(0, 1)
    top = hidden.detach().requires_grad_(True)
    total += add_gradients(model, top, wanted, tokens)
    hidden.backward(top.grad)
    return total


@torch.enable_grad()
def add_gradients(model: nn.Module, top: torch.Tensor, wanted: torch.Tensor, tokens: int) -> torch.Tensor:
    """The divergence between the predictions from last hidden states (tokens, hidden), divided by `tokens`, a
    scalar; adds its gradient to that of `top`. The logits of a few tokens are in memory at a time.

    Args:
        model: the causal LM, for its output head.
        top: what is compared, with a gradient.
        wanted: the teacher's.
        tokens: what sums are divided by.
    """
    total = torch.zeros((), dtype=torch.float32, device=top.device)
    size = max(LOGITS // vocabulary(model), 1)
    for few, goal in zip(top.split(size), wanted.split(size), strict=True):
        with torch.no_grad():
            dense = target(next_token_logits(model, goal))
        part = divergence(next_token_logits(model, few), dense).sum() / tokens
        part.backward()
        total += part.detach()
    return total


@contextmanager
def gated(blocks: Sequence[Block], gates: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Multiply the coupled activation of each block by its units' gates while the context lasts."""
    called = set[str]()

    def scale(block: Block) -> Any:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            called.add(block.name)
            channels = gates[block.name].repeat_interleave(block.unit_width)
            return (args[0] * channels.to(args[0].device, args[0].dtype), *args[1:])

        return hook

    with temporary_hooks(b.consumer.register_forward_pre_hook(scale(b)) for b in blocks):
        yield
    for block in blocks:
        if block.name not in called:
            raise uncalled_consumer(block)
