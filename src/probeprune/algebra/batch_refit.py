"""The refit to a batch: a consumer fitted to calibration text moves towards what the text at hand takes.

Some tokens of the batch join the calibration text's moments. That is a correction of as low a rank as there
are tokens: by the matrix inversion lemma, a system of as many unknowns. Tensors in, tensors out. Knows
nothing of models or text.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Sample:
    """Some tokens of a batch.

    Attributes:
        z: the coupled activation's channels that stay (m, k), in the order of the weight's columns, float32.
        target: the whole block's output (m, d), float32.
        real: BoolTensor (m,), which of them are no padding; None for all.
        prior: how many tokens the calibration text counts as beside them, above 0.
    """

    z: torch.Tensor
    target: torch.Tensor
    real: torch.Tensor | None
    prior: float


@torch.no_grad()
def refit_to_batch(
    sample: Sample,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    inverse: torch.Tensor,
    mean: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weight and bias that are best for the calibration text and a sample together.

    Adds to the weight the `D` that minimises `sum_i |e_i - D z_i|^2 + prior tr D M D'` over the sample's
    errors `e` under it, with `M` the calibration text's second moment, damped: `D = E' (H Z' + prior)^-1 H`
    with `H = Z M^-1`. Costs m k (k + m + 2 d) + m^3 / 3 + d m^2 multiplications.

    Args:
        sample: m tokens.
        weight: `W` (d, k), best for the calibration text.
        bias: (d,), or None.
        inverse: `M^-1` (k, k), float32 (`least_squares.inverse_moment`).
        mean: of `z` (k,), float32, where a bias is fitted too: moments are then around it.

    Returns:
        float32: weight (d, k) and bias (d,); no bias where `mean` is None.
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
    factor, _ = torch.linalg.cholesky_ex(among)  # waits for no device: what fails shows in the weight
    change = torch.cholesky_solve(error, factor).T @ h
    if mean is None or bias is None:
        return w + change, None
    return w + change, bias.float() - change @ mean
