"""Measure a model, alone or beside a base model: perplexity, tasks, agreement and greedy text.

What both were measured on is paired: the error of a difference is that over windows, items or prompts, which
is far smaller than those of both figures. Under a dynamic method every measurement begins with the method
attached anew, so none depends on those before it.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from probeprune.data.corpora import load_corpus
from probeprune.data.windows import BATCH_SIZE, Text, evaluation_windows
from probeprune.errors import UsageError
from probeprune.evaluation.greedy import greedy_agreement, greedy_texts
from probeprune.evaluation.perplexity import Perplexity, mean_error, perplexity
from probeprune.evaluation.predictions import TOP_K, Comparison, Recorder
from probeprune.evaluation.task_data import TASKS
from probeprune.evaluation.tasks import TaskSettings, evaluate_task
from probeprune.foreign.extras import need
from probeprune.model.decoding import vocabulary
from probeprune.model.loading import LoadedModel
from probeprune.model.offloading import is_offloaded
from probeprune.progress import Progress, silent
from probeprune.ranges import check_fields


@dataclass(frozen=True)
class Wanted:
    """What is measured. Raises `UsageError` for values out of range, and for nothing at all."""

    texts: tuple[Text, ...] = ()
    """For perplexity and, with a base model, agreement."""
    tasks: tuple[str, ...] = ()
    """Names of `TASKS`, or of any other task of the LM evaluation harness."""
    limit: int | None = None
    """Items of each task; None for all."""
    prompts: Text | None = None
    """The windows that greedy texts continue, with a base model; None for no greedy texts."""
    new_tokens: int = 64
    """Tokens of a greedy text."""
    batch_size: int = BATCH_SIZE
    """Windows, options or prompts per forward pass."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not (self.texts or self.tasks or self.prompts):
            raise UsageError("there is nothing to measure; name a text or a task.")


@dataclass(frozen=True)
class Figure:
    """One measurement.

    Attributes:
        of: the text or task.
        metric: what was measured.
        value, error: of the model, with its standard error.
        base, base_error: of the base model; None where there is none, or the figure compares with it already.
        change, change_error: for perplexity the model's over the base model's, for accuracy the model's minus
            the base model's; with the standard error of the paired differences.
        facts: further facts as JSON values, such as the value of each item.
    """

    of: str
    metric: str
    value: float
    error: float
    base: float | None = None
    base_error: float | None = None
    change: float | None = None
    change_error: float | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """All fields as JSON values; an error that is not known is None."""
        own = {
            k: getattr(self, k) for k in ("value", "error", "base", "base_error", "change", "change_error")
        }
        known = {k: None if v is None or math.isnan(v) else v for k, v in own.items()}
        return {"of": self.of, "metric": self.metric, **known, **self.facts}


def check_tasks(tasks: Sequence[str]) -> None:
    """Raise `UsageError` for tasks without the library that scores them, and for names that it does not
    know."""
    if not tasks:
        return
    need("eval")
    named = [name for name in tasks if name not in TASKS]
    if named:
        from probeprune.evaluation.named_tasks import check_task_names

        check_task_names(named)


Attached = Callable[[], AbstractContextManager[Any]]
"""Attaches the method to the model anew, until the context ends."""


def evaluate(
    loaded: LoadedModel,
    wanted: Wanted,
    *,
    base: LoadedModel | None = None,
    attached: Attached = nullcontext,
    progress: Progress = silent,
) -> list[Figure]:
    """Measure a model, and a base model beside it.

    Args:
        loaded: the model; with `attached`, its dense form.
        wanted: what to measure.
        base: a model of the same vocabulary, which runs before `loaded` does.
        attached: attaches the method; nothing by default.
        progress: called with (name of the work, parts done, parts in total).

    Raises:
        UsageError: a base model of another vocabulary, greedy texts under a method with layers on disk, a
            text that is too short, a task that is not known or whose data cannot be had.
        FloatingPointError: a loss that is not finite.
    """
    check_tasks(wanted.tasks)
    if base is not None and vocabulary(base.model) != vocabulary(loaded.model):
        raise UsageError(
            f"the base model's vocabulary has {vocabulary(base.model)} tokens and the model's "
            f"{vocabulary(loaded.model)}; compare models of one vocabulary."
        )
    writes = base is not None and wanted.prompts is not None
    if writes and attached is not nullcontext and is_offloaded(loaded.model):
        raise UsageError(
            "layers of the model are on disk, where a method writes no text; leave greedy texts out "
            "(--prompts 0), or give more memory."
        )
    run = _Run(loaded, wanted, base, attached, progress)
    figures: list[Figure] = []
    for text in wanted.texts:
        figures += run.text(text)
    if base is not None and wanted.prompts is not None:
        figures += run.greedy(wanted.prompts)
    for name in wanted.tasks:
        figures += run.task(name) if name in TASKS else run.named(name)
    return figures


