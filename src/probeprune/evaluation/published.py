"""The research code's way to score the tasks, for comparing with Probe Pruning's published table.

Prompts and options are tokenised apart and put together as token ids, log-likelihoods are divided by numbers
of tokens, and questions stay in the data set's order with all options of one in the same batch. The results
are not the LM evaluation harness' and belong in another column.
"""

import itertools
from collections.abc import Sequence

from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from transformers import PreTrainedTokenizerBase

from probeprune.data.windows import tokenize
from probeprune.errors import require_positive
from probeprune.evaluation.harness import Answers, LiveModel, questions, right_option
from probeprune.evaluation.likelihood import Batch, Request, score

BATCH_SIZE = 20
"""Options a forward pass."""

_BARE_CONTEXT = {"piqa": "goal"}
"""Tasks whose prompt is one column of the item as it stands; the others have the harness' prompt."""

_SPACED_OPTIONS = ("boolq", "winogrande")
"""Tasks whose options begin with a blank, as all do in the harness. The others' follow the prompt at once,
unless the tokenizer itself opens a text with a blank (LLaMA-2's does)."""


def ask(lm: LiveModel, task: ConfigurableTask) -> Answers:
    """Score a loaded task as the research code does, batches of at most `lm.batch_size` options.

    Unlike there, no question is torn apart between batches and the last, incomplete batch counts too.
    """
    asked = questions(task)
    requests = [_request(task.task_name, option, lm.tokenizer) for options in asked for option in options]
    counts = [len(options) for options in asked]
    batches = question_batches(counts, lm.batch_size)
    scores = score(lm.model, requests, batches, max_length=lm.max_length, progress=lm.progress)
    results = zip(scores.loglikelihoods, requests, strict=True)
    correct, correct_norm, likelihoods = [], [], []
    for options in asked:
        answers = list(itertools.islice(results, len(options)))
        total = [likelihood for likelihood, _ in answers]
        per_token = [likelihood / len(request.continuation) for likelihood, request in answers]
        right = right_option(task, options[0].doc)
        correct.append(total.index(max(total)) == right)
        correct_norm.append(per_token.index(max(per_token)) == right)
        likelihoods.append(tuple(total))
    return Answers(tuple(correct), tuple(correct_norm), tuple(likelihoods), scores)


def _request(task: str, option: Instance, tokenizer: PreTrainedTokenizerBase) -> Request:
    """The harness' request in the research code's form; special tokens that open a text open the prompt."""
    context, continuation = option.args
    if task in _BARE_CONTEXT:
        context = option.doc[_BARE_CONTEXT[task]]
    if task not in _SPACED_OPTIONS:
        continuation = continuation.removeprefix(" ")
    return Request(tokenizer(context, verbose=False)["input_ids"], tokenize(continuation, tokenizer))


def question_batches(options: Sequence[int], batch_size: int = BATCH_SIZE) -> list[Batch]:
    """Fill batches with whole questions, in order.

    Args:
        options: of each question, how many it has.
        batch_size: options a batch; more where a single question has more.
    """
    require_positive(batch_size=batch_size)
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
