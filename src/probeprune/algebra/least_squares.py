"""Least squares for one linear map: moments of its inputs and targets, and the best weight.

Tensors in, tensors out. Knows nothing of models, blocks or text.
"""

from collections.abc import Callable
from typing import Any

import torch

from probeprune.algebra.factors import factorised
from probeprune.algebra.precision import choosing_dtype, solving_dtype

FLOOR = 1e-3
"""Least damping of a channel, as a share of the median channel's; of the median live channel's where most are
dead."""


_BLOCKS, _LEAST = 8, 256
"""Number of blocks of columns that products are made in, and their least width."""


class Gram:
    """Streaming count, means and centred second moments of inputs `z` (k) and targets `t` (d).

    In float32. Merging is exact. A token takes little more than k^2 / 2 + d k multiplications: of the
    products of inputs with inputs only those on one side of the diagonal are made, in blocks of columns.

    Attributes:
        tokens: number of tokens added.
        count: sum of their weights; the same number where none are given.
        z_mean, t_mean: weighted means over tokens, (k,) and (d,).
        tz: weighted sums over tokens of products of distances from the means, (d, k).
        tt: the same for targets with targets, but only the trace: ().
    """

    def __init__(self, k: int, d: int, device: torch.device | str = "cpu") -> None:
        self.tokens, self.count = 0, 0.0
        float32: dict[str, Any] = {"dtype": torch.float32, "device": device}
        self.z_mean, self.t_mean = torch.zeros(k, **float32), torch.zeros(d, **float32)
        self._zz, self.tz = torch.zeros(k, k, **float32), torch.zeros(d, k, **float32)
        self.tt = torch.zeros((), **float32)
        self._half = False  # whether blocks below the diagonal lack what was added last

    @property
    def zz(self) -> torch.Tensor:
        """As `tz`, of inputs with inputs: (k, k)."""
        if self._half:
            for start, end in self._blocks():
                self._zz[end:, start:end] = self._zz[start:end, end:].T
            self._half = False
        return self._zz

    def _blocks(self) -> list[tuple[int, int]]:
        """Blocks of columns: large enough for fast products, enough of them to leave out nearly half."""
        k = len(self._zz)
        size = max(-(-k // _BLOCKS), _LEAST)
        return [(start, min(start + size, k)) for start in range(0, k, size)]

    @torch.no_grad()
    def update(self, z: torch.Tensor, t: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Add the inputs (tokens, k) and targets (tokens, d) of a batch, and the tokens' weights (tokens,), 0
        or more; None for 1 each."""
        z, t = z.float(), t.float()
        if weights is None:
            count, z_mean, t_mean = float(len(z)), z.mean(0), t.mean(0)
            z, t = z - z_mean, t - t_mean
        else:
            weights = weights.float()
            total = weights.sum()
            count = float(total)
            if not count:
                return
            z_mean, t_mean = weights @ z / total, weights @ t / total
            root = weights.sqrt()[:, None]
            z, t = (z - z_mean) * root, (t - t_mean) * root
        for start, end in self._blocks():
            self._zz[start:end, start:].addmm_(z[:, start:end].T, z[:, start:])
        self._half = True
        self.tz.addmm_(t.T, z)
        self.tt = self.tt + t.square().sum()
        self._join(len(z), count, z_mean, t_mean)

    def merge(self, other: "Gram") -> None:
        """Add the moments of other tokens."""
        self.zz.add_(other.zz)
        self.tz.add_(other.tz)
        self.tt = self.tt + other.tt
        self._join(other.tokens, other.count, other.z_mean, other.t_mean)

    @torch.no_grad()
    def pool(self, add_up: Callable[..., None]) -> None:
        """Merge with the moments that others hold of other tokens, all at once, in place.

        Args:
            add_up: replaces tensors by their sums over all holders, in place; called by each of them, also by
                one without tokens.
        """
        own, z_own, t_own = self.count, self.z_mean, self.t_mean
        counts = torch.tensor([self.tokens, own], dtype=torch.float64, device="cpu")
        z_sum, t_sum = z_own * own, t_own * own
        add_up(counts, z_sum, t_sum)
        self.tokens, self.count = int(counts[0]), float(counts[1])
        if not self.count:
            return
        self.z_mean, self.t_mean = z_sum / self.count, t_sum / self.count
        dz, dt = z_own - self.z_mean, t_own - self.t_mean
        self.zz.addr_(dz, dz, alpha=own)
        self.tz.addr_(dt, dz, alpha=own)
        self.tt = self.tt + own * dt.square().sum()
        add_up(self.zz, self.tz, self.tt)

    def part(self, columns: torch.Tensor) -> "Gram":
        """The moments of the inputs in `columns`, a LongTensor (k',)."""
        part = Gram(0, len(self.t_mean), self._zz.device)
        part.tokens, part.count = self.tokens, self.count
        part.z_mean, part.t_mean = self.z_mean[columns], self.t_mean
        part._zz, part.tz, part.tt = self.zz[columns][:, columns], self.tz[:, columns], self.tt
        return part

    def _join(self, tokens: int, count: float, z_mean: torch.Tensor, t_mean: torch.Tensor) -> None:
        """Let as many tokens, of these weights and means, be in, whose products around their own means are
        added."""
        total = self.count + count
        between = self.count * count / total  # Chan, Golub and LeVeque 1979
        dz, dt = z_mean - self.z_mean, t_mean - self.t_mean
        self._zz.addr_(dz, dz, alpha=between)
        self.tz.addr_(dt, dz, alpha=between)
        self.tt = self.tt + between * dt.square().sum()
        self.z_mean += dz * (count / total)
        self.t_mean += dt * (count / total)
        self.tokens, self.count = self.tokens + tokens, total


class Equations:
    """The damped normal equations `W' (Z + L) = T + W L` of one linear map, factorised once for all uses.

    Their solution minimises `mean |t - W' z - b'|^2 + sum_j L_j |W'_j - W_j|^2` over columns `j`. `L_j` is
    `damping` times the second moment of channel `j`, at least `FLOOR` times that of the median channel, so
    that a few huge channels do not damp all others (docs/best.md). Damping applies to the change of the
    weight: with much damping nothing changes, and the error on the tokens of the moments never grows.

    Takes `k^3 / 6` multiplications and `k^2 + 3 d k` numbers.

    Attributes:
        right: `T + W L` (d, k).
        factor: the lower Cholesky factor of `Z + L` (k, k).
    """

    def __init__(
        self,
        gram: Gram,
        weight: torch.Tensor,
        centred: bool,
        damping: float,
        dtype: torch.dtype | None = None,
    ) -> None:
        """The equations of these moments, centred or not.

        Args:
            gram: moments of inputs and targets.
            weight: `W` (d, k).
            centred: whether a bias is fitted too.
            damping: above 0.
            dtype: of all work; None for `precision.solving_dtype`.

        Raises:
            FloatingPointError: NaN or infinite moments, or a matrix that cannot be factorised.
        """
        dtype = dtype or solving_dtype(gram.zz.device, damping)
        self._z_mean, self._t_mean, zz, tz = _second_moments(gram, centred, dtype)
        self._weight, self._device = _wide(weight, dtype), weight.device
        self._strength = _strength(zz, damping)
        self._tz, self.right = tz, torch.addcmul(tz, self._weight, self._strength)
        squares = _wide(gram.tt) / gram.count
        self._tt = float(squares if centred else squares + _wide(gram.t_mean).square().sum())
        self._centred = centred
        zz.diagonal().add_(self._strength)
        self.factor = factorised(zz)
        if not torch.isfinite(tz).all():
            raise FloatingPointError("the products of its inputs and targets are NaN or infinite")

    def inverse(self) -> torch.Tensor:
        """`(Z + L)^-1` (k, k), in the dtype of the factor; k^3 / 3 multiplications."""
        return torch.cholesky_inverse(self.factor)

    def solution(self) -> tuple[torch.Tensor, torch.Tensor | None, float]:
        """The best weight (d, k) and bias (d,), None if no bias is fitted, float32, and their mean squared
        error on the tokens of the moments; d k^2 multiplications."""
        fitted = torch.cholesky_solve(self.right.T, self.factor).T
        # W' Z = T + (W - W') L, so the error takes no product more.
        rest = torch.addcmul(self._tz, fitted - self._weight, self._strength)
        error = self._tt - float((rest * fitted).sum(dtype=torch.float64))
        shift = (self._t_mean - fitted @ self._z_mean).float().to(self._device) if self._centred else None
        return fitted.float().to(self._device), shift, error


def damped_moment(gram: Gram, centred: bool, damping: float) -> torch.Tensor:
    """`Z + L` (k, k) of `Equations`, in `precision.choosing_dtype`."""
    _, _, zz, _ = _second_moments(gram, centred, choosing_dtype(damping))
    zz.diagonal().add_(_strength(zz, damping))
    return zz


def _strength(zz: torch.Tensor, damping: float) -> torch.Tensor:
    """`L` (k,), the damping of each channel."""
    diagonal = zz.diagonal()
    middle = float(diagonal.median())
    if middle == 0:  # most channels are dead: they need damping too, or nothing can be factorised
        live = diagonal[diagonal > 0]
        middle = float(live.median()) if live.numel() else 1.0
    return damping * diagonal.clamp_min(FLOOR * middle)


def squared_error(gram: Gram, weight: torch.Tensor, bias: torch.Tensor | None) -> float:
    """Mean of `|t - W z - b|^2` over the tokens of the moments; the product is in float32, sums in float64.

    Takes d k^2 multiplications.
    """
    own = weight.to(gram.zz)
    missed = torch.sub(gram.tz, own @ gram.zz, alpha=0.5).mul_(own).sum(dtype=torch.float64)
    offset = _wide(gram.t_mean) - _wide(weight) @ _wide(gram.z_mean)
    if bias is not None:
        offset -= _wide(bias)
    return float(gram.tt) / gram.count - 2 * float(missed) / gram.count + float(offset.square().sum())


def target_variance(gram: Gram) -> float:
    """Mean squared distance of the targets from their mean, over the tokens of the moments."""
    return float(gram.tt) / gram.count


def _second_moments(
    gram: Gram, centred: bool, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Means of `z` and `t`, and `Z` (k, k) and `T` (d, k) per token, centred or not."""
    z_mean, t_mean = _wide(gram.z_mean, dtype), _wide(gram.t_mean, dtype)
    zz, tz = _wide(gram.zz, dtype) / gram.count, _wide(gram.tz, dtype) / gram.count
    if not centred:
        zz.addr_(z_mean, z_mean)
        tz.addr_(t_mean, z_mean)
    return z_mean, t_mean, zz, tz


def _wide(x: torch.Tensor, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """A tensor in `dtype`, on the CPU if it is on an Apple GPU, which has no float64."""
    return (x.cpu() if x.device.type == "mps" else x).to(dtype)
