"""Saliences: scores of every row and column of the blocks' linear maps, from the gradient of the loss.

Samples are processed one by one, a layer at a time. Each layer is differentiated in float32, whatever the
dtype of the model: gradients of narrower dtypes lose bits, and CPUs without units for them take many times
longer. Memory holds one layer and its gradients in float32, and the activations of one sample in it. Knows
nothing of units or ratios.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import nn

from probeprune.algebra.precision import exact
from probeprune.calibration.backward import Loss, backward_by_layer, backward_bytes
from probeprune.calibration.unfinished import Unfinished, resumed
from probeprune.errors import UsageError, unknown
from probeprune.model.blocks import Member, find_blocks
from probeprune.model.experts import ExpertMap, find_stacks
from probeprune.model.identity import content_file
from probeprune.model.passes import check_eval, token_windows
from probeprune.processes import shares
from probeprune.progress import Progress, silent
from probeprune.strategies.criteria import CRITERIA, Criterion, Gradients, Settled

_FORMAT = 2


@exact()
def saliences(
    model: nn.Module,
    windows: torch.Tensor,
    criterion: str = "param_first",
    *,
    gradients: Gradients | None = None,
    seed: int = 0,
    experts: bool = False,
    cache: Path | None = None,
    progress: Progress = silent,
) -> dict[str, torch.Tensor]:
    """Salience of every row of the blocks' producers and every column of their consumers.

    The gradient is that of the mean next-token loss over all windows.

    Args:
        model: a supported causal LM in eval mode, nothing attached; its layers may be offloaded.
        windows: LongTensor (count, length) of token ids, length at least 2.
        criterion: a key of `CRITERIA`.
        gradients: rank and number of the random matrices that `lora-guided` averages over; None for the
            published settings.
        seed: seed of these matrices.
        experts: take those of a mixture of experts too.
        cache: folder for results, stored by content; None stores nothing.
        progress: called with ("gradients", windows done over all layers, windows times layers).

    Returns:
        Float32 tensors by the name of the linear map: (out_features,) for a producer, (in_features,) for a
        consumer. Of experts by the name of the tensor, with one row for each expert.

    Raises:
        UsageError: unsupported model, unknown criterion, windows too short or too long.
        FloatingPointError: a NaN or infinite loss or gradient (float16 overflows easily).
    """
    if criterion not in CRITERIA:
        raise UsageError(unknown("criterion", criterion, CRITERIA))
    rule = CRITERIA[criterion]
    settings = gradients or rule.gradients
    windows = token_windows(model, windows)
    if windows.shape[1] < 2:
        raise UsageError("gradients need windows of at least 2 tokens: one to read, one to predict.")
    check_eval(model, "gradients for pruning need")
    blocks = find_blocks(model)
    stacks = find_stacks(model) if experts else []
    drawn = (settings.rank, settings.draws, seed) if rule.draws else ()
    drawn = (*drawn, "experts") if stacks else drawn
    path = content_file(cache, model, windows, "saliences", _FORMAT, criterion, *drawn)

    def take(kept: Unfinished) -> dict[str, torch.Tensor]:
        @contextmanager
        def visit(layer: int) -> Iterator[Callable[[int], None]]:
            here: dict[str, Member | ExpertMap] = {
                m.name: m for b in blocks if b.layer == layer for m in b.members
            }
            maps = [m for s in stacks if s.layer == layer for m in s.maps]
            here |= {m.name: m for m in maps}
            means = _GradientMeans(here, rule, len(windows))
            with _differentiable(means):
                yield means.next_sample
            shares.pool([means])
            found = means.saliences(settings, seed)
            for tensor, own in groupby(maps, lambda m: m.tensor):
                found[tensor] = torch.stack([found.pop(m.name) for m in own])
            kept.results |= found

        loss = _mean_loss(windows)
        backward_by_layer(model, windows, loss, visit, "gradients", progress, kept=kept, wide=True)
        names = [m.name for b in blocks for m in b.members]
        names += dict.fromkeys(m.tensor for s in stacks for m in s.maps)
        return {name: kept.results[name] for name in names}

    return resumed(path, "saliences", model, take, states=backward_bytes(model, windows))


def _mean_loss(windows: torch.Tensor) -> Loss:
    """The mean next-token loss of each window."""

    def loss(window: int, first: int, logits: torch.Tensor) -> torch.Tensor:
        targets = windows[window, first + 1 : first + 1 + len(logits)].to(logits.device)
        summed = nn.functional.cross_entropy(logits[: len(targets)], targets, reduction="sum")
        return summed / (windows.shape[1] - 1)

    return loss


class _GradientMeans:
    """Running averages, over samples, of the tensors that a criterion observes of the members' gradients."""

    def __init__(self, members: dict[str, Member | ExpertMap], criterion: Criterion, samples: int) -> None:
        self.members, self.criterion, self.samples = members, criterion, samples
        self.sample = shares.own(samples).start
        self._means: dict[str, list[torch.Tensor]] = {}

    def next_sample(self, done: int) -> None:
        """Called behind each sample."""
        self.sample = done + 1

    def add(self, name: str, gradient: torch.Tensor) -> None:
        if not torch.isfinite(gradient).all():
            raise FloatingPointError(
                f"the gradient of {name} is NaN or infinite at calibration window {self.sample}; use float32 "
                "or bfloat16."
            )
        member = self.members[name]
        observed = self.criterion.observe(member.oriented(gradient).float(), member)
        if name in self._means:
            for mean, value in zip(self._means[name], observed, strict=True):
                mean.add_(value, alpha=1 / self.samples)
        else:
            self._means[name] = [value / self.samples for value in observed]

    @torch.no_grad()
    def pool(self, add_up: Callable[..., None]) -> None:
        """Add what the other processes have of their samples."""
        for name, m in self.members.items():
            if name not in self._means:  # this process has no sample
                nothing = torch.zeros_like(m.weight, dtype=torch.float32)
                self._means[name] = [x.zero_() for x in self.criterion.observe(nothing, m)]
            add_up(*self._means[name])

    @torch.no_grad()
    def saliences(self, gradients: Gradients, seed: int) -> dict[str, torch.Tensor]:
        """Saliences of every member. Frees the averages of each member once it is done."""
        return {
            name: self.criterion.salience(
                Settled(self._means.pop(name), m, m.weight.float(), gradients, seed)
            )
            for name, m in self.members.items()
        }


@contextmanager
def _differentiable(means: _GradientMeans) -> Iterator[None]:
    """Require gradients of the members' weights alone; pass each gradient on and free it at once. A tensor
    of experts is the weight of all of them."""
    weights: dict[str, Any] = {}
    owners: dict[str, list[str]] = {}
    for name, m in means.members.items():
        own = m.tensor if isinstance(m, ExpertMap) else name
        owners.setdefault(own, []).append(name)
        weights[own] = m.stack.module._parameters[m.key] if isinstance(m, ExpertMap) else m.linear.weight
    earlier = {name: w.grad for name, w in weights.items()}
    hooks: list[Any] = []

    def taker(name: str) -> Callable[[torch.Tensor], None]:
        def hook(p: torch.Tensor) -> None:
            gradient, p.grad = p.grad, None
            assert gradient is not None
            if gradient.ndim == 2:
                means.add(name, gradient)
                return
            for own, part in zip(owners[name], gradient, strict=True):
                means.add(own, part)

        return hook

    try:
        for name, weight in weights.items():
            weight.grad = None
            weight.requires_grad_(True)
            hooks.append(weight.register_post_accumulate_grad_hook(taker(name)))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for name, weight in weights.items():
            weight.requires_grad_(False)
            weight.grad = earlier[name]
