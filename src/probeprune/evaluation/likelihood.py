"""Log-likelihoods of continuations under a causal LM.

Rows of unequal length share a forward pass. They are padded on the right and masked, so that the probe and
the history of a dynamic method never see padding. The output head runs on the continuations only, because the
logits of all positions would be by far the largest tensor. Knows nothing of tasks, text or pruning.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

from probeprune.data.windows import pad_batch
from probeprune.errors import UsageError, unknown
from probeprune.model.decoding import HEAD_TOKENS, decoded, next_token_logits
from probeprune.model.passes import is_followed
from probeprune.processes import shares
from probeprune.progress import Progress, silent
from probeprune.ranges import plain

Order = Literal["length", "given"]
Batch = list[int]
"""The indices of the requests that run in one forward pass."""


@dataclass(frozen=True)
class Request:
    """Token ids of a context and of a continuation whose likelihood is wanted. Neither is empty."""

    context: Sequence[int]
    continuation: Sequence[int]


@dataclass(frozen=True)
class Scores:
    """The scores of a list of requests, in the order of the requests.

    Attributes:
        loglikelihoods: log-likelihood of each whole continuation, in nats.
        greedy: whether every token of the continuation is the most likely one.
        tokens: number of real tokens run through the model.
        padding: share of padding among all positions run.
        truncated: number of requests whose context lost its beginning to fit the model.
        batches: number of forward passes.
        seconds: their total time, including the output head.
    """

    loglikelihoods: tuple[float, ...]
    greedy: tuple[bool, ...]
    tokens: int
    padding: float
    truncated: int
    batches: int
    seconds: float


def make_batches(requests: Sequence[Request], batch_size: int, order: Order) -> list[Batch]:
    """Split requests into batches of `batch_size`; the last may be shorter.

    Args:
        requests: the requests to batch.
        batch_size: requests per batch.
        order: `given` keeps their order. `length` puts the longest first: there is little padding, and the
            first batch needs the most memory.

    Raises `UsageError` for a batch size below 1 or an unknown order.
    """
    batch_size = plain("batch_size", batch_size)
    indices = list(range(len(requests)))
    if order == "length":
        tokens = [[*r.context, *r.continuation] for r in requests]
        indices.sort(key=lambda i: (-len(tokens[i]), tokens[i]))
    elif order != "given":
        raise UsageError(unknown("order", order, get_args(Order)))
    return [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]


def score(
    model: nn.Module,
    requests: Sequence[Request],
    batches: Sequence[Batch],
    *,
    max_length: int,
    progress: Progress = silent,
) -> Scores:
    """Score the continuation of every request.

    Where work is shared out over processes, each takes some of the batches, and all of them under a method
    that follows the batches.

    Args:
        model: a causal LM of a supported family, with or without a method attached.
        requests: the requests to score.
        batches: which of them run together; each index appears once.
        max_length: the most tokens per pass; longer contexts lose their beginning, as in the LM evaluation
            harness.
        progress: called with (`scoring`, requests done, requests in all).

    Raises:
        UsageError: a continuation longer than `max_length`.
        FloatingPointError: a log-likelihood that is not finite.
    """
    longest = max((len(r.continuation) for r in requests), default=0)
    if longest > max_length:
        raise UsageError(
            f"an option has {longest} tokens and this model takes at most {max_length}; shorten the option."
        )
    divided, count = not is_followed(model), len(batches)
    if divided:
        batches = shares.dealt(batches)
    answers: list[tuple[int, float, bool]] = []
    rows = [[_inputs(requests[i], max_length) for i in batch] for batch in batches]
    padded = [pad_batch(own, pad_id=0, side="right") for own in rows]
    tokens = positions = 0
    ids, masks = [i for i, _ in padded], [m for _, m in padded]
    found = decoded(model, ids, masks, progress)
    started = time.perf_counter()
    with shares.alike(), torch.inference_mode():
        for batch, mask, states in zip(batches, masks, found, strict=True):
            results = _score_batch(model, states.hidden, mask, [requests[i].continuation for i in batch])
            for i, (likelihood, likeliest) in zip(batch, results, strict=True):
                if not math.isfinite(likelihood):
                    raise FloatingPointError("a log-likelihood is NaN or infinite; try another dtype.")
                answers.append((i, likelihood, likeliest))
            tokens += int(mask.sum())
            positions += mask.numel()
            progress("scoring", len(answers), sum(map(len, batches)))
    seconds = time.perf_counter() - started
    if divided:
        answers, work = shares.gathered(answers), shares.gathered([(tokens, positions, seconds)])
        tokens, positions = sum(w[0] for w in work), sum(w[1] for w in work)
        seconds = max(w[2] for w in work)
    answers.sort()
    return Scores(
        loglikelihoods=tuple(likelihood for _, likelihood, _ in answers),
        greedy=tuple(likeliest for *_, likeliest in answers),
        tokens=tokens,
        padding=1 - tokens / positions if positions else 0.0,
        truncated=sum(len(r.context) + len(r.continuation) > max_length + 1 for r in requests),
        batches=count,
        seconds=seconds,
    )


def _inputs(request: Request, max_length: int) -> list[int]:
    """The model's input: the last token of the continuation is predicted, never read."""
    return [*request.context, *request.continuation][-(max_length + 1) : -1]


def _score_batch(
    model: nn.Module, hidden: torch.Tensor, mask: torch.Tensor, continuations: Sequence[Sequence[int]]
) -> Iterator[tuple[float, bool]]:
    """Log-likelihood and greediness of each row, from its last hidden states (batch, longest, hidden)."""
    lengths = mask.sum(1).tolist()
    counts = [len(c) for c in continuations]
    # The hidden state at one position predicts the token at the next.
    wanted = torch.cat([h[n - k : n] for h, n, k in zip(hidden, lengths, counts, strict=True)])
    targets = torch.tensor([t for c in continuations for t in c], dtype=torch.long, device=hidden.device)
    likelihoods, hits = [], []
    for h, target in zip(wanted.split(HEAD_TOKENS), targets.split(HEAD_TOKENS), strict=True):
        logits = next_token_logits(model, h)
        likelihoods.append(-nn.functional.cross_entropy(logits, target, reduction="none").double())
        hits.append(logits.argmax(-1) == target)
    per_row = zip(torch.cat(likelihoods).split(counts), torch.cat(hits).split(counts), strict=True)
    return iter([(float(row.sum()), bool(hit.all())) for row, hit in per_row])
