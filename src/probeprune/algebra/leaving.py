"""The order in which terms leave a sum at the least cost, the others rescaled to make up for them.

Tensors in, tensors out. Knows nothing of models.
"""

import torch

DAMPING = 1e-3
"""Damping of the change of a term's scale, as a share of the term's own second moment."""
_FLOOR = 1e-6
"""Least second moment that damping is a share of, as a share of the largest: terms may be zero."""


@torch.no_grad()
def leaving_order(moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The order in which terms leave a sum, and what the sum has lost by then.

    When the terms `S` have left, and the others were given the best scales, the sum is off by

        D(S) = min_b E |sum_{e in S} delta_e - sum_{f not in S} b_f c_f|^2 + sum_{f not in S} b_f^2 L_f

    with `delta_e` the change of the sum when term `e` leaves alone, whatever takes its place, `c_f` what term
    `f` adds, `1 + b_f` its scale, and `L_f` `DAMPING` times `E |c_f|^2`. Changes of several terms are taken
    to add up. The term leaves next that makes `D` least; ties go to the lower index.

    Takes n^4 / 4 multiplications.

    Args:
        moment: products of changes and terms per token, summed over the entries of the sum: (2 n, 2 n), first
            all `delta`, then all `c`.

    Returns:
        Indices of the terms, LongTensor (n,), the first to leave first; and the largest `D` so far when each
        has left (n,), float64, in the same order.
    """
    moment = moment.double()
    n = len(moment) // 2
    changes, mixed, terms = moment[:n, :n], moment[n:, :n], moment[n:, n:]
    own = terms.diagonal()
    largest = float(own.max()) or 1.0
    strength = DAMPING * own.clamp_min(_FLOOR * largest)
    inverse = torch.linalg.inv(terms + strength.diag())
    kept = torch.arange(n, device=moment.device)
    gone = torch.zeros(n, dtype=torch.float64, device=moment.device)  # 1 for the terms that have left
    order, damages = [], [torch.zeros_like(gone[0])]
    for _ in range(n):
        lost = changes @ gone
        # Of each candidate: the error without new scales, what new scales of all regain, and of its own none.
        error = gone @ lost + 2 * lost[kept] + changes.diagonal()[kept]
        right = (mixed @ gone)[kept, None] + mixed[kept][:, kept]
        scales = inverse @ right
        regained = (right * scales).sum(0) - scales.diagonal().square() / inverse.diagonal()
        damage = error - regained
        first = damage.argmin()
        order.append(kept[first])
        damages.append(torch.maximum(damages[-1], damage[first]))
        gone[kept[first]] = 1
        column = inverse[:, first]
        inverse = inverse - torch.outer(column, column) / column[first]
        stay = torch.arange(len(kept), device=kept.device) != first
        kept, inverse = kept[stay], inverse[stay][:, stay]
    return torch.stack(order), torch.stack(damages[1:])
