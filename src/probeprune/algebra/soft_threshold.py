"""A soft choice under a budget: one threshold over scores, with a smooth step in place of a hard one.

The threshold follows from the budget, so that what leaves adds up to it at every temperature, and gradients
know that one unit stays at the cost of others. Tensors in, tensors out.
"""

from typing import Any

import torch

_HALVINGS = 60
"""Of the interval in which the threshold is looked for: to the last bit of float64 but for rounding."""


def soft_keep(scores: torch.Tensor, costs: torch.Tensor, gone: float, temperature: float) -> torch.Tensor:
    """How far each unit stays, `g_i = sigmoid((s_i - t) / T)`: by `t`, `sum_i c_i (1 - g_i)` is what must go.

    Its gradient follows `t` too: `dL/ds_i = w_i (dL/dg_i - m c_i)`, where `w_i = g_i (1 - g_i) / T` and
    `m = sum_i w_i dL/dg_i / sum_i w_i c_i`, the multiplier of the budget.

    Args:
        scores: `s` (units,).
        costs: `c` (units,), above 0.
        gone: the sum of costs to remove, less than all; 0 or less keeps all units whole.
        temperature: `T`, above 0; towards 0 the choice becomes a hard one.
    """
    if gone <= 0:
        return torch.ones_like(scores)
    kept: torch.Tensor = _SoftKeep.apply(scores, costs, gone, temperature)
    return kept


class _SoftKeep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, scores: torch.Tensor, costs: torch.Tensor, gone: float, temperature: float
    ) -> torch.Tensor:
        s, c = scores.double(), costs.double()
        low, high = s.min() - 40 * temperature, s.max() + 40 * temperature
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            too_few = (c * ((middle - s) / temperature).sigmoid()).sum() < gone
            # Both ends on the device: nothing waits for it.
            low, high = torch.where(too_few, middle, low), torch.where(too_few, high, middle)
        kept = ((s - (low + high) / 2) / temperature).sigmoid()
        ctx.save_for_backward(kept * (1 - kept) / temperature, c)
        return kept.to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        slope, c = ctx.saved_tensors
        gradient = gradients[0].double()
        weight = (slope * c).sum()
        multiplier = (slope * gradient).sum() / weight.clamp_min(torch.finfo(weight.dtype).tiny)
        return (slope * (gradient - multiplier * c)).to(gradients[0].dtype), None, None, None
