"""What a reference model predicts, kept, so that others can be compared with it when it is gone.

Of each token's distribution the likeliest tokens are told apart and all others are one, so the KL divergence
is a little less than that of the whole distributions. Knows nothing of pruning.
"""

import statistics
from dataclasses import dataclass
from pathlib import Path

import torch

from probeprune.algebra.divergence import Target, divergence, target
from probeprune.evaluation.agreement import Agreement
from probeprune.evaluation.perplexity import mean_error
from probeprune.files import load_tensors, save_tensors
from probeprune.processes import shares

TOP_K = 32
"""Number of likeliest tokens that are told apart."""
_TOKENS = 256
"""Number of tokens compared at a time: copies of their logits are small beside the logits at hand."""


@dataclass(frozen=True, eq=False)
class Predictions:
    """The next-token distributions of a reference, for all predicted tokens of some windows in order.

    Attributes:
        ids: the likeliest tokens of each distribution, the likeliest first: IntTensor (tokens, k).
        logs: logarithms of their probabilities, and last that of all others together: (tokens, k + 1).
    """

    ids: torch.Tensor
    logs: torch.Tensor

    def save(self, path: Path) -> None:
        """Write them to a safetensors file."""
        save_tensors(path, {"ids": self.ids, "logs": self.logs}, {})

    @classmethod
    def load(cls, path: Path) -> "Predictions | None":
        """Those in a file; None where it is not there or cannot be read."""
        found = load_tensors(path)
        return None if found is None or found[0].keys() != {"ids", "logs"} else cls(**found[0])


class Recorder:
    """Takes down the predictions of a reference; `perplexity(see=...)` calls it."""

    def __init__(self, tokens: int) -> None:
        self._ids = torch.zeros(tokens, 0, dtype=torch.int32)
        self._logs = torch.zeros(tokens, 1)

    def __call__(self, first: int, logits: torch.Tensor) -> None:
        """Add the predictions of tokens `first` and on."""
        k = min(TOP_K, logits.shape[-1] - 1)
        self._widen(k)
        for few in logits.split(_TOKENS):
            found = target(few, top_k=k)
            assert found.ids is not None
            self._ids[first : first + len(few)] = found.ids.to("cpu", torch.int32)
            self._logs[first : first + len(few)] = found.logs.cpu()
            first += len(few)

    def _widen(self, k: int) -> None:
        """Make room for `k` tokens of each distribution, where there is none yet."""
        if not self._ids.shape[1]:
            self._ids = self._ids.new_zeros(len(self._ids), k)
            self._logs = self._logs.new_zeros(len(self._logs), k + 1)

    def predictions(self) -> Predictions:
        """All of them, also those that other processes have seen."""
        self._widen(max(shares.gathered([self._ids.shape[1]])))  # of a process that has seen no token
        shares.add_up(self._ids, self._logs)
        return Predictions(self._ids, self._logs)


class Comparison:
    """Compares a model's predictions with a reference's; `perplexity(see=...)` calls it.

    Attributes:
        reference: the predictions to compare with.
        length: number of predicted tokens of a window.
    """

    def __init__(self, reference: Predictions, length: int) -> None:
        self.reference, self.length = reference, length
        self._same = torch.zeros(len(reference.ids), dtype=torch.float64)
        self._apart = torch.zeros(len(reference.ids), dtype=torch.float64)

    def __call__(self, first: int, logits: torch.Tensor) -> None:
        """Compare the predictions of tokens `first` and on."""
        for few in logits.split(_TOKENS):
            rows = slice(first, first + len(few))
            ids = self.reference.ids[rows].to(few.device, torch.long)
            wanted = Target(self.reference.logs[rows].to(few.device), ids)
            self._same[rows] = (few.argmax(-1) == ids[:, 0]).double().cpu()
            self._apart[rows] = divergence(few, wanted).double().cpu()
            first += len(few)

    def agreement(self, divided: bool) -> Agreement:
        """How far they agree.

        Args:
            divided: whether each process has seen its own windows alone.
        """
        if divided:
            shares.add_up(self._same, self._apart)
        hits, apart = (x.view(-1, self.length).mean(1).tolist() for x in (self._same, self._apart))
        return Agreement(
            top1=statistics.fmean(hits),
            divergence=max(statistics.fmean(apart), 0.0),  # of equal models it is a rounding error
            top1_error=mean_error(hits),
            divergence_error=mean_error(apart),
            tokens=len(self._same),
        )
