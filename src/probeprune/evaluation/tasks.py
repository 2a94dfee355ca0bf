"""Accuracy of a causal LM, as it stands, on the seven commonsense tasks of the published tables, zero-shot.

Two protocols that must not share a column: `harness`, what the LM evaluation harness measures, and
`published`, what the research code behind Probe Pruning's table does. Knows nothing of pruning.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from torch import nn
from transformers import PreTrainedTokenizerBase

from probeprune.errors import UsageError, require_positive
from probeprune.evaluation.likelihood import Order
from probeprune.evaluation.task_data import TASKS, Metric, get_task
from probeprune.model.passes import check_eval

Protocol = Literal["harness", "published"]


@dataclass(frozen=True)
class TaskResult:
    """Accuracy on one task. All shares lie in [0, 1].

    Attributes:
        task: the harness' name for it.
        protocol: how it was scored.
        source: where the items came from.
        items: how many were scored, from the front of the split.
        acc: share of items whose right option is the likeliest.
        acc_error: its standard error over items; NaN for a single item.
        acc_norm: likewise with each option's log-likelihood divided by its length, in characters under
            `harness`, in tokens under `published`; None for the tasks that the harness defines none for.
        acc_norm_error: its standard error.
        correct: item by item, for paired comparisons.
        correct_norm: likewise for `acc_norm`.
        loglikelihoods: of every option of every item, in nats.
        tokens: real tokens run through the model.
        seconds: spent in forward passes.
        batches: how many there were.
        batch_size: options a batch at most; all of them from this task.
        order: how options were put into batches: the longest first, or as given.
        padding: share of the positions run that were padding, always on the right and masked.
        truncated: options whose prompt lost its front to fit the model.
    """

    task: str
    protocol: Protocol
    source: str
    items: int
    acc: float
    acc_error: float
    acc_norm: float | None
    acc_norm_error: float | None
    correct: tuple[bool, ...]
    correct_norm: tuple[bool, ...] | None
    loglikelihoods: tuple[tuple[float, ...], ...]
    tokens: int
    seconds: float
    batches: int
    batch_size: int
    order: Order
    padding: float
    truncated: int

    @property
    def metric(self) -> Metric:
        """The one that published tables take; normalised for all seven tasks in the published protocol."""
        return "acc_norm" if self.protocol == "published" else TASKS[self.task].metric

    @property
    def value(self) -> float:
        """Accuracy by that metric."""
        return cast(float, getattr(self, self.metric))

    @property
    def error(self) -> float:
        """Standard error of `value`."""
        return cast(float, getattr(self, f"{self.metric}_error"))


def evaluate_task(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    *,
    limit: int | None = None,
    batch_size: int | None = None,
    source: Literal["local", "hub"] = "local",
    protocol: Protocol = "harness",
    order: Order | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TaskResult:
    """Score one task.

    With a dynamic method attached, every batch decides what is pruned and moves the history: the result
    depends on batch size and order. Attach the method anew for each task, or history goes on from the last.

    Example:
        >>> for task in TASKS:
        ...     with probeprune.attach(model, "probe", ratio=0.2, statistics=statistics):
        ...         results.append(evaluate_task(model, tokenizer, task))

    Args:
        model: a causal LM of a supported family, in eval mode, with or without a method attached.
        tokenizer: the model's.
        task: a name from `TASKS`.
        limit: the first so many items; all when None.
        batch_size: options a forward pass; 16, or under `published` 20, when None.
        source: `local`, items that ship with the package, or `hub`, the harness' own data set.
        protocol: see above.
        order: of the options: `length` (the longest first; the default) or `given` (the only one of
            `published`).
        progress: called with (options done, options in all).

    Raises:
        UsageError: a model in training mode, an unknown task or setting, a task's file that is missing or
            damaged, a data set that the hub does not give.
        FloatingPointError: a log-likelihood that is not finite.
    """
    spec = get_task(task)
    if protocol not in ("harness", "published"):
        raise UsageError(f"unknown protocol {protocol!r}; choose harness or published.")
    if protocol == "published" and order not in (None, "given"):
        raise UsageError("the published protocol keeps the given order; leave order out.")
    if limit is not None:
        require_positive(limit=limit)
    check_eval(model, "tasks are scored on")

    # Two seconds' import that other commands need not pay.
    from probeprune.evaluation import harness, published

    if order is None:
        order = "given" if protocol == "published" else "length"
    if batch_size is None:
        batch_size = published.BATCH_SIZE if protocol == "published" else 16
    lm = harness.LiveModel(model, tokenizer, batch_size=batch_size, order=order, progress=progress)
    loaded = harness.load_task(spec, limit=limit, source=source)
    answers = published.ask(lm, loaded) if protocol == "published" else harness.ask(lm, loaded)
    acc, acc_error = _share(answers.correct)
    acc_norm, acc_norm_error = (None, None) if answers.correct_norm is None else _share(answers.correct_norm)
    return TaskResult(
        task=task,
        protocol=protocol,
        source=source,
        items=len(answers.correct),
        acc=acc,
        acc_error=acc_error,
        acc_norm=acc_norm,
        acc_norm_error=acc_norm_error,
        correct=answers.correct,
        correct_norm=answers.correct_norm,
        loglikelihoods=answers.loglikelihoods,
        tokens=answers.scores.tokens,
        seconds=answers.scores.seconds,
        batches=answers.scores.batches,
        batch_size=batch_size,
        order=order,
        padding=answers.scores.padding,
        truncated=answers.scores.truncated,
    )


def _share(hits: Sequence[bool]) -> tuple[float, float]:
    """The share of hits and its standard error, the harness' own (sample variance over count)."""
    share = sum(hits) / len(hits)
    return share, math.sqrt(share * (1 - share) / (len(hits) - 1)) if len(hits) > 1 else math.nan
