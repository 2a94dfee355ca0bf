"""The research code's protocol for scoring tasks, for comparison with Probe Pruning's published table.

Prompts and options are tokenised separately and joined as token ids. Log-likelihoods are divided by the
number of tokens. Questions keep the order of the data set, and all options of a question share a batch.
Results differ from those of the LM evaluation harness and belong in a column of their own.
"""

import itertools
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from probeprune.data.windows import tokenize
from probeprune.evaluation.harness import Answers, LiveModel, questions, right_option
from probeprune.evaluation.likelihood import Batch, Request, score
from probeprune.foreign.extras import extra
from probeprune.ranges import plain

with extra("eval"):
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import ConfigurableTask

BATCH_SIZE = 20
"""Options per forward pass."""

_BARE_CONTEXT = {"piqa": "goal"}
"""By task, the column of an item that is the whole prompt. The other tasks use the harness' prompt."""

_SPACED_OPTIONS = ("boolq", "winogrande")
"""Tasks whose options begin with a blank, as all do in the harness. Options of the other tasks follow the
prompt directly, unless the tokenizer itself begins a text with a blank, as LLaMA-2's does."""


def ask(lm: LiveModel, task: ConfigurableTask) -> Answers:
    """Score a loaded task as the research code does, in batches of at most `lm.batch_size` options.

    There are two differences: a question is never split between batches, and an incomplete last batch counts.
    """
    items = questions(task)
    requests = [_request(task.task_name, option, lm.tokenizer) for options in items for option in options]
    counts = [len(options) for options in items]
    batches = question_batches(counts, lm.batch_size)
    scores = score(lm.model, requests, batches, max_length=lm.max_length, progress=lm.progress)
    results = zip(scores.loglikelihoods, requests, strict=True)
    correct, correct_norm, likelihoods = [], [], []
    for options in items:
        answers = list(itertools.islice(results, len(options)))
        total = [likelihood for likelihood, _ in answers]
        per_token = [likelihood / len(request.continuation) for likelihood, request in answers]
        right = right_option(task, options[0].doc)
        correct.append(total.index(max(total)) == right)
        correct_norm.append(per_token.index(max(per_token)) == right)
        likelihoods.append(tuple(total))
    return Answers(tuple(correct), tuple(correct_norm), tuple(likelihoods), scores)


def _request(task: str, option: Instance, tokenizer: PreTrainedTokenizerBase) -> Request:
    """A harness request in the research code's form; the prompt begins with the usual special tokens."""
    context, continuation = option.args
    if task in _BARE_CONTEXT:
        context = option.doc[_BARE_CONTEXT[task]]
    if task not in _SPACED_OPTIONS:
        continuation = continuation.removeprefix(" ")
    return Request(tokenizer(context, verbose=False)["input_ids"], tokenize(continuation, tokenizer))


def question_batches(options: Sequence[int], batch_size: int = BATCH_SIZE) -> list[Batch]:
    """Fill batches with whole questions, in order.

    Args:
        options: number of options of each question.
        batch_size: options per batch; a question with more gets a batch of its own.
    """
    batch_size = plain("batch_size", batch_size)
    batches: list[Batch] = []
    first = 0
    for count in options:
        question = list(range(first, first + count))
        first += count
        if batches and len(batches[-1]) + count <= batch_size:
            batches[-1] += question
        else:
            batches.append(question)
    return batches
