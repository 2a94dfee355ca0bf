"""Probe Pruning's own part: choose the probe, run it ahead, fuse it with history.

The paper's stages by name: `choose` (residual importance), `run_ahead` (probing), `fuse` (importance-scaled
fusion with history). Scoring is `importance.py`, the cut `partition.py`, the loop over a model's blocks
`dynamic.py`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from probeprune.algebra.moments import History, Tokens
from probeprune.errors import UsageError
from probeprune.model.blocks import Block
from probeprune.model.cost import block_flops
from probeprune.model.forwards import replaced_forward

Fusion = Literal["importance", "fixed", "none"]
Pick = Literal["residual", "even"]


@dataclass(frozen=True)
class Probe:
    """How a batch is probed. Defaults are Probe Pruning's (ICLR 2025, section 5 and appendix).

    Raises `UsageError` for shares outside (0, 1].
    """

    tokens: float = 0.5
    """Share of the batch's positions in the probe; its width counts, padding too."""
    samples: float = 0.05
    """Share of the batch's samples in the probe (at least one)."""
    min_tokens: int = 2
    """A probe never has fewer positions (where the batch has as many)."""
    min_size: int = 0
    """A probe never has fewer tokens in all (where the batch has as many): it takes more positions."""
    pick: Pick = "residual"
    """`residual`: positions and samples of the greatest residual importance, as published; `even`: evenly
    spaced ones, which tell more of what a batch is like on the whole: for a refit to it (docs/best.md)."""
    keep_first_below: int = 10
    """A probe picked by residual importance of at most this many positions always has the first one, the
    attention sink."""
    fusion: Fusion = "importance"
    """`importance`: each part weighted by its own share; `fixed`: by `history_share`; `none`: probe alone."""
    history_share: float = 0.5
    """Weight of history under `fixed` fusion."""
    decay: float = 0.99
    """History keeps this share of itself at every batch."""
    reuse: int = 0
    """Tokens that one choice serves at least: smaller batches share it, since on their own they would not
    earn what probing costs (docs/choices.md; the method `probe-reuse` takes 1024). 0 probes every batch, as
    published. A prompt that fills a cache handed in, as in `generate`, is always probed: its choice serves
    the text to come."""
    refresh: int = 0
    """While decoding, choose the channels of MLPs anew every so many tokens; 0 keeps those of the prompt.
    Such a step runs MLPs dense and is its own probe; the steps between move history. Heads stay: the cache
    holds those of the prompt. A sequence that has ended goes on counting: what `generate` feeds it looks like
    any other token."""
    parallel: bool = False
    """Probe a block beside the one before it, from the residual in front of that one: the published
    asynchronous variant. On CUDA the two overlap, on a second stream (never run so far: no GPU was at hand);
    elsewhere one runs after the other, at no gain. The model's first block, and the first attention block of
    each type of layer, are probed in their turn."""

    def __post_init__(self) -> None:
        for name in ("tokens", "samples"):
            if not 0 < getattr(self, name) <= 1:
                raise UsageError(f"probe {name}={getattr(self, name):g} must lie in (0, 1].")
        for name in ("history_share", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"probe {name}={getattr(self, name):g} must lie in [0, 1].")
        for name in ("min_size", "reuse", "refresh"):
            if getattr(self, name) < 0:
                raise UsageError(f"probe {name}={getattr(self, name)} must be a number of tokens, 0 or more.")
        for name, known in (("fusion", get_args(Fusion)), ("pick", get_args(Pick))):
            if getattr(self, name) not in known:
                raise UsageError(f"unknown {name} {getattr(self, name)!r}; choose one of {', '.join(known)}.")


@dataclass(frozen=True)
class Selection:
    """The probe of one block and batch: which samples and columns, ascending LongTensors."""

    samples: torch.Tensor
    tokens: torch.Tensor


def probe_size(probe: Probe, batch: int, length: int) -> tuple[int, int]:
    """How many samples and positions of a (batch, length) batch the probe takes."""
    samples = max(_ceil(probe.samples * batch), 1)
    least = max(probe.min_tokens, _ceil(probe.min_size / samples))
    return samples, min(max(_ceil(probe.tokens * length), least), length)


def probe_flops(blocks: Sequence[Block], kept: Sequence[int], probe: Probe, batch: int, length: int) -> float:
    """FLOPs of probing on a batch of (batch, length) tokens.

    Blocks that keep all their units are not probed. Where several batches share a choice (`Probe.reuse`),
    the cost of one probe is spread evenly over them.
    """
    samples, tokens = probe_size(probe, batch, length)
    batches_per_choice = max(math.ceil(probe.reuse / (batch * length)), 1)
    flops = sum(
        block_flops(b, b.units, samples, tokens, consumer=False)
        for b, k in zip(blocks, kept, strict=True)
        if k < b.units
    )
    return flops / batches_per_choice


def _ceil(x: float) -> int:
    return math.ceil(x - 1e-9)


