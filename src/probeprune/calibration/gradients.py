"""Saliences: scores of every row and column of the blocks' linear maps, from the gradient of the loss.

Samples are processed one by one and their gradients averaged in float32, so memory holds the model, one
gradient of its blocks, and the activations of one sample. Knows nothing of units or ratios.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from probeprune.errors import UsageError, unknown
from probeprune.files import cached_tensors
from probeprune.model.blocks import Member, find_blocks
from probeprune.model.passes import check_eval, token_windows
from probeprune.progress import Progress, silent
from probeprune.provenance import content_key
from probeprune.strategies.criteria import CRITERIA, Criterion, Gradients, Settled

_FORMAT = 1


def saliences(
    model: nn.Module,
    windows: torch.Tensor,
    criterion: str = "param_first",
    *,
    gradients: Gradients | None = None,
    seed: int = 0,
    cache: Path | None = None,
    progress: Progress = silent,
) -> dict[str, torch.Tensor]:
    """Salience of every row of the blocks' producers and every column of their consumers.

    The gradient is that of the mean next-token loss over all windows.

    Args:
        model: a supported causal LM in eval mode, nothing attached. Its gradients are cleared.
        windows: LongTensor (count, length) of token ids, length at least 2.
        criterion: a key of `CRITERIA`.
        gradients: rank and number of the random matrices that `lora-guided` averages over; None for the
            published settings.
        seed: seed of these matrices.
        cache: folder for results, stored by content; None stores nothing.
        progress: called with ("gradients", windows done, windows in total).

    Returns:
        Float32 tensors by the name of the linear map: (out_features,) for a producer, (in_features,) for a
        consumer.

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
    members = {m.name: m for block in find_blocks(model) for m in block.members}
    path = None
    if cache is not None:
        drawn = (settings.rank, settings.draws, seed) if rule.draws else ()
        path = cache / f"{content_key(model, windows, 'saliences', _FORMAT, criterion, *drawn)}.safetensors"

    def take() -> dict[str, torch.Tensor]:
        means = _GradientMeans(members, rule, len(windows))
        _backward_passes(model, windows, means, progress)
        return means.saliences(settings, seed)

    return cached_tensors(path, take)


def _backward_passes(
    model: nn.Module, windows: torch.Tensor, means: "_GradientMeans", progress: Progress
) -> None:
    """One backward pass per window."""
    with torch.inference_mode(False), _differentiable(model, means.members, means.add):
        for done, window in enumerate(windows.clone()):
            progress("gradients", done, len(windows))
            means.sample = done
            ids = window[None].to(next(model.parameters()).device)
            with torch.enable_grad():
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
                if not torch.isfinite(loss):
                    raise FloatingPointError(
                        f"the loss of calibration window {done} is NaN or infinite; use float32 or bfloat16."
                    )
                loss.backward()
        progress("gradients", len(windows), len(windows))


class _GradientMeans:
    """Running averages, over samples, of the tensors that a criterion observes of the members' gradients."""

    def __init__(self, members: dict[str, Member], criterion: Criterion, samples: int) -> None:
        self.members, self.criterion, self.samples = members, criterion, samples
        self.sample = 0
        self._means: dict[str, list[torch.Tensor]] = {}

    def add(self, name: str, gradient: torch.Tensor) -> None:
        if not torch.isfinite(gradient).all():
            raise FloatingPointError(
                f"the gradient of {name} is NaN or infinite at calibration window {self.sample}; use float32 "
                "or bfloat16."
            )
        observed = self.criterion.observe(gradient.float(), self.members[name])
        if name in self._means:
            for mean, value in zip(self._means[name], observed, strict=True):
                mean.add_(value, alpha=1 / self.samples)
        else:
            self._means[name] = [value / self.samples for value in observed]

    @torch.no_grad()
    def saliences(self, gradients: Gradients, seed: int) -> dict[str, torch.Tensor]:
        """Saliences of every member. Frees the averages of each member once it is done."""
        return {
            name: self.criterion.salience(
                Settled(self._means.pop(name), m, m.linear.weight.detach().float(), gradients, seed)
            )
            for name, m in self.members.items()
        }


@contextmanager
def _differentiable(
    model: nn.Module, members: dict[str, Member], take: Callable[[str, torch.Tensor], None]
) -> Iterator[None]:
    """Require gradients of the members' weights only; pass each gradient to `take` and free it at once."""
    hooks: list[Any] = []
    earlier = {p: p.grad for p in model.parameters()}

    def taker(name: str) -> Callable[[torch.Tensor], None]:
        def hook(p: torch.Tensor) -> None:
            gradient, p.grad = p.grad, None
            assert gradient is not None
            take(name, gradient)

        return hook

    with weights_at_rest(model):
        try:
            for p in earlier:
                p.grad = None
            for name, m in members.items():
                m.linear.weight.requires_grad_(True)
                hooks.append(m.linear.weight.register_post_accumulate_grad_hook(taker(name)))
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for p, gradient in earlier.items():
                p.grad = gradient


@contextmanager
def weights_at_rest(model: nn.Module) -> Iterator[None]:
    """Switch off gradients of all weights inside the context, and restore the settings afterwards."""
    asked = {p: p.requires_grad for p in model.parameters()}
    try:
        for p in asked:
            p.requires_grad_(False)
        yield
    finally:
        for p, wanted in asked.items():
            p.requires_grad_(wanted)
