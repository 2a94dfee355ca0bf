"""The probe: choose a small part of a batch, run it ahead through a block, fuse its energy with history.

The stages of Probe Pruning (ICLR 2025) by name: `choose` (residual importance), `run_ahead` (probing),
`fused_energy` (importance-scaled fusion with history). `importance.py` scores units, `model/partition.py`
makes the cut, and `runtime/` loops over a model's blocks.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from probeprune.algebra.moments import History, Tokens
from probeprune.errors import BadValue, UsageError, unknown
from probeprune.model.blocks import Block
from probeprune.model.cost import block_flops
from probeprune.model.family_records import SharedKV
from probeprune.model.passes import CACHE_NAMES
from probeprune.model.shadow import Shadow
from probeprune.ranges import check_fields

Pays = Literal["always", "auto"]
"""Which batches are probed; see `Probe.pays`."""


@dataclass(frozen=True)
class Probe:
    """The part of a batch that is run ahead. Defaults are Probe Pruning's (ICLR 2025, section 5 and
    appendix).

    Raises `UsageError` for values out of range.
    """

    tokens: float = 0.5
    """Share of the batch's positions in the probe, padding included."""
    samples: float = 0.05
    """Share of the batch's samples in the probe (at least one)."""
    min_tokens: int = 2
    """Minimum number of positions, or the whole length if the batch is shorter."""
    min_size: int = 0
    """Minimum number of tokens in total, reached by taking more positions; fewer only if all positions are
    taken."""
    pick: str = "residual"
    """A key of `PICKS`. `residual`: the positions and samples with the greatest residual importance, as
    published. `even`: evenly spaced ones, which represent the batch better, for refits (docs/best.md)."""
    keep_first_below: int = 10
    """A probe by residual importance with this number of positions or fewer always includes the first one,
    the attention sink."""
    reuse: int = 0
    """Minimum number of tokens that one choice serves. Smaller batches share a choice, because probing each
    would cost more than pruning saves (docs/choices.md; the method `probe-reuse` uses 1024). 0 probes every
    batch, as published. A prompt that fills a given cache, as in `generate`, is always probed: its choice
    serves the text that follows."""
    pays: Pays = "always"
    """Which batches are probed. `always`: all that `reuse` says, as published. `auto`: those for which the
    time that pruning has saved so far, on this machine, covers the time of the probe (`account.py`), so that
    a run of batches of any size is not slower than dense; the others run with the last choice, or with the
    one that calibration gives. As under `reuse`, a prompt that fills a given cache is always probed."""
    parallel: bool = False
    """Probe a block in parallel with the one before it, from the residual in front of that one: the published
    asynchronous variant. On CUDA the two overlap, on a second stream (not yet run on a GPU); elsewhere they
    run one after the other, without gain. The model's first block, and the first attention block of each
    layer type, are probed in their turn."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.pick not in PICKS:
            raise BadValue("pick", unknown("pick", self.pick, PICKS))
        if self.pays not in get_args(Pays):
            raise BadValue("pays", unknown("pays", self.pays, get_args(Pays)))
        if self.pays == "auto" and self.reuse:
            raise UsageError(
                "reuse and pays='auto' are two rules for which batches are probed; give one of them."
            )


@dataclass(frozen=True)
class Selection:
    """The probe of one block and batch: indices of its samples and of its columns, ascending LongTensors."""

    samples: torch.Tensor
    tokens: torch.Tensor


def probe_size(probe: Probe, batch: int, length: int) -> tuple[int, int]:
    """Number of samples and of positions that the probe takes from a batch of shape (batch, length)."""
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
    """Pick the probe of one block and batch.

    Args:
        residual: `R` (batch, sequence, hidden), the input of the norm in front of the block.
        tokens: which tokens are real.
        probe: the number of samples and positions, and the rule to pick them.
    """
    return PICKS[probe.pick](residual, tokens, probe)


def by_residual(residual: torch.Tensor, tokens: Tokens, probe: Probe) -> Selection:
    """Pick tokens, then samples, by residual importance (Probe Pruning, section 4.1).

    `u_bs = norm2(R_bs)`; the score of a position is the 2-norm of `u` over samples, the score of a sample the
    2-norm over the chosen positions. Padding scores zero.
    """
    samples_wanted, positions_wanted = probe_size(probe, tokens.batch, tokens.length)
    # Passing the dtype that a tensor already has is slower than passing None.
    wider = torch.float32 if residual.dtype.itemsize < 4 else None
    u = torch.linalg.vector_norm(residual, dim=-1, dtype=wider)
    if tokens.valid is not None:
        u = u.masked_fill(~tokens.valid, 0)
    score = torch.linalg.vector_norm(u, dim=0)
    if positions_wanted <= probe.keep_first_below:
        used = tokens.valid.any(0).long() if tokens.valid is not None else torch.ones_like(score)
        score.index_fill_(0, used.argmax(0, keepdim=True), torch.inf)
    columns = score.argsort(descending=True, stable=True)[:positions_wanted].sort().values
    per_sample = torch.linalg.vector_norm(u[:, columns], dim=1)
    samples = per_sample.argsort(descending=True, stable=True)[:samples_wanted].sort().values
    return Selection(samples, columns)


def evenly_spaced(residual: torch.Tensor, tokens: Tokens, probe: Probe) -> Selection:
    """Pick evenly spaced samples and positions, regardless of the residual."""
    samples, positions = probe_size(probe, tokens.batch, tokens.length)
    return Selection(
        _midpoints(samples, tokens.batch, residual.device),
        _midpoints(positions, tokens.length, residual.device),
    )


PICKS: dict[str, Callable[[torch.Tensor, Tokens, Probe], Selection]] = {
    "residual": by_residual,
    "even": evenly_spaced,
}
"""Rules to pick a probe, by name, with the arguments of `choose`. To add a rule, add a row."""


def _midpoints(count: int, length: int, device: torch.device) -> torch.Tensor:
    """Midpoints of `count` equal segments of range(length): LongTensor (count,)."""
    return (2 * torch.arange(count, device=device) + 1) * length // (2 * count)


def everything(tokens: Tokens, device: torch.device) -> Selection:
    """The whole batch as its own probe."""
    return Selection(torch.arange(tokens.batch, device=device), torch.arange(tokens.length, device=device))


def run_ahead(
    shadow: Shadow,
    x: torch.Tensor,
    selection: Selection,
    kwargs: dict[str, Any],
    norm: nn.Module | None = None,
    factor: float = 1.0,
) -> torch.Tensor:
    """The coupled activation `z^p` (samples, tokens, n) of the probe, through the block's own computation.

    Args:
        shadow: of the block.
        x: the block's normalised input (batch, sequence, hidden).
        selection: which part of it to run.
        kwargs: the block's other arguments; masks and positions are cut to the probe's own.
        norm: the norm to apply first, where `x` is a residual.
        factor: what that norm's output is multiplied by.
    """
    part = x.index_select(0, selection.samples).index_select(1, selection.tokens)
    if norm is not None:
        part = type(norm).forward(norm, part)  # hooks on it are for the model's own pass
        part = part if factor == 1 else part * factor
    return shadow.run(part, restrict(kwargs, selection, x.shape[0]))


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
            # Cosines and sines, or one tensor of both as complex numbers.
            parts = (value,) if isinstance(value, torch.Tensor) else value
            few = tuple(rows(t).index_select(1, selection.tokens) for t in parts)
            cut[name] = few[0] if isinstance(value, torch.Tensor) else few
        elif name == "attention_mask":
            if not (isinstance(value, torch.Tensor) and value.ndim == 4):
                raise UsageError("probing needs sdpa or eager attention; load the model with one of them.")
            mask = rows(value).index_select(2, selection.tokens)
            cut[name] = mask.index_select(3, selection.tokens)
        elif name == "position_ids":
            cut[name] = rows(value).index_select(1, selection.tokens)
        elif name == "cache_position":
            cut[name] = value.index_select(0, selection.tokens)
        elif name == SharedKV.argument:
            # A copy: what a block finds of earlier layers, and where it leaves its own for later ones.
            own = {k: tuple(rows(t).index_select(2, selection.tokens) for t in kv) for k, kv in value.items()}
            cut[name] = type(value)(own)
        elif name in CACHE_NAMES:
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


def by_importance(energy: torch.Tensor, history: torch.Tensor, share: float) -> torch.Tensor:
    """`(E^p^2 + E^h^2) / (E^p + E^h)`: each part weighted by its share of the sum."""
    # No squares: energies of 1e20 would overflow float32.
    both = (energy + history).clamp_min_(torch.finfo(energy.dtype).tiny)
    own_share = torch.div(energy, both, out=both)
    return torch.lerp(history, energy, own_share, out=own_share)


def by_fixed_share(energy: torch.Tensor, history: torch.Tensor, share: float) -> torch.Tensor:
    """History weighted by `share`, the probe by `1 - share` (the paper's ablation)."""
    return torch.lerp(energy, history, share)


FUSIONS: dict[str, Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor] | None] = {
    "importance": by_importance,
    "fixed": by_fixed_share,
    "none": None,
}
"""Ways to fuse the probe's energy `E^p` with history `E^h`, both (tokens, n) (Probe Pruning, section 4.3).
None ignores history."""


def fused_energy(
    z: torch.Tensor,
    selection: Selection,
    tokens: Tokens,
    history: History | None,
    fusion: str,
    history_share: float = 0.5,
) -> torch.Tensor:
    """`e_j` (n,): the probe's energy, fused with history, summed over the probe's positions.

    Args:
        z: the probe's coupled activation (samples, tokens, n).
        selection: the part of the batch in the probe.
        tokens: tokens of the batch.
        history: running energies, or None.
        fusion: a key of `FUSIONS`.
        history_share: weight of history under `fixed` fusion.
    """
    energy = probe_energy(z, selection, tokens)
    fuse = FUSIONS[fusion]
    if history is not None and fuse is not None:
        positions, real = None, None
        if tokens.valid is not None:
            all_positions = tokens.positions
            assert all_positions is not None
            positions = all_positions[selection.samples][:, selection.tokens]
            real = tokens.valid[selection.samples][:, selection.tokens]
        energy = fuse(energy, history.at(selection.tokens, positions, real), history_share)
    return energy.sum(0)
