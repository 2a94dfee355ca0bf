"""Kullback-Leibler divergence between next-token distributions, exact or over the most likely tokens.

Tensors in, tensors out. Logits are (tokens, vocabulary) and keep their dtype; all logarithms are natural.
"""

from dataclasses import dataclass
from typing import Literal

import torch

Direction = Literal["forward", "reverse", "mixed"]
"""`forward`: KL(target || predicted), which covers all that the target holds possible. `reverse`:
KL(predicted || target), which keeps to what the target holds likely. `mixed`: the mean of both."""


@dataclass(frozen=True)
class Target:
    """The distributions that predictions are compared with.

    Attributes:
        logs: logarithms of probabilities (tokens, vocabulary); with `ids`, (tokens, k + 1): those of
            the k tokens, and last of all others together.
        ids: the k most likely tokens of each distribution, LongTensor (tokens, k); None for all.
    """

    logs: torch.Tensor
    ids: torch.Tensor | None = None


def target(logits: torch.Tensor, temperature: float = 1.0, top_k: int | None = None) -> Target:
    """The distributions of some logits.

    Args:
        logits: (tokens, vocabulary).
        temperature: what logits are divided by; above 0.
        top_k: how many of the most likely tokens are told apart; None, or as many as there are, for all.
    """
    if top_k is None or top_k >= logits.shape[-1]:
        return Target(_logs(logits, temperature, None))
    ids = logits.topk(top_k, dim=-1).indices
    return Target(_logs(logits, temperature, ids), ids)


def divergence(
    logits: torch.Tensor,
    wanted: Target,
    direction: Direction = "forward",
    temperature: float = 1.0,
) -> torch.Tensor:
    """The divergence between predicted and wanted distribution of each token, in nats: (tokens,).

    It is multiplied by the square of the temperature, so that gradients keep their size (Hinton et al., 2015,
    section 2.1).

    Args:
        logits: of the predicted distributions (tokens, vocabulary).
        wanted: made with the same temperature.
        direction: see `Direction`.
        temperature: what logits are divided by; above 0.
    """
    logs = _logs(logits, temperature, wanted.ids)
    if direction == "forward":
        weights = wanted.logs.exp()
    elif direction == "reverse":
        weights = -logs.exp()
    else:
        weights = (wanted.logs.exp() - logs.exp()) / 2
    return temperature**2 * (weights * (wanted.logs - logs)).sum(-1)


def _logs(logits: torch.Tensor, temperature: float, ids: torch.Tensor | None) -> torch.Tensor:
    """Logarithms of probabilities: of all tokens, or of those in `ids` and of all others together."""
    scaled = logits if temperature == 1 else logits / temperature
    if ids is None:
        return scaled.log_softmax(-1)
    rest = scaled.scatter(-1, ids, float("-inf")).logsumexp(-1, keepdim=True)
    return torch.cat([scaled.gather(-1, ids), rest], -1) - scaled.logsumexp(-1, keepdim=True)
