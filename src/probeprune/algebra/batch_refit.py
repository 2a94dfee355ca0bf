"""Per-batch refit: correct a consumer that was fitted to calibration text for some tokens of a batch.

Adding m tokens to the calibration text's moments is a correction of rank m. By the matrix inversion lemma it
takes a system of m unknowns. Tensors in, tensors out. Knows nothing of models or text.
"""

from dataclasses import dataclass

import torch

from probeprune.algebra.precision import exact


@dataclass(frozen=True, eq=False)
class Sample:
    """Some tokens of a batch.

    Attributes:
        z: the kept channels of the coupled activation (m, k), in the order of the weight's columns, float32.
        target: the output of the whole block (m, d), float32.
        real: BoolTensor (m,), False for padding; None if there is no padding.
        prior: weight of the calibration text, in tokens; above 0.
    """

    z: torch.Tensor
    target: torch.Tensor
    real: torch.Tensor | None
    prior: float


@exact()
@torch.no_grad()
def refit_to_batch(
    sample: Sample,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    inverse: torch.Tensor,
    mean: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The best weight and bias for the calibration text and a sample together.

    Adds to the weight the `D` that minimises `sum_i |e_i - D z_i|^2 + prior tr D M D'`, where `e_i` is the
    error of the present weight on token `i` and `M` the damped second moment of the calibration text. This is
    `D = E' (H Z' + prior)^-1 H` with `H = Z M^-1`. Takes m k (k + m + 2 d) + m^3 / 3 + d m^2 multiplications.

    Args:
        sample: m tokens.
        weight: `W` (d, k), the best for the calibration text.
        bias: (d,), or None.
        inverse: `M^-1` (k, k), float32 (`least_squares.Equations.inverse`).
        mean: mean of `z` (k,), float32, if a bias is fitted too; moments are then centred. None: no bias.

    Returns:
        float32: weight (d, k) and bias (d,), the latter None without `mean`.
    """
    w, z = weight.float(), sample.z
    error = sample.target - z @ w.T
    if bias is not None:
        error -= bias.float()
    if mean is not None:
        z = z - mean
    if sample.real is not None:
        z = z.masked_fill(~sample.real[:, None], 0)
        error = error.masked_fill(~sample.real[:, None], 0)
    h = z @ inverse
    among = h @ z.T
    among.diagonal().add_(sample.prior)
    factor, _ = torch.linalg.cholesky_ex(among)  # no wait for the device: a failure shows in the weight
    change = torch.cholesky_solve(error, factor).T @ h
    if mean is None or bias is None:
        return w + change, None
    return w + change, bias.float() - change @ mean