@dataclass(frozen=True)
class _Run:
    """The models and how they are measured."""

    loaded: LoadedModel
    wanted: Wanted
    base: LoadedModel | None
    attached: Attached
    progress: Progress

    def _windows(self, text: Text) -> Any:
        corpus = load_corpus(text.corpus)
        return evaluation_windows(corpus, self.loaded.tokenizer, length=text.length, limit=text.windows)

    def text(self, text: Text) -> list[Figure]:
        """Perplexity on a text, and agreement with the base model: one pass of each model."""
        windows = self._windows(text)
        name, tokens = text.corpus, windows.shape[1] - 1
        base, seen = self.base, None
        if base is not None:
            recorder = Recorder(len(windows) * tokens)
            other = self._perplexity(base, windows, f"base {name}", recorder)
            seen = Comparison(recorder.predictions(), tokens)
        with self.attached():
            own = self._perplexity(self.loaded, windows, name, seen)
        facts = {"windows": len(windows), "length": text.length, "losses": [round(x, 6) for x in own.losses]}
        if seen is None:
            return [Figure(name, "perplexity", own.value, own.standard_error, facts=facts)]
        apart = [a - b for a, b in zip(own.losses, other.losses, strict=True)]
        factor = math.exp(statistics.fmean(apart))
        facts["base_losses"] = [round(x, 6) for x in other.losses]
        agreed = seen.agreement(divided=False)
        return [
            Figure(
                name,
                "perplexity",
                own.value,
                own.standard_error,
                other.value,
                other.standard_error,
                factor,
                factor * mean_error(apart),
                facts,
            ),
            Figure(name, "top-1 agreement", agreed.top1, agreed.top1_error, facts={"tokens": agreed.tokens}),
            Figure(
                name,
                "KL divergence",
                agreed.divergence,
                agreed.divergence_error,
                facts={"tokens": agreed.tokens, "unit": "nats a token", "likeliest": TOP_K},
            ),
        ]

    def _perplexity(
        self,
        loaded: LoadedModel,
        windows: torch.Tensor,
        name: str,
        see: Callable[[int, torch.Tensor], None] | None,
    ) -> Perplexity:
        size, progress = self.wanted.batch_size, self._named(f"perplexity {name}")
        return perplexity(loaded.model, windows, batch_size=size, see=see, progress=progress)

    def greedy(self, text: Text) -> list[Figure]:
        """Greedy texts beside those of the base model."""
        assert self.base is not None
        prompts, how = self._windows(text), {"new_tokens": self.wanted.new_tokens}
        how["batch_size"] = self.wanted.batch_size
        with self.attached():
            own = greedy_texts(self.loaded.model, prompts, **how, progress=self._named("greedy texts"))
        other = greedy_texts(self.base.model, prompts, **how, progress=self._named("base greedy texts"))
        found = greedy_agreement(own, other)
        facts = {"prompts": found.prompts, "prompt_length": text.length, "new_tokens": found.new_tokens}
        shares = [round(s, 6) for s in found.shares]
        return [
            Figure(
                text.corpus,
                "greedy text, same before the first difference",
                found.same,
                found.same_error,
                facts={**facts, "shares": shares},
            ),
            Figure(text.corpus, "greedy text, exact match", found.exact, found.exact_error, facts=facts),
        ]

    def task(self, name: str) -> list[Figure]:
        """Accuracy on a task whose items ship with the package."""
        settings = TaskSettings(limit=self.wanted.limit, batch_size=self.wanted.batch_size)

        def measured(loaded: LoadedModel, what: str) -> Any:
            show = self._named(f"{what}{name}")
            return evaluate_task(loaded.model, loaded.tokenizer, name, settings, progress=show)

        with self.attached():
            own = measured(self.loaded, "")
        hits = own.correct_norm if own.metric == "acc_norm" else own.correct
        if self.base is None:
            return [_accuracy(name, own.metric, own.value, own.error, hits)]
        other = measured(self.base, "base ")
        others = other.correct_norm if own.metric == "acc_norm" else other.correct
        return [_accuracy(name, own.metric, own.value, own.error, hits, other.value, other.error, others)]

    def named(self, name: str) -> list[Figure]:
        """The figures of any other task of the harness."""
        from probeprune.evaluation.harness import LiveModel
        from probeprune.evaluation.named_tasks import evaluate_named

        def lm(loaded: LoadedModel, what: str) -> LiveModel:
            show = self._named(f"{what}{name}")
            size = self.wanted.batch_size
            return LiveModel(loaded.model, loaded.tokenizer, batch_size=size, progress=show)

        with self.attached():
            own = evaluate_named(lm(self.loaded, ""), name, limit=self.wanted.limit)
        if self.base is None:
            return [_accuracy(r.task, r.metric, r.value, r.error, r.items) for r in own]
        other = evaluate_named(lm(self.base, "base "), name, limit=self.wanted.limit)
        return [
            _accuracy(a.task, a.metric, a.value, a.error, a.items, b.value, b.error, b.items)
            for a, b in zip(own, other, strict=True)
        ]

    def _named(self, name: str) -> Progress:
        return lambda _, done, total: self.progress(name, done, total)


def _accuracy(
    task: str,
    metric: str,
    value: float,
    error: float,
    items: Sequence[float],
    base: float | None = None,
    base_error: float | None = None,
    base_items: Sequence[float] = (),
) -> Figure:
    """A figure that is a mean over items, with the paired difference where both models' items are known."""
    facts = {"items": len(items), "values": [_short(v) for v in items]}
    if base is None:
        return Figure(task, metric, value, error, facts=facts)
    change, change_error = value - base, math.nan
    if items and len(items) == len(base_items):
        change_error = mean_error([float(a) - float(b) for a, b in zip(items, base_items, strict=True)])
    facts["base_values"] = [_short(v) for v in base_items]
    return Figure(task, metric, value, error, base, base_error, change, change_error, facts)


def _short(value: float) -> float:
    return int(value) if value == int(value) else round(float(value), 6)
