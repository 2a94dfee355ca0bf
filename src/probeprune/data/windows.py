"""Cut texts into windows of token ids for calibration, training and evaluation, and pad batches.

Knows nothing of models, methods or metrics. Never changes a global random state.
"""

import itertools
import logging
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from transformers import PreTrainedTokenizerBase

from probeprune.data.corpora import ROW_SEPARATOR, check_whole, load_corpus
from probeprune.errors import UsageError, unknown
from probeprune.ranges import check_fields, plain

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Text:
    """The windows of a corpus on which a model is calibrated or measured.

    Raises `UsageError` for values out of range.
    """

    corpus: str
    """A name for `corpora.load_corpus`."""
    windows: int
    """Number of windows; 0 where nothing is to be measured."""
    length: int = 512
    """Tokens per window."""
    beside: tuple[str, ...] = ()
    """Further corpora for calibration. Each gives as many windows as `corpus` does, and one that is named
    twice gives twice as many."""

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def name(self) -> str:
        """The names of all corpora."""
        return ", ".join((self.corpus, *self.beside))

    def record(self) -> dict[str, Any]:
        """All fields as JSON values; without further corpora where there are none."""
        fields = asdict(self)
        return fields if fields.pop("beside") == () else {**fields, "beside": list(self.beside)}

    def source(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> "WindowSource":
        """Where calibration windows are drawn from. Raises `UsageError` as `load_corpus`."""
        read = {name: load_corpus(name) for name in dict.fromkeys((self.corpus, *self.beside))}
        beside = tuple(read[name] for name in self.beside)
        return WindowSource(read[self.corpus], tokenizer, self.windows, self.length, seed, beside)


CALIBRATION = Text("c4", 128, 512)
"""Default calibration text of every command and preset: SparseGPT's, Wanda's and Probe Pruning's."""

BATCH_SIZE = 16
"""Default number of windows in a forward pass, for calibration and measuring alike."""

Sampling = Literal["in-order", "published"]
"""How windows are cut for evaluation, see `evaluation_windows`."""
Side = Literal["left", "right"]
"""Where padding goes."""


CHUNK = 200_000
"""Characters that a tokenizer is given at once; it takes 150 times their size."""
OVERLAP = 4_000
"""Characters that two neighbouring chunks share, for finding a place where their tokens agree."""
AGREE = 64
"""Equal tokens in a row, at equal places, that make two chunks agree."""


def tokenize(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a text of any length, without special tokens and without a warning about its length.

    A long text is tokenised in overlapping chunks, joined in the middle of a run of tokens on which both
    agree; where they never do, the first is made longer. Tokens depend on the text nearby alone, so they are
    those of the whole text at once, which would take gigabytes.

    Raises `UsageError` for text with half a character.
    """
    check_whole(text, "the text")
    ids: list[int] = []
    start, skip, size = 0, 0, CHUNK  # the first `skip` tokens of this chunk stand in `ids` already
    while tokenizer.is_fast and start + size < len(text):
        left, left_at = _located(text, start, start + size, tokenizer)
        after = start + size - OVERLAP
        right, right_at = _located(text, after, start + size, tokenizer)
        cut = _agreement(left, left_at, right, right_at)
        if cut is None:
            size *= 2
            continue
        ids += left[skip : cut[0]]
        start, skip, size = after, cut[1], CHUNK
    whole = tokenizer(text[start:], add_special_tokens=False, verbose=False)["input_ids"]
    return ids + whole[skip:]


def _located(
    text: str, start: int, end: int, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """Token ids of a part of a text, and the character at which each begins."""
    made = tokenizer(text[start:end], add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    return made["input_ids"], [start + begin for begin, _ in made["offset_mapping"]]


def _agreement(
    left: Sequence[int], left_at: Sequence[int], right: Sequence[int], right_at: Sequence[int]
) -> tuple[int, int] | None:
    """The index in each of two chunks of one token, in a run of `AGREE` that are the same; None without one.

    Their last tokens do not count: the text ends there for both, where it does not end in truth.
    """
    index = {at: i for i, at in enumerate(left_at)}
    for j in range(AGREE, len(right) - AGREE):
        i = index.get(right_at[j])
        if i is None or right_at[j] == right_at[j - 1] or left_at[i] == left_at[i - 1]:
            continue
        if left[i - AGREE : i + AGREE] == right[j - AGREE : j + AGREE]:
            return i, j
    return None


def calibration_windows(
    documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, count: int, length: int, seed: int
) -> torch.Tensor:
    """Cut windows at random offsets from random documents, for collecting statistics.

    The protocol of SparseGPT, Wanda and Probe Pruning: take a random document, skip it if it has no more than
    `length` tokens, and cut one window from it at a random offset. Here the documents are shuffled, not drawn
    with replacement, so that none is used twice before all that are long enough were used once. Then they are
    used again, each time at a new offset. A single long text therefore gives windows at random offsets.

    Args:
        documents: for example from `load_corpus`.
        tokenizer: tokenizer of the model to calibrate; no special tokens are added.
        count: number of windows.
        length: tokens per window.
        seed: the same seed gives the same windows.

    Returns:
        LongTensor (count, length).

    Raises:
        UsageError: no document is long enough.
    """
    count, length, seed = plain("count", count), plain("length", length), plain("seed", seed)
    generator = random.Random(seed)
    order = list(range(len(documents)))
    generator.shuffle(order)

    windows: list[list[int]] = []

    def crop(ids: list[int]) -> None:
        start = generator.randrange(len(ids) - length)
        windows.append(ids[start : start + length])

    long_enough: list[list[int]] = []
    longest = 0
    for index in order:
        if len(windows) == count:
            break
        ids = tokenize(documents[index], tokenizer)
        longest = max(longest, len(ids))
        if len(ids) > length:
            long_enough.append(ids)
            crop(ids)
    if not long_enough:
        raise UsageError(
            f"no document has more than {length} tokens, the longest has {longest}; ask for windows of at "
            f"most {max(longest - 1, 0)} tokens or give longer texts."
        )
    for ids in itertools.islice(itertools.cycle(long_enough), count - len(windows)):
        crop(ids)
    return torch.tensor(windows, dtype=torch.long, device="cpu")


def training_windows(
    documents: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    packing: bool = False,
    held_out: float = 0.04,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut windows for training and held-out windows, from different documents.

    Args:
        documents: for example from `load_corpus`; shuffled by the seed.
        tokenizer: tokenizer of the model; no special tokens are added.
        length: tokens per window.
        packing: False takes the first `length` tokens of every document that has more (LLM-Pruner,
            LoRAPrune). True joins all documents with the end-of-text token and cuts the result into windows;
            only an incomplete last window is lost.
        held_out: share of the documents to hold out, at least one (800 of 20000 in the published runs).
        seed: for the order and the held-out documents.

    Returns:
        Training and held-out windows, two LongTensors (count, length). With little text the second may be
        empty.

    Raises:
        UsageError: no training window of that length, or no end-of-text token for packing.
    """
    length, seed = plain("length", length), plain("seed", seed)
    held_out = plain("training_windows.held_out", held_out)
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    split = max(round(held_out * len(order)), 1) if len(order) > 1 else 0
    if packing and tokenizer.eos_token_id is None:
        raise UsageError("packing needs a tokenizer with an end-of-text token; train without packing.")

    def windows(chosen: Sequence[int]) -> torch.Tensor:
        rows: list[list[int]] = []
        rest: list[int] = []
        for index in chosen:
            ids = tokenize(documents[index], tokenizer)
            if not packing:
                if len(ids) > length:
                    rows.append(ids[:length])
                continue
            rest += [*ids, tokenizer.eos_token_id]
            whole = len(rest) // length * length
            rows += [rest[i : i + length] for i in range(0, whole, length)]
            rest = rest[whole:]
        return torch.tensor(rows, dtype=torch.long).view(-1, length)

    train = windows(order[split:])
    if not len(train):
        raise UsageError(
            f"the training text has no {'' if packing else 'document of more than '}{length} tokens; give "
            "longer text, ask for shorter sequences, or pack documents together."
        )
    return train, windows(order[:split])


def evaluation_windows(
    documents: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    limit: int | None = None,
    sampling: Sampling = "in-order",
    seed: int = 0,
) -> torch.Tensor:
    """Cut windows of a text to measure perplexity on.

    Documents are joined with a blank line and tokenised together, without special tokens.

    Args:
        documents: for example from `load_corpus`.
        tokenizer: tokenizer of the model to evaluate.
        length: tokens per window.
        limit: the most windows; None for all.
        sampling: `in-order` cuts the text from beginning to end and drops an incomplete last window (the log,
            level INFO, gives the number of tokens left out); every token counts at most once. `published`
            follows the Probe Pruning code: the same number of windows, but at uniformly random offsets, so
            that they overlap and miss parts of the text. Use it only to compare with published tables.
        seed: for `published`.

    Returns:
        LongTensor (windows, length).

    Raises:
        UsageError: a text shorter than one window, or an unknown sampling.
    """
    length, seed = plain("length", length), plain("seed", seed)
    limit = None if limit is None else plain("limit", limit)
    tokens = torch.tensor(tokenize(ROW_SEPARATOR.join(documents), tokenizer), dtype=torch.long)
    available = len(tokens) // length
    if available == 0:
        raise UsageError(
            f"the text has {len(tokens)} tokens, fewer than one window of {length}; use shorter windows."
        )
    count = available if limit is None else min(limit, available)
    if sampling == "in-order":
        logger.info(
            "%d windows of %d tokens; %d tokens of the text left out",
            count,
            length,
            len(tokens) - count * length,
        )
        return tokens[: count * length].view(count, length)
    if sampling == "published":
        generator = random.Random(seed)
        starts = [generator.randrange(max(len(tokens) - length, 1)) for _ in range(count)]
        return torch.stack([tokens[start : start + length] for start in starts])
    raise UsageError(unknown("sampling", sampling, get_args(Sampling)))


def batches(windows: torch.Tensor, batch_size: int) -> tuple[torch.Tensor, ...]:
    """Split windows into views of `batch_size` rows; the last may be shorter. No windows give no batch."""
    batch_size = plain("batch_size", batch_size)
    return windows.split(batch_size) if len(windows) else ()


def pad_batch(
    sequences: Sequence[Sequence[int]], pad_id: int | None, side: Side = "left"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad sequences of unequal length to one batch.

    Args:
        sequences: token ids, at least one in each sequence.
        pad_id: id of the padding, usually `tokenizer.pad_token_id`; None where all have the same length.
        side: where the padding goes: `left` for generating, `right` for scoring.

    Returns:
        `input_ids` and `attention_mask`, LongTensors (batch, longest); the mask is 1 on real tokens.

    Raises:
        UsageError: no pad id for sequences of unequal length, no sequence, or an empty one.
    """
    if not sequences or not all(len(sequence) for sequence in sequences):
        raise UsageError("a batch needs at least one sequence, and every sequence at least one token.")
    if pad_id is None and len({len(sequence) for sequence in sequences}) > 1:
        raise UsageError(
            "the tokenizer has no padding token; set tokenizer.pad_token, for example to tokenizer.eos_token."
        )
    if side not in get_args(Side):
        raise UsageError(unknown("padding side", side, get_args(Side)))
    longest = max(len(sequence) for sequence in sequences)
    input_ids = torch.full((len(sequences), longest), pad_id or 0, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, sequence in enumerate(sequences):
        place = slice(longest - len(sequence), None) if side == "left" else slice(len(sequence))
        input_ids[row, place] = torch.as_tensor(sequence)
        attention_mask[row, place] = 1
    return input_ids, attention_mask


@dataclass(frozen=True)
class WindowSource:
    """A text from which calibration windows are drawn, for each need in the size it wants.

    Statistics take `windows` windows of `length` tokens; a method with gradients takes windows of a size of
    its own from the same documents. Raises `UsageError` for values out of range.
    """

    documents: Sequence[str]
    tokenizer: PreTrainedTokenizerBase
    windows: int = CALIBRATION.windows
    length: int = CALIBRATION.length
    seed: int = 0
    beside: tuple[Sequence[str], ...] = ()
    """Documents of further corpora, which take turns with `documents`, a window each. A corpus that is there
    twice (the same object) has two turns."""

    def __post_init__(self) -> None:
        check_fields(self)

    def draw(self, count: int | None = None, length: int | None = None) -> torch.Tensor:
        """LongTensor (count, length) of token ids; see `calibration_windows`.

        The first windows of many are those of few.
        """
        count = self.windows if count is None else plain("count", count)
        length = self.length if length is None else length
        turns = [self.documents, *self.beside]
        places: dict[int, list[int]] = {}  # of the windows of each corpus
        for window in range(count):
            places.setdefault(id(turns[window % len(turns)]), []).append(window)
        parts = [
            calibration_windows(
                documents, self.tokenizer, count=len(places[number]), length=length, seed=self.seed
            )
            for number, documents in {id(documents): documents for documents in turns}.items()
            if number in places
        ]
        order = torch.tensor([window for own in places.values() for window in own])
        return torch.cat(parts)[order.argsort()]
