"""Streaming moments of the coupled activation `z`, and the history that is updated while a model is used.

Everything is float32, per channel in original order, merges exactly, and leaves out padding. A position is
that of a token within its own sequence, so padding on either side gives the same numbers. Positions below a
limit each have their own energy and all later ones share one, so memory is bounded for any length. The limit
is 0 by default: keeping positions separate was measured to gain nothing. Knows nothing of the units to be
pruned.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

OWN_POSITIONS = 0
"""Number of positions, from the first, with their own energy. Probe Pruning has one for each position up to a
fixed length; here none has, at no cost in quality (docs/choices.md, benchmarks/history_positions.py)."""


@dataclass(frozen=True)
class Tokens:
    """Which tokens of a batch are real, and their positions."""

    batch: int
    length: int
    valid: torch.Tensor | None = None
    """BoolTensor (batch, sequence), False for padding; None if there is no padding."""

    @property
    def positions(self) -> torch.Tensor | None:
        """LongTensor (batch, sequence): position within the sequence; None if it equals the column."""
        if self.valid is None:
            return None
        return (self.valid.long().cumsum(1) - 1).clamp_min(0)


class Moments:
    """Count, mean, centred second moment and per-position energy of one block's `z`.

    Attributes:
        count: float tensor (), number of tokens added.
        samples: float tensor (), number of sequences added.
        mean: (n,), mean over tokens.
        m2: (n,), sum over tokens of the squared distance from the mean.
        energy: (own + 1, n), sum of `z^2` at each of the first `own` positions; the last row sums all later
            ones.
        tokens: (own + 1,), number of tokens in each row of `energy`.
    """

    def __init__(self, width: int, own: int = OWN_POSITIONS, device: torch.device | str = "cpu") -> None:
        self.count = torch.zeros((), dtype=torch.float32, device=device)
        self.samples = torch.zeros((), dtype=torch.float32, device=device)
        self.mean = torch.zeros(width, dtype=torch.float32, device=device)
        self.m2 = torch.zeros(width, dtype=torch.float32, device=device)
        self.energy = torch.zeros(own + 1, width, dtype=torch.float32, device=device)
        self.tokens = torch.zeros(own + 1, dtype=torch.float32, device=device)

    @property
    def own(self) -> int:
        """Number of positions with their own energy."""
        return len(self.tokens) - 1

    @torch.no_grad()
    def update(self, z: torch.Tensor, tokens: Tokens) -> None:
        """Add a batch of `z` (batch, sequence, n), leaving out padding."""
        batch = Moments(z.shape[-1], self.own, z.device)
        flat = (z.flatten(0, 1) if tokens.valid is None else z[tokens.valid]).float()
        if not len(flat):
            return
        batch.count += len(flat)
        batch.samples += z.shape[0] if tokens.valid is None else tokens.valid.any(1).sum()
        # Two passes, because mean of squares minus square of mean cancels in float32.
        batch.mean = flat.mean(0)
        batch.m2 = (flat - batch.mean).square_().sum(0)
        if self.own:
            position_sums(z, tokens, batch.energy, batch.tokens)
        else:  # one row for all: no third pass
            batch.energy[0] = batch.m2 + batch.count * batch.mean.square()
            batch.tokens[0] = batch.count
        self.merge(batch)

    @torch.no_grad()
    def merge(self, other: "Moments") -> None:
        """Add moments of other tokens, in any order (Chan, Golub and LeVeque 1979)."""
        total = self.count + other.count
        delta = other.mean - self.mean
        self.m2 += other.m2 + delta.square() * (self.count * other.count / total.clamp_min(1))
        self.mean += delta * (other.count / total.clamp_min(1))
        self.count = total
        self.samples = self.samples + other.samples
        self.energy += other.energy
        self.tokens += other.tokens

    @torch.no_grad()
    def pool(self, add_up: Callable[..., None]) -> None:
        """Merge with the moments that others hold of other tokens, all at once, in place.

        Args:
            add_up: replaces tensors by their sums over all holders, in place; called by each of them, also by
                one without tokens.
        """
        count, mean, total = self.count.clone(), self.mean, self.mean * self.count
        add_up(self.count, self.samples, self.energy, self.tokens, total)
        self.mean = total / self.count.clamp_min(1)
        self.m2 += count * (mean - self.mean).square()
        add_up(self.m2)

    @property
    def variance(self) -> torch.Tensor:
        """Variance of each channel over all tokens, around the mean (population): (n,)."""
        return self.m2 / self.count.clamp_min(1)

    @property
    def sample_energy(self) -> torch.Tensor:
        """`e_j`: mean over samples of `z_j^2`, summed over positions: (n,)."""
        return self.energy.sum(0) / self.samples.clamp_min(1)

    def state(self) -> dict[str, torch.Tensor]:
        """All tensors by name, for `from_state`."""
        return dict(vars(self))

    def to(self, device: torch.device | str) -> "Moments":
        """The same moments on `device`."""
        return Moments.from_state({k: v.to(device) for k, v in self.state().items()})

    @classmethod
    def from_state(cls, state: Mapping[str, torch.Tensor]) -> "Moments":
        """The inverse of `state`."""
        moments = cls(0, 0)
        for name in vars(moments):
            setattr(moments, name, state[name])
        return moments


@torch.no_grad()
def position_sums(z: torch.Tensor, tokens: Tokens, energy: torch.Tensor, counts: torch.Tensor) -> None:
    """Add a batch's `z^2` to the rows of its positions.

    Args:
        z: (batch, sequence, k).
        tokens: which tokens are real.
        energy: (own + 1, k), changed in place: sums of `z^2` by position; the last row sums all later ones.
        counts: (own + 1,), changed in place: number of tokens in each row.
    """
    own, valid = len(counts) - 1, tokens.valid
    if own and valid is not None:
        positions = tokens.positions
        assert positions is not None
        z = z.masked_fill(~valid[..., None], 0).float()  # not times 0: padding may be NaN
        rows = positions.clamp_max(own).flatten()
        energy.index_add_(0, rows, z.square_().flatten(0, 1))
        counts.index_add_(0, rows, valid.flatten().to(counts.dtype))
        return
    if own:
        first = min(own, z.shape[1])
        energy[:first] += z[:, :first].float().square().sum(0)
        counts[:first] += z.shape[0]
        z = z[:, own:]
    counts[own] += z.shape[0] * z.shape[1] if valid is None else valid.sum()
    energy[own] += _sum_of_squares(z, valid)


def _sum_of_squares(z: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """Sum of `z^2` over the real tokens of (batch, sequence, k): (k,), float32."""
    # In parts: small enough for a CPU's cache, or large enough to keep an accelerator busy. Temporary tensors
    # for a whole batch would grow with it.
    entries = 2**17 if z.device.type == "cpu" else 2**24
    parts = z.flatten(0, 1).split(max(entries // z.shape[-1], 1))
    real = None if valid is None else valid.flatten().split(len(parts[0]))
    sums = torch.zeros_like(parts[0], dtype=torch.float32)
    for i, part in enumerate(parts):
        part = part.float()
        if real is not None:
            part = part.masked_fill(~real[i][:, None], 0)  # not times 0: padding may be NaN
        sums[: len(part)].addcmul_(part, part)
    return sums.sum(0)


class History:
    """Running energy of one block's channels by position, `E^h` of Probe Pruning.

    Attributes:
        decay: share of itself that the history keeps at each update.
        energy: (own + 1, n), mean over samples of `z^2` at each of the first `own` positions; the last row is
            for all later ones. Columns follow the block's partition: the kept units' channels come first.
    """

    def __init__(self, moments: Moments, decay: float) -> None:
        self.decay = decay
        self.energy = moments.energy / moments.tokens.clamp_min(1)[:, None]
        # A position without calibration tokens starts from the mean over all of them.
        unseen = moments.tokens == 0
        self.energy[unseen] = moments.energy.sum(0) / moments.count.clamp_min(1)

    @property
    def own(self) -> int:
        """Number of positions with their own energy."""
        return len(self.energy) - 1

    def at(
        self, columns: torch.Tensor, positions: torch.Tensor | None, valid: torch.Tensor | None
    ) -> torch.Tensor:
        """`E^h` at some columns of a batch: (s, n).

        Args:
            columns: LongTensor (s,), ascending columns of the batch.
            positions: LongTensor (b, s), the tokens' positions; None if they equal the columns.
            valid: BoolTensor (b, s), False for padding. A column's energy is the mean over the positions of
                its real tokens.
        """
        if not self.own:  # one row for all: nothing to gather
            rows = self.energy.expand(len(columns), -1)
            return rows if valid is None else rows * valid.any(0)[:, None]
        if positions is None or valid is None:
            return self.energy[columns.clamp_max(self.own)]
        rows = self.energy[positions.clamp_max(self.own)] * valid[..., None]
        return rows.sum(0) / valid.sum(0).clamp_min(1)[:, None]

    @torch.no_grad()
    def update(self, z: torch.Tensor, tokens: Tokens) -> None:
        """Move the first `z.shape[-1]` channels towards this batch.

        Rows without tokens in this batch, and entries that would become non-finite, are left unchanged.
        """
        k = z.shape[-1]
        energy = torch.zeros(self.own + 1, k, dtype=torch.float32, device=z.device)
        counts = torch.zeros(self.own + 1, dtype=torch.float32, device=z.device)
        position_sums(z, tokens, energy, counts)
        mean = energy / counts.clamp_min(1)[:, None]
        weight = (1 - self.decay) * (counts > 0)
        kept = self.energy[:, :k]
        kept += (weight[:, None] * (mean - kept)).nan_to_num_(0, 0, 0)
