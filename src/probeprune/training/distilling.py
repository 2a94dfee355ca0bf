"""Distillation: a loss that brings a model's next-token distribution close to a teacher's.

The teacher is a second model in memory, the dense one that a pruned model came from, say. It reads the same
tokens in the same process, and its head runs by the same parts of tokens. Knows nothing of where a teacher is
found.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from probeprune import processes
from probeprune.algebra.divergence import divergence, target
from probeprune.errors import Notice, UsageError
from probeprune.model.decoding import next_token_logits, vocabulary
from probeprune.model.families import find_family
from probeprune.model.passes import check_eval, find_decoder
from probeprune.training.losses import PartLoss
from probeprune.training.settings import Distillation


class DistillLoss:
    """KL divergence to a teacher's next-token distribution, a `TokenLoss`.

    With `top_k` the teacher's distribution is kept between the two passes over a part; without it, it is
    computed again, because it is as large as the logits.
    """

    def __init__(self, teacher: PreTrainedModel, settings: Distillation) -> None:
        self.teacher, self.settings = teacher, settings

    def __call__(self, ids: torch.Tensor) -> Callable[[slice], PartLoss]:
        """See `TokenLoss`."""
        teacher, settings = self.teacher, self.settings
        with torch.no_grad():
            hidden = find_decoder(teacher)(input_ids=ids, use_cache=False)[0][:, :-1].flatten(0, 1)

        def part(tokens: slice) -> PartLoss:
            few = hidden[tokens]

            @torch.no_grad()
            def wanted() -> Any:
                return target(next_token_logits(teacher, few), settings.temperature, settings.top_k)

            kept = None if settings.top_k is None else wanted()

            def compare(logits: torch.Tensor) -> torch.Tensor:
                goal = wanted() if kept is None else kept
                return divergence(logits, goal, settings.direction, settings.temperature).sum()

            return compare

        return part


def check_teacher(model: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Raise `UsageError` for a teacher that cannot teach this model."""
    if teacher is model:
        raise UsageError("the teacher is the model that is trained; open the dense model a second time.")
    check_eval(teacher, "distillation needs")
    own, other = (vocabulary(m) for m in (model, teacher))
    if own != other:
        raise UsageError(
            f"the teacher's vocabulary has {other} tokens and the model's {own}; give the dense model that "
            "this one was pruned from."
        )
    own_device, device = (next(m.parameters()).device for m in (model, teacher))
    if own_device != device:
        raise UsageError(
            f"the teacher is on {device} and the model on {own_device}; open both on one device."
        )


def say_unlike(model: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Warn with a `Notice` where no cut of the teacher can have made the model, by family and hidden size."""
    unlike = _unlike(model, teacher)
    if unlike and processes.is_first():
        warnings.warn(
            Notice(f"the model is no pruned version of its teacher ({unlike}); it is trained all the same."),
            stacklevel=2,
        )


def _unlike(model: PreTrainedModel, teacher: PreTrainedModel) -> str:
    """In what the model differs from every cut of the teacher; empty if in nothing."""
    family, origin = find_family(model), find_family(teacher)
    twin = () if origin.twin is None else (origin.twin.model_type,)
    if family != origin and not set(twin) & set(family.model_types):
        return f"{family.name}, and {origin.name}"
    own, other = (m.get_input_embeddings().embedding_dim for m in (model, teacher))
    return "" if own == other else f"hidden size {own}, and {other}"
