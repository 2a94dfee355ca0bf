"""The LM evaluation harness as a library: its tasks with our items, and a model for it to score.

The harness gives causal models no attention mask, so the padding of a batch would enter a dynamic method's
probe and history. `LiveModel` therefore runs the passes itself, with a mask. The harness still decides what a
task's prompt is and how an answer counts.
"""

import contextlib
import copy
import io
import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn
from transformers import PreTrainedTokenizerBase

from probeprune.errors import UsageError, first_line, unknown
from probeprune.evaluation.likelihood import Order, Request, Scores, make_batches, score
from probeprune.evaluation.task_data import Task, load_rows
from probeprune.foreign.extras import extra
from probeprune.foreign.quiet import quiet_libraries
from probeprune.progress import Progress, silent

with extra("eval"):
    import datasets
    import lm_eval.tasks
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM

Source = Literal["local", "hub"]
"""`local`: the items that ship with the package; `hub`: the harness' own data set."""


@dataclass(frozen=True)
class Answers:
    """A model's answers to the items of a task, in the order of the items.

    Attributes:
        correct: whether the right option is the most likely one.
        correct_norm: the same with each log-likelihood divided by the option's length; None for a task
            without this metric.
        loglikelihoods: log-likelihood of each option of each item, in nats.
        scores: the same log-likelihoods as one list, with the cost of computing them.
    """

    correct: tuple[bool, ...]
    correct_norm: tuple[bool, ...] | None
    loglikelihoods: tuple[tuple[float, ...], ...]
    scores: Scores


class LiveModel(HFLM):
    """A model object for the harness to score, with or without a method attached.

    Also works in `lm_eval.simple_evaluate(model=LiveModel(...), tasks=[...])`, for any task that scores
    continuations.

    Args:
        model: a causal LM of a supported family, in eval mode.
        tokenizer: the model's tokenizer; it is not changed.
        batch_size: requests per forward pass.
        order: order of the requests, see `make_batches`. Requests with the same context are not merged.
        progress: called with (`scoring`, requests done, requests in all).

    Attributes:
        progress: the argument of that name.
        scores: results and cost of the last call.
    """

    scores: Scores

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int = 16,
        order: Order = "length",
        progress: Progress = silent,
    ) -> None:
        with quiet():
            super().__init__(
                pretrained=model,
                # A copy: the harness adds a padding token to a tokenizer that has none.
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
        """Override the one method that scores tokens for the harness."""
        pairs = [Request(context, continuation) for _, context, continuation in requests]
        batches = make_batches(pairs, override_bs or self.batch_size, self._order)
        self.scores = score(self.model, pairs, batches, max_length=self.max_length, progress=self.progress)
        return list(zip(self.scores.loglikelihoods, self.scores.greedy, strict=True))


def load_task(task: Task, *, limit: int | None = None, source: Source = "local") -> ConfigurableTask:
    """Load the harness' own task object and build the requests of its first `limit` items.

    Args:
        task: the task to load.
        limit: number of items; None for all.
        source: where the items come from, see `Source`.

    Raises:
        UsageError: an unknown source, a damaged file, or a data set that cannot be read from the hub.
    """
    if source not in get_args(Source):
        raise UsageError(unknown("source", source, get_args(Source)))
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
            # Only this folder: reading all of the harness' task files takes ten seconds.
            manager = lm_eval.tasks.TaskManager(include_path=folder, include_defaults=False)
            # Settings of a task can be changed only for a member of a group.
            group = {"group": "probeprune", "task": [{"task": task.name, **changes}]}
            loaded = manager.load(group)["tasks"][task.name]
    except (OSError, ValueError, RuntimeError) as error:
        if source == "local":
            raise
        raise UsageError(
            f"the harness' data set for {task.name} could not be read from the hub ({first_line(error)}); "
            "check the network, or use the items that ship with the package (source local)."
        ) from error
    with quiet(), contextlib.redirect_stderr(io.StringIO()):  # hides a bar that has no switch
        loaded.build_all_requests(limit=limit)
    return loaded


def questions(task: ConfigurableTask) -> list[list[Instance]]:
    """The requests of a loaded task: one list per item, one request per option."""
    return [
        list(options)
        for _, options in itertools.groupby(task.instances, key=lambda instance: instance.doc_id)
    ]


def right_option(task: ConfigurableTask, item: dict[str, Any]) -> int:
    """Index of the right option. If the options vary the context, the harness has it in place of the text."""
    return int(task.doc_to_text(item) if task.multiple_input else task.doc_to_target(item))


def ask(lm: LiveModel, task: ConfigurableTask) -> Answers:
    """Score a loaded task as the harness does, all requests in one call."""
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
    """Hide the harness' log lines below errors and, unless `bars` is True, the progress bars of data sets."""
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
