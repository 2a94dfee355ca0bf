"""Least squares for one linear map: moments of its inputs and targets, and the best weight.

Tensors in, tensors out. Knows nothing of models, blocks or text.
"""

from collections.abc import Callable
from typing import Any

import torch

FLOOR = 1e-3
"""Least damping of a channel, as a share of the median channel's; of the median live channel's where most are
dead."""


class Gram:
    """Streaming count, means and centred second moments of inputs `z` (k) and targets `t` (d).

    In float32. While a batch is added, 2 (k^2 + d k) numbers are in memory. Merging is exact.

    Attributes:
        count: number of tokens added.
        z_mean, t_mean: means over tokens, (k,) and (d,).
        zz, tz: sums over tokens of products of distances from the means, (k, k) and (d, k).
        tt: the same for targets with targets, but only the trace: ().
    """

    def __init__(self, k: int, d: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        float32: dict[str, Any] = {"dtype": torch.float32, "device": device}
        self.z_mean, self.t_mean = torch.zeros(k, **float32), torch.zeros(d, **float32)
        self.zz, self.tz = torch.zeros(k, k, **float32), torch.zeros(d, k, **float32)
        self.tt = torch.zeros((), **float32)

    @torch.no_grad()
    def update(self, z: torch.Tensor, t: torch.Tensor) -> None:
        """Add the inputs (tokens, k) and targets (tokens, d) of a batch."""
        z, t = z.float(), t.float()
        z_mean, t_mean = z.mean(0), t.mean(0)
        z, t = z - z_mean, t - t_mean
        self._add(len(z), z_mean, t_mean, z.T @ z, t.T @ z, t.square().sum())

    def merge(self, other: "Gram") -> None:
        """Add the moments of other tokens."""
        self._add(other.count, other.z_mean, other.t_mean, other.zz, other.tz, other.tt)

    @torch.no_grad()
    def pool(self, add_up: Callable[..., None]) -> None:
        """Merge with the moments that others hold of other tokens, all at once, in place.

        Args:
            add_up: replaces tensors by their sums over all holders, in place; called by each of them, also by
                one without tokens.
        """
        own, z_own, t_own = self.count, self.z_mean, self.t_mean
        count = torch.tensor([own], dtype=torch.long, device=self.zz.device)
        z_sum, t_sum = z_own * own, t_own * own
        add_up(count, z_sum, t_sum)
        self.count = int(count)
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
        part = Gram(len(columns), len(self.t_mean), self.zz.device)
        part.count, part.z_mean, part.t_mean = self.count, self.z_mean[columns], self.t_mean
        part.zz, part.tz, part.tt = self.zz[columns][:, columns], self.tz[:, columns], self.tt
        return part

    def _add(
        self,
        count: int,
        z_mean: torch.Tensor,
        t_mean: torch.Tensor,
        zz: torch.Tensor,
        tz: torch.Tensor,
        tt: torch.Tensor,
    ) -> None:
        total = self.count + count
        between = self.count * count / total  # Chan, Golub and LeVeque 1979
        dz, dt = z_mean - self.z_mean, t_mean - self.t_mean
        self.zz.add_(zz).addr_(dz, dz, alpha=between)
        self.tz.add_(tz).addr_(dt, dz, alpha=between)
        self.tt = self.tt + tt + between * dt.square().sum()
        self.z_mean += dz * (count / total)
        self.t_mean += dt * (count / total)
        self.count = total


def solve(
    gram: Gram, weight: torch.Tensor, bias: torch.Tensor | None, damping: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weight and bias with the smallest damped squared error of `W z + b` against `t`.

    Minimises `mean |t - W' z - b'|^2 + sum_j L_j |W'_j - W_j|^2` over columns `j`: `W' = W + (T - W Z)
    (Z + L)^-1`. `L_j` is `damping` times the second moment of channel `j`, at least `FLOOR` times that of the
    median channel, so that a few huge channels do not damp all others (docs/best.md). Damping applies to the
    change of the weight: with much damping nothing changes, and the error on the tokens of the moments never
    grows. Takes 8 (2 k^2 + d k) bytes (float64).

    Args:
        gram: moments of inputs and targets.
        weight: `W` (d, k).
        bias: (d,) to fit a bias too, on centred moments; its value does not matter. None to fit none.
        damping: above 0.

    Returns:
        float32: weight (d, k) and bias (d,) or None.

    Raises:
        FloatingPointError: NaN or infinite moments, or a matrix that cannot be factorised.
    """
    z_mean, t_mean, zz, tz = _second_moments(gram, centred=bias is not None)
    w = _wide(weight)
    target = tz - w @ zz
    factor = _factor(zz, damping)
    if not torch.isfinite(target).all():
        raise FloatingPointError("the products of its inputs and targets are NaN or infinite")
    fitted = w + torch.cholesky_solve(target.T, factor).T
    shift = None if bias is None else (t_mean - fitted @ z_mean).float().to(weight.device)
    return fitted.float().to(weight.device), shift


def inverse_moment(gram: Gram, centred: bool, damping: float) -> torch.Tensor:
    """`(Z + L)^-1` (k, k) with the moment and damping of `solve`, float32. Raises the same errors."""
    _, _, zz, _ = _second_moments(gram, centred)
    return torch.cholesky_inverse(_factor(zz, damping)).float().to(gram.zz.device)


def normal_equations(
    gram: Gram, weight: torch.Tensor, centred: bool, damping: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`Z + L` (k, k) and `T + W L` (d, k), the equations that `solve` solves; float64."""
    _, _, zz, tz = _second_moments(gram, centred)
    strength = _strength(zz, damping)
    zz.diagonal().add_(strength)
    return zz, tz + _wide(weight) * strength


def _factor(zz: torch.Tensor, damping: float) -> torch.Tensor:
    """The Cholesky factor of `Z + L`. Changes `zz` to `Z + L`."""
    zz.diagonal().add_(_strength(zz, damping))
    factor, failed = torch.linalg.cholesky_ex(zz)
    if failed or not torch.isfinite(factor).all():
        raise FloatingPointError("the second moment of its inputs cannot be factorised")
    return factor


def _strength(zz: torch.Tensor, damping: float) -> torch.Tensor:
    """`L` (k,), the damping of each channel."""
    diagonal = zz.diagonal()
    middle = float(diagonal.median())
    if middle == 0:  # most channels are dead: they need damping too, or nothing can be factorised
        live = diagonal[diagonal > 0]
        middle = float(live.median()) if live.numel() else 1.0
    return damping * diagonal.clamp_min(FLOOR * middle)


def squared_error(gram: Gram, weight: torch.Tensor, bias: torch.Tensor | None) -> float:
    """Mean of `|t - W z - b|^2` over the tokens of the moments."""
    z_mean, t_mean, zz, tz = _second_moments(gram, centred=True)
    w = _wide(weight)
    spread = float(_wide(gram.tt)) / gram.count - float((2 * tz - w @ zz).mul_(w).sum())
    offset = t_mean - w @ z_mean - (0 if bias is None else _wide(bias))
    return spread + float(offset.square().sum())


def target_variance(gram: Gram) -> float:
    """Mean squared distance of the targets from their mean, over the tokens of the moments."""
    return float(gram.tt) / gram.count


def _second_moments(
    gram: Gram, centred: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Means of `z` and `t`, and `Z` (k, k) and `T` (d, k) per token, centred or not, in float64."""
    z_mean, t_mean = _wide(gram.z_mean), _wide(gram.t_mean)
    zz, tz = _wide(gram.zz) / gram.count, _wide(gram.tz) / gram.count
    if not centred:
        zz.addr_(z_mean, z_mean)
        tz.addr_(t_mean, z_mean)
    return z_mean, t_mean, zz, tz


def _wide(x: torch.Tensor) -> torch.Tensor:
    """A tensor in float64, on the CPU if it is on an Apple GPU, which has no float64."""
    return (x.cpu() if x.device.type == "mps" else x).double()
