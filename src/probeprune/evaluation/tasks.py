"""Zero-shot accuracy of a causal LM on the seven commonsense tasks of the published tables.

There are two protocols, whose results must not share a column: `harness` is that of the LM evaluation
harness, `published` that of the research code behind Probe Pruning's table. Knows nothing of pruning.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast, get_args

from torch import nn
from transformers import PreTrainedTokenizerBase

from probeprune.errors import BadValue, UsageError, unknown
from probeprune.evaluation.likelihood import Order
from probeprune.evaluation.task_data import TASKS, Metric, get_task
from probeprune.model.passes import check_eval
from probeprune.progress import Progress, silent
from probeprune.ranges import check_fields

if TYPE_CHECKING:
    from probeprune.evaluation.harness import Answers

Protocol = Literal["harness", "published"]


@dataclass(frozen=True)
class TaskSettings:
    """How a task is scored. Raises `UsageError` for an unknown protocol or order, or a number
    out of range."""

    limit: int | None = None
    """Score only the first `limit` items; None for all."""
    batch_size: int | None = None
    """Options per forward pass; None for 16, or 20 under `published`."""
    source: Literal["local", "hub"] = "local"
    """`local` for the items that ship with the package, `hub` for the harness' own data set."""
    protocol: Protocol = "harness"
    """See the top of this file."""
    order: Order | None = None
    """Order of the options: `length` (the longest first; the default) or `given` (the only one of
    `published`)."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.protocol not in get_args(Protocol):
            raise BadValue("protocol", unknown("protocol", self.protocol, get_args(Protocol)))
        if self.protocol == "published" and self.order not in (None, "given"):
            raise UsageError("the published protocol keeps the given order; leave order out.")


@dataclass(frozen=True)
class TaskResult:
    """Accuracy on one task. All shares lie in [0, 1].

    Attributes:
        task: the harness' name of the task.
        protocol: the protocol it was scored with.
        source: where the items came from (`local` or `hub`).
        items: number of items scored, from the beginning of the split.
        acc: share of items whose right option is the most likely one.
        acc_error: standard error of `acc` over items; NaN for a single item.
        acc_norm: the same with each log-likelihood divided by the option's length, in characters under
            `harness`, in tokens under `published`; None for tasks without this metric in the harness.
        acc_norm_error: standard error of `acc_norm`.
        correct: for each item whether it counts in `acc`, for paired comparisons.
        correct_norm: the same for `acc_norm`.
        loglikelihoods: log-likelihood of each option of each item, in nats.
        tokens: number of real tokens run through the model.
        seconds: total time of the forward passes.
        batches: number of forward passes.
        batch_size: the most options per batch; a batch holds options of this task only.
        order: order in which options were put into batches: the longest first, or as given.
        padding: share of padding among all positions run; it is always on the right and masked.
        truncated: number of options whose prompt lost its beginning to fit the model.
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
        """The metric of published tables; `acc_norm` for all seven tasks under the published protocol."""
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
    settings: TaskSettings | None = None,
    *,
    progress: Progress = silent,
) -> TaskResult:
    """Score one task.

    With a dynamic method attached, every batch decides which units stay and updates the history, so the
    result depends on batch size and order. Attach the method again for each task; otherwise the history of
    one task carries over to the next.

    Example:
        >>> for task in TASKS:
        ...     with probeprune.attach(model, "probe", ratio=0.2, calibration=prepared):
        ...         results.append(evaluate_task(model, tokenizer, task))

    Args:
        model: a causal LM of a supported family, in eval mode, with or without a method attached.
        tokenizer: the model's tokenizer.
        task: a name from `TASKS`.
        settings: how to score; None for the defaults.
        progress: called with (`scoring`, options done, options in all).

    Raises:
        UsageError: a model in training mode, an unknown task or setting, a task file that is missing or
            damaged, a data set that cannot be read from the hub.
        FloatingPointError: a log-likelihood that is not finite.
    """
    spec, settings = get_task(task), settings or TaskSettings()
    check_eval(model, "tasks are scored on")

    # Imported here: it takes two seconds, which other commands need not pay.
    from probeprune.evaluation import harness, published

    as_published = settings.protocol == "published"
    order = settings.order or ("given" if as_published else "length")
    batch_size = settings.batch_size
    if batch_size is None:
        batch_size = published.BATCH_SIZE if as_published else 16
    lm = harness.LiveModel(model, tokenizer, batch_size=batch_size, order=order, progress=progress)
    loaded = harness.load_task(spec, limit=settings.limit, source=settings.source)
    answers = published.ask(lm, loaded) if as_published else harness.ask(lm, loaded)
    return _result(task, settings, batch_size, order, answers)


def _result(
    task: str, settings: TaskSettings, batch_size: int, order: Order, answers: "Answers"
) -> TaskResult:
    """The result of a task with these answers."""
    acc, acc_error = _share(answers.correct)
    acc_norm, acc_norm_error = (None, None) if answers.correct_norm is None else _share(answers.correct_norm)
    return TaskResult(
        task=task,
        protocol=settings.protocol,
        source=settings.source,
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
    """The share of hits and its standard error (sample variance over count, as in the harness)."""
    share = sum(hits) / len(hits)
    return share, math.sqrt(share * (1 - share) / (len(hits) - 1)) if len(hits) > 1 else math.nan
