"""Saliences: what the loss's gradient on calibration text says about every row and column of a block's maps.

Samples go through one by one and their gradients are added up in float32, so memory is the model, one
gradient of its blocks, and one sample's activations. Knows nothing of units or ratios.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import nn

from probeprune.errors import UsageError
from probeprune.files import cached_tensors
from probeprune.model.blocks import Member, find_blocks
from probeprune.model.passes import check_eval, check_windows
from probeprune.provenance import content_key

Criterion = Literal["param_first", "vectorize", "param_second", "param_mix", "lora-guided"]
"""What one row or column counts, of a weight `w` with gradient `g` (sums over the row or column):

- `param_first`: `sum |w g|`; `vectorize`: `|sum w g|` (LLM-Pruner, equation 3 and its vector-wise form).
- `param_second`: `sum |w A w|`, `param_mix`: `sum |w g - w A w / 2|`, A the mean of squared per-sample
  gradients (LLM-Pruner, equation 5, its Hessian's diagonal).
- `lora-guided`: `sum |(dB A) w|`, LoRAPrune's equation 8 at its first step, where B is zero: `dB = g A^T`.
"""

_FORMAT = 1


@dataclass(frozen=True)
class Gradients:
    """Whose gradients are taken, and how a unit's parts are put together.

    Raises `UsageError` for sizes below one or an unknown reduction.
    """

    windows: int = 10
    """Windows of calibration text (both published codes take 10)."""
    length: int = 64
    """Tokens a window (LLM-Pruner 64, LoRAPrune 512)."""
    reduction: Literal["sum", "mean", "max", "prod"] = "sum"
    """Over the linear maps a unit has a part in (Taylor criteria)."""
    rank: int = 8
    """Of the random matrix A (`lora-guided`)."""
    draws: int = 8
    """How many A are drawn and averaged over (`lora-guided`; the published code draws one)."""

    def __post_init__(self) -> None:
        if self.windows < 1 or self.length < 2 or self.rank < 1 or self.draws < 1:
            raise UsageError("gradients need at least 1 window of 2 tokens, 1 draw and rank 1.")
        if self.reduction not in ("sum", "mean", "max", "prod"):
            raise UsageError(f"unknown reduction {self.reduction!r}; choose sum, mean, max or prod.")


def saliences(
    model: nn.Module,
    windows: torch.Tensor,
    criterion: Criterion = "param_first",
    *,
    rank: int = 8,
    draws: int = 8,
    seed: int = 0,
    cache: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, torch.Tensor]:
    """Salience of every row of the blocks' producers and every column of their consumers.

    The gradient is that of the mean next-token loss over all windows.

    Args:
        model: a supported causal LM in eval mode, nothing attached. Its gradients are cleared.
        windows: LongTensor (count, length) of token ids, length at least 2.
        criterion: see `Criterion`.
        rank, draws, seed: of the random matrices that `lora-guided` averages over.
        cache: a folder to keep results in, by content; None keeps nothing.
        progress: called with (windows done, windows in all).

    Returns:
        By the linear map's name a float32 tensor: (out_features,) for a producer, (in_features,) for a
        consumer.

    Raises:
        UsageError: unsupported model, unknown criterion, windows too short or too long.
        FloatingPointError: a NaN or infinite loss or gradient (float16 overflows easily).
    """
    if criterion not in get_args(Criterion):
        raise UsageError(f"unknown criterion {criterion!r}; choose one of {', '.join(get_args(Criterion))}.")
    check_windows(model, windows)
    if windows.shape[1] < 2:
        raise UsageError("gradients need windows of at least 2 tokens: one to read, one to predict.")
    check_eval(model, "gradients for pruning need")
    members = {m.name: m for block in find_blocks(model) for m in block.members}
    path = None
    if cache is not None:
        extra = (rank, draws, seed) if criterion == "lora-guided" else ()
        path = cache / f"{content_key(model, windows, 'saliences', _FORMAT, criterion, *extra)}.safetensors"
    report = progress or (lambda done, total: None)

    def take() -> dict[str, torch.Tensor]:
        taken = _Taken(members, criterion, len(windows))
        _go_back(model, windows, taken, report)
        return taken.reduce(rank, draws, seed)

    return cached_tensors(path, take)


def _go_back(
    model: nn.Module, windows: torch.Tensor, taken: "_Taken", report: Callable[[int, int], None]
) -> None:
    """One backward pass a window."""
    with torch.inference_mode(False), _differentiable(model, taken.members, taken.add):
        for done, window in enumerate(windows.clone()):
            report(done, len(windows))
            taken.sample = done
            ids = window[None].to(next(model.parameters()).device)
            with torch.enable_grad():
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
                if not torch.isfinite(loss):
                    raise FloatingPointError(
                        f"the loss of calibration window {done} is NaN or infinite; use float32 or bfloat16."
                    )
                loss.backward()
        report(len(windows), len(windows))


class _Taken:
    """Gradients of the members' weights, added up as samples come."""

    def __init__(self, members: dict[str, Member], criterion: Criterion, samples: int) -> None:
        self.members, self.criterion, self.samples = members, criterion, samples
        self.sample = 0
        self.gradient: dict[str, torch.Tensor] = {}
        self.squares: dict[str, torch.Tensor] = {}
        """param_mix: A, as large as the gradient; param_second: `w A w` summed already."""

    def add(self, name: str, gradient: torch.Tensor) -> None:
        if not torch.isfinite(gradient).all():
            raise FloatingPointError(
                f"the gradient of {name} is NaN or infinite at calibration window {self.sample}; use float32 "
                "or bfloat16."
            )
        g = gradient.float()
        m = self.members[name]
        if self.criterion == "param_second":
            _add(
                self.squares, name, _reduced((m.linear.weight.detach().float() * g).square(), m), self.samples
            )
            return
        _add(self.gradient, name, g, self.samples)
        if self.criterion == "param_mix":
            _add(self.squares, name, g * g, self.samples)

    @torch.no_grad()
    def reduce(self, rank: int, draws: int, seed: int) -> dict[str, torch.Tensor]:
        if self.criterion == "param_second":
            return self.squares
        result = {}
        for name, m in self.members.items():
            g, w = self.gradient.pop(name), m.linear.weight.detach().float()
            if self.criterion == "param_first":
                result[name] = _reduced((w * g).abs_(), m)
            elif self.criterion == "vectorize":
                result[name] = _reduced(w * g, m).abs_()
            elif self.criterion == "param_mix":
                second = w * self.squares.pop(name) * w
                result[name] = _reduced((w * g - 0.5 * second).abs_(), m)
            else:
                result[name] = sum(
                    _reduced(((g @ a.T) @ a * w).abs_(), m) for a in _lora_a(name, w, rank, draws, seed)
                ) / torch.tensor(float(draws))
        return result


def _add(into: dict[str, torch.Tensor], name: str, value: torch.Tensor, samples: int) -> None:
    if name in into:
        into[name].add_(value, alpha=1 / samples)
    else:
        into[name] = value / samples


def _reduced(x: torch.Tensor, member: Member) -> torch.Tensor:
    """Sum over each row of a producer or each column of a consumer."""
    return x.sum(1 - member.axis)


def _lora_a(name: str, weight: torch.Tensor, rank: int, draws: int, seed: int) -> Iterator[torch.Tensor]:
    """LoRA's A (rank, in_features) as PEFT draws it: Kaiming-uniform with a = sqrt(5)."""
    own = int.from_bytes(hashlib.blake2b(f"{seed} {name}".encode(), digest_size=7).digest(), "little")
    generator = torch.Generator().manual_seed(own)
    bound = 1 / math.sqrt(weight.shape[1])
    for _ in range(draws):
        a = torch.empty(rank, weight.shape[1]).uniform_(-bound, bound, generator=generator)
        yield a.to(weight.device)


@contextmanager
def _differentiable(
    model: nn.Module, members: dict[str, Member], take: Callable[[str, torch.Tensor], None]
) -> Iterator[None]:
    """Only the members' weights ask for gradients; each is handed to `take` and freed as it comes."""
    parameters, hooks = list(model.parameters()), []

    def taker(name: str) -> Callable[[torch.Tensor], None]:
        def hook(p: torch.Tensor) -> None:
            gradient, p.grad = p.grad, None
            assert gradient is not None
            take(name, gradient)

        return hook

    with weights_at_rest(model):
        try:
            for p in parameters:
                p.grad = None
            for name, m in members.items():
                m.linear.weight.requires_grad_(True)
                hooks.append(m.linear.weight.register_post_accumulate_grad_hook(taker(name)))
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for p in parameters:
                p.grad = None


@contextmanager
def weights_at_rest(model: nn.Module) -> Iterator[None]:
    """No weight asks for a gradient inside, unless told to there."""
    asked = {p: p.requires_grad for p in model.parameters()}
    try:
        for p in asked:
            p.requires_grad_(False)
        yield
    finally:
        for p, wanted in asked.items():
            p.requires_grad_(wanted)
