"""The LM evaluation harness as a library: its tasks fed with our items, and a live model for it to score.

The harness passes causal models no attention mask, so the padding of a batch would enter a dynamic method's
probe and history; `LiveModel` runs the passes with the real one. What a task's prompt is and how an answer
counts stays the harness' own.
"""

import contextlib
import copy
import io
import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from torch import nn
from transformers import PreTrainedTokenizerBase

from probeprune.errors import UsageError, first_line
from probeprune.evaluation.likelihood import Order, Request, Scores, make_batches, score
from probeprune.evaluation.task_data import Task, load_rows
from probeprune.quiet import quiet_libraries


@dataclass(frozen=True)
class Answers:
    """What a model answered to the items of a task, in their order.

    Attributes:
        correct: whether the right option is the likeliest.
        correct_norm: likewise with the options' lengths divided out; None where the task has no such metric.
        loglikelihoods: of every option, in nats.
        scores: the same as one list, and what they cost.
    """

    correct: tuple[bool, ...]
    correct_norm: tuple[bool, ...] | None
    loglikelihoods: tuple[tuple[float, ...], ...]
    scores: Scores


class LiveModel(HFLM):
    """A model object as the harness takes it, with or without a method attached.

    Also for `lm_eval.simple_evaluate(model=LiveModel(...), tasks=[...])` on any other task that scores
    continuations.

    Args:
        model: a causal LM of a supported family, in eval mode.
        tokenizer: the model's; it is not changed.
        batch_size: requests a forward pass.
        order: of the requests, see `make_batches`. Requests that have the same context are not merged.
        progress: called with (requests done, requests in all).

    Attributes:
        progress: as given.
        scores: what the last call got and cost.
    """

    scores: Scores

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int = 16,
        order: Order = "length",
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        with quiet():
            super().__init__(
                pretrained=model,
                # The harness gives a tokenizer without a padding token one; the caller's stays as it is.
                tokenizer=copy.deepcopy(tokenizer),
                backend="causal",
                batch_size=batch_size,
                logits_cache=False,
            )
        self._order = order
        self.progress = progress

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """The one method through which the harness scores tokens."""
        pairs = [Request(context, continuation) for _, context, continuation in requests]
        batches = make_batches(pairs, override_bs or self.batch_size, self._order)
        self.scores = score(self.model, pairs, batches, max_length=self.max_length, progress=self.progress)
        return list(zip(self.scores.loglikelihoods, self.scores.greedy, strict=True))


def load_task(task: Task, *, limit: int | None = None, source: str = "local") -> ConfigurableTask:
    """The harness' own task object, with the requests of its first `limit` items built.

    Args:
        task: which.
        limit: all items when None.
        source: `local`, the items that ship with the package, or `hub`, the harness' own data set.

    Raises:
        UsageError: an unknown source, a damaged file, or a data set that the hub does not give.
    """
    if source not in ("local", "hub"):
        raise UsageError(f"unknown source of items {source!r}; choose local or hub.")
    folder = Path(lm_eval.tasks.__file__).parent / task.folder
    changes: dict[str, Any] = {}
    if source == "local":
        rows = datasets.Dataset.from_list(load_rows(task)[:limit])
        changes = {
            "custom_dataset": lambda **_: {"local": rows},
            "training_split": None,
            "validation_split": "local",
            "test_split": None,
        }
    try:
        with quiet(bars=source == "hub"):
            # That folder alone: reading all of the harness' task files takes ten seconds.
            manager = lm_eval.tasks.TaskManager(include_path=folder, include_defaults=False)
            # Only as a member of a group does a task take changes to its settings.
            group = {"group": "probeprune", "task": [{"task": task.name, **changes}]}
            loaded = manager.load(group)["tasks"][task.name]
    except (OSError, ValueError, RuntimeError) as error:
        if source == "local":
            raise
        raise UsageError(
            f"the harness' data set for {task.name} could not be read from the hub: {first_line(error)}; "
            "check the network, or use the items that ship with the package (source local)."
        ) from error
    with quiet(), contextlib.redirect_stderr(io.StringIO()):  # a bar that cannot be switched off
        loaded.build_all_requests(limit=limit)
    return loaded


def questions(task: ConfigurableTask) -> list[list[Instance]]:
    """A loaded task's requests, one list an item, one request an option."""
    return [
        list(options)
        for _, options in itertools.groupby(task.instances, key=lambda instance: instance.doc_id)
    ]


def right_option(task: ConfigurableTask, item: dict[str, Any]) -> int:
    """Which option is right. Where options stand in the context, the harness keeps that in its text."""
    return int(task.doc_to_text(item) if task.multiple_input else task.doc_to_target(item))


def ask(lm: LiveModel, task: ConfigurableTask) -> Answers:
    """Score a loaded task as the harness does, its requests in one call."""
    results = iter(lm.loglikelihood(task.instances, disable_tqdm=True))
    correct, correct_norm, likelihoods = [], [], []
    for options in questions(task):
        answers = [next(results) for _ in options]
        metrics = task.process_results(options[0].doc, answers)
        correct.append(metrics["acc"] == 1)
        correct_norm.append(metrics.get("acc_norm") == 1)
        likelihoods.append(tuple(likelihood for likelihood, _ in answers))
    has_norm = "acc_norm" in task.aggregation()
    return Answers(tuple(correct), tuple(correct_norm) if has_norm else None, tuple(likelihoods), lm.scores)


@contextlib.contextmanager
def quiet(*, bars: bool = False) -> Iterator[None]:
    """No log lines below errors inside, and no progress bars of data sets unless `bars` is True."""
    logger = logging.getLogger("lm_eval")
    level, hide = logger.level, not bars and not datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    if hide:
        datasets.disable_progress_bars()
    try:
        with quiet_libraries(bars=bars):
            yield
    finally:
        logger.setLevel(level)
        if hide:
            datasets.enable_progress_bars()