def choose(residual: torch.Tensor, tokens: Tokens, probe: Probe) -> Selection:
    """Pick tokens, then samples, by residual importance (Probe Pruning, section 4.1), or evenly spaced ones.

    `u_bs = norm2(R_bs)`; a position's score is the 2-norm of `u` over samples; a sample's the 2-norm over
    the chosen positions. Padding scores zero.

    Args:
        residual: `R` (batch, sequence, hidden), the input of the norm in front of the block.
        tokens: which tokens are real.
        probe: the budget.
    """
    wanted, count = probe_size(probe, tokens.batch, tokens.length)
    if probe.pick == "even":
        return Selection(
            _evenly(wanted, tokens.batch, residual.device), _evenly(count, tokens.length, residual.device)
        )
    wider = None if residual.dtype == torch.float32 else torch.float32  # naming the dtype it has is slower
    u = torch.linalg.vector_norm(residual, dim=-1, dtype=wider)
    if tokens.valid is not None:
        u = u.masked_fill(~tokens.valid, 0)
    score = torch.linalg.vector_norm(u, dim=0)
    if count <= probe.keep_first_below:
        used = tokens.valid.any(0).long() if tokens.valid is not None else torch.ones_like(score)
        score.index_fill_(0, used.argmax(0, keepdim=True), torch.inf)
    columns = score.argsort(descending=True, stable=True)[:count].sort().values
    per_sample = torch.linalg.vector_norm(u[:, columns], dim=1)
    samples = per_sample.argsort(descending=True, stable=True)[:wanted].sort().values
    return Selection(samples, columns)


def _evenly(count: int, of: int, device: torch.device) -> torch.Tensor:
    """The middles of `count` equal stretches of so many: LongTensor (count,)."""
    return (2 * torch.arange(count, device=device) + 1) * of // (2 * count)


def everything(tokens: Tokens, device: torch.device) -> Selection:
    """A whole batch as its own probe."""
    return Selection(torch.arange(tokens.batch, device=device), torch.arange(tokens.length, device=device))


def run_ahead(
    block: Block,
    x: torch.Tensor,
    selection: Selection,
    kwargs: dict[str, Any],
    norm: nn.Module | None = None,
) -> torch.Tensor:
    """The coupled activation `z^p` (samples, tokens, n) of the probe, through the block's own forward.

    The consumer, in tap mode, hands back its input instead of multiplying.

    Args:
        block: a block showing all its units.
        x: the block's normalised input (batch, sequence, hidden).
        selection: which part of it to run.
        kwargs: what else the model passed to the block; masks and positions are cut to the probe's own.
        norm: what `x` has to pass first, where it is a residual.
    """
    part = x.index_select(0, selection.samples).index_select(1, selection.tokens)
    if norm is not None:
        part = norm(part)
    tapped: list[torch.Tensor] = []

    def tap(z: torch.Tensor) -> torch.Tensor:
        tapped.append(z)
        return z

    with replaced_forward(block.consumer, tap):
        block.run(part, **restrict(kwargs, selection, x.shape[0]))
    return tapped[0]


def restrict(kwargs: dict[str, Any], selection: Selection, batch: int) -> dict[str, Any]:
    """A block's keyword arguments, cut to the probe: real mask, real positions, no cache.

    Raises `UsageError` for a mask of a kind that cannot be cut.
    """

    def rows(t: torch.Tensor) -> torch.Tensor:
        return t.index_select(0, selection.samples) if t.shape[0] == batch and batch > 1 else t

    cut = dict(kwargs)
    for name, value in kwargs.items():
        if value is None:
            continue
        if name == "position_embeddings":
            cut[name] = tuple(rows(t).index_select(1, selection.tokens) for t in value)
        elif name == "attention_mask":
            if not (isinstance(value, torch.Tensor) and value.ndim == 4):
                raise UsageError("probing needs sdpa or eager attention; load the model with one of them.")
            mask = rows(value).index_select(2, selection.tokens)
            cut[name] = mask.index_select(3, selection.tokens)
        elif name == "position_ids":
            cut[name] = rows(value).index_select(1, selection.tokens)
        elif name == "cache_position":
            cut[name] = value.index_select(0, selection.tokens)
        elif name in ("past_key_values", "layer_past"):
            cut[name] = None
        elif name == "use_cache":
            cut[name] = False
    return cut


def probe_energy(z: torch.Tensor, selection: Selection, tokens: Tokens) -> torch.Tensor:
    """`E^p` (tokens, n): mean over the probe's samples of `z^2`, padding left out."""
    z = z.float()
    if tokens.valid is None:
        return (z * z).mean(0) if len(z) > 1 else (z * z)[0]
    real = tokens.valid[selection.samples][:, selection.tokens]
    z = z.masked_fill(~real[..., None], 0)
    return (z * z).sum(0) / real.sum(0).clamp_min(1)[:, None]


def fuse(energy: torch.Tensor, history: torch.Tensor, probe: Probe) -> torch.Tensor:
    """Probe energy `E^p` with history `E^h`, both (tokens, n) (Probe Pruning, section 4.3).

    `importance`: `(E^p^2 + E^h^2) / (E^p + E^h)`, each weighted by its own share of the sum.
    """
    if probe.fusion == "none":
        return energy
    if probe.fusion == "fixed":
        return torch.lerp(energy, history, probe.history_share)
    # No squares: energies of 1e20 would overflow float32.
    both = (energy + history).clamp_min_(torch.finfo(energy.dtype).tiny)
    share = torch.div(energy, both, out=both)
    return torch.lerp(history, energy, share, out=share)


def fused_energy(
    z: torch.Tensor, selection: Selection, tokens: Tokens, history: History | None, probe: Probe
) -> torch.Tensor:
    """`e_j` (n,): the probe's energy, fused with history, summed over the probe's positions.

    Raises `FloatingPointError` for a NaN or infinite energy.
    """
    energy = probe_energy(z, selection, tokens)
    if history is not None and probe.fusion != "none":
        positions, real = None, None
        if tokens.valid is not None:
            all_positions = tokens.positions
            assert all_positions is not None
            positions = all_positions[selection.samples][:, selection.tokens]
            real = tokens.valid[selection.samples][:, selection.tokens]
        energy = fuse(energy, history.at(selection.tokens, positions, real), probe)
    return energy.sum(0)
