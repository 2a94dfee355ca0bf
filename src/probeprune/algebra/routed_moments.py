"""Streaming moments of the experts of one layer, each over the tokens that are routed to it.

Everything is float32 and merges exactly. Tensors in, tensors out. Knows nothing of models.
"""

from collections.abc import Callable, Mapping

import torch


class RoutedMoments:
    """What the tokens routed to each expert say of it.

    Attributes:
        samples: float tensor (), number of sequences added.
        tokens: float tensor (), number of tokens added, each routed to several experts.
        count: (experts,), number of tokens routed to each expert.
        mean: (experts, n), mean of the coupled activation `z` over those tokens.
        m2: (experts, n), sum over them of the squared distance from the mean.
        contribution: (experts,), sum over them of the 2-norm of what the expert adds to the layer's output.
        exchange: (2 experts, 2 experts), sums over all tokens of the products of what the layer's output
            changes by when an expert leaves, and of what experts add (`calibration/leaving.py`); (0, 0) where
            nobody has asked for it.
    """

    def __init__(
        self, experts: int, width: int, device: torch.device | str = "cpu", exchange: bool = False
    ) -> None:
        self.samples = torch.zeros((), dtype=torch.float32, device=device)
        self.tokens = torch.zeros((), dtype=torch.float32, device=device)
        self.count = torch.zeros(experts, dtype=torch.float32, device=device)
        self.mean = torch.zeros(experts, width, dtype=torch.float32, device=device)
        self.m2 = torch.zeros(experts, width, dtype=torch.float32, device=device)
        self.contribution = torch.zeros(experts, dtype=torch.float32, device=device)
        both = 2 * experts if exchange else 0
        self.exchange = torch.zeros(both, both, dtype=torch.float32, device=device)

    @torch.no_grad()
    def see(self, samples: int, tokens: int) -> None:
        """Count sequences and tokens, wherever they are routed."""
        self.samples += samples
        self.tokens += tokens

    @torch.no_grad()
    def update(self, expert: int, z: torch.Tensor, contributions: torch.Tensor) -> None:
        """Add the tokens of a batch that are routed to one expert.

        Args:
            expert: its index.
            z: their coupled activations (tokens, n).
            contributions: 2-norms of what it adds for them to the layer's output (tokens,).
        """
        if not len(z):
            return
        z = z.float()
        mean = z.mean(0)
        before = self.count[expert].clone()
        total = before + len(z)
        delta = mean - self.mean[expert]
        # Chan, Golub and LeVeque 1979: a mean of squares minus a squared mean would cancel.
        self.m2[expert] += (z - mean).square_().sum(0) + delta.square() * (before * len(z) / total)
        self.mean[expert] += delta * (len(z) / total)
        self.count[expert] = total
        self.contribution[expert] += contributions.float().sum()

    @torch.no_grad()
    def pool(self, add_up: Callable[..., None]) -> None:
        """Merge with the moments that others hold of other tokens, all at once, in place.

        Args:
            add_up: replaces tensors by their sums over all holders, in place; called by each of them.
        """
        count, mean, total = self.count.clone(), self.mean, self.mean * self.count[:, None]
        add_up(self.samples, self.tokens, self.count, self.contribution, total, self.exchange)
        self.mean = total / self.count.clamp_min(1)[:, None]
        self.m2 += count[:, None] * (mean - self.mean).square()
        add_up(self.m2)

    @property
    def variance(self) -> torch.Tensor:
        """Variance of each channel over the tokens of its expert: (experts, n)."""
        return self.m2 / self.count.clamp_min(1)[:, None]

    @property
    def sample_energy(self) -> torch.Tensor:
        """`e_j`: mean over samples of `z_j^2`, summed over the tokens that are the expert's: (experts, n)."""
        return (self.m2 + self.count[:, None] * self.mean.square()) / self.samples.clamp_min(1)

    @property
    def mean_contribution(self) -> torch.Tensor:
        """Mean over each expert's tokens of the norm of what it adds: (experts,), 0 without tokens."""
        return self.contribution / self.count.clamp_min(1)

    def state(self) -> dict[str, torch.Tensor]:
        """All tensors by name, for `from_state`."""
        return dict(vars(self))

    def to(self, device: torch.device | str) -> "RoutedMoments":
        """The same moments on `device`."""
        return RoutedMoments.from_state({k: v.to(device) for k, v in self.state().items()})

    @classmethod
    def from_state(cls, state: Mapping[str, torch.Tensor]) -> "RoutedMoments":
        """The inverse of `state`."""
        moments = cls(0, 0)
        for name in vars(moments):
            setattr(moments, name, state[name])
        return moments
