"""Factors of symmetric matrices. Tensors in, tensors out."""

import torch


def factorised(moment: torch.Tensor) -> torch.Tensor:
    """The lower Cholesky factor of a second moment (n, n), or of several (..., n, n).

    Raises `FloatingPointError` for one that is not finite or not positive definite.
    """
    factor, failed = torch.linalg.cholesky_ex(moment)
    if failed.any() or not torch.isfinite(factor).all():
        raise FloatingPointError("the second moment of its inputs cannot be factorised")
    return factor


def root(metric: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`F` (d, d) with `M = F F'`, in the dtype and on the device of `like`; `M` may be singular.

    Raises `FloatingPointError` for a metric that is not finite.
    """
    metric = metric.to(like)
    if not torch.isfinite(metric).all():
        raise FloatingPointError("the weighting of its output's errors is NaN or infinite")
    factor, failed = torch.linalg.cholesky_ex(metric)
    if failed:
        values, vectors = torch.linalg.eigh(metric)
        factor = vectors * values.clamp_min(0).sqrt()
    return factor
