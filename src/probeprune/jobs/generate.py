"""Generate text from prompts and time prefill and decoding.

Runs the model's own `generate`, with or without a method attached. Knows nothing of methods.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    BatchEncoding,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    TextStreamer,
)

from probeprune.data.corpora import check_whole
from probeprune.data.windows import pad_batch
from probeprune.errors import UsageError
from probeprune.model.cost import synced_clock
from probeprune.model.loading import LoadedModel
from probeprune.model.passes import position_limit
from probeprune.ranges import check_fields, plain


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen. Raises `UsageError` for values out of range."""

    temperature: float = 0.0
    """0 chooses the most likely token. Above 0, logits are divided by it and the token is drawn."""
    top_p: float = 1.0
    """Draw only from the most likely tokens that together have this probability."""
    seed: int = 0
    """For drawing tokens."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.top_p < 1 and not self.temperature:
            raise UsageError(
                "top-p needs a temperature above 0, since nothing is drawn without one; set both or neither."
            )


@dataclass(frozen=True)
class Generated:
    """The texts generated from a batch of prompts.

    Attributes:
        texts: one text per prompt, without the prompt.
        prompt_tokens: number of tokens of all prompts, without padding.
        new_tokens: number of tokens of all texts, each up to its end.
        prefill, decode: seconds until the first token, and from the first to the last.
    """

    texts: list[str]
    prompt_tokens: int
    new_tokens: int
    prefill: float
    decode: float

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second."""
        return self.prompt_tokens / self.prefill

    @property
    def decode_rate(self) -> float:
        """New tokens per second of all texts together, without the first of each; 0 if there are none."""
        return (self.new_tokens - len(self.texts)) / self.decode if self.decode else 0.0


def encode(loaded: LoadedModel, prompts: Sequence[str], *, chat: bool = False) -> BatchEncoding:
    """Tokenise prompts to one left-padded batch on the model's device.

    Args:
        loaded: the model; its tokenizer is not changed.
        prompts: texts, none of them empty.
        chat: put each prompt into the tokenizer's chat template, as the user's message.

    Raises `UsageError` for an empty prompt or one with half a character, a tokenizer without a chat template,
    and prompts of unequal length where the tokenizer has neither a padding nor an end token.
    """
    tokenizer = loaded.tokenizer
    for prompt in prompts:
        check_whole(prompt, "a prompt")
    if any(not p.strip() for p in prompts):
        raise UsageError("a prompt is empty; give it at least one word.")
    if chat and not tokenizer.chat_template:
        raise UsageError(f"the tokenizer of {loaded.name} has no chat template; leave out chat.")
    sequences = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": p}], add_generation_prompt=True, return_dict=False
        )
        if chat
        else tokenizer(p)["input_ids"]
        for p in prompts
    ]
    ids, mask = pad_batch(sequences, _pad_id(loaded))
    return BatchEncoding({"input_ids": ids, "attention_mask": mask}).to(loaded.device)


def generate(
    loaded: LoadedModel,
    inputs: BatchEncoding,
    *,
    max_new_tokens: int,
    decoding: Decoding | None = None,
    show: Callable[[str], None] | None = None,
    ignore_end: bool = False,
) -> Generated:
    """Continue every prompt.

    Args:
        loaded: the model, with or without a method attached.
        inputs: the batch made by `encode`.
        max_new_tokens: the most tokens per text.
        decoding: None chooses the most likely tokens.
        show: called with each piece of the text while it is generated, the last a line end; for a single
            prompt only.
        ignore_end: do not stop at the end of a text, so that all runs of a measurement have equal length.

    Raises `UsageError` if prompt and text together are longer than the model's positions.
    """
    decoding = decoding or Decoding()
    prompt = inputs["input_ids"].shape[1]
    positions = position_limit(loaded.model.config)
    max_new_tokens = plain("max_new_tokens", max_new_tokens)
    if positions is not None and prompt + max_new_tokens > positions:
        raise UsageError(
            f"a prompt of {prompt} tokens and {max_new_tokens} new ones are more than the model's "
            f"{positions} positions; shorten one of them."
        )
    model_config: Any = loaded.model.generation_config
    draws = {"temperature": decoding.temperature, "top_p": decoding.top_p} if decoding.temperature else {}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        min_new_tokens=max_new_tokens if ignore_end else None,
        do_sample=bool(draws),
        eos_token_id=model_config.eos_token_id,
        pad_token_id=_pad_id(loaded),
        **draws,
    )
    clock = _Clock(loaded.device)
    torch.manual_seed(decoding.seed)
    sequences: Any = loaded.model.generate(
        **inputs,
        generation_config=config,
        logits_processor=LogitsProcessorList([clock]),
        streamer=None if show is None else _Pieces(loaded.tokenizer, show),
    )
    end_ids = [] if model_config.eos_token_id is None else model_config.eos_token_id
    ends = set(torch.as_tensor(end_ids).flatten().tolist())
    rows = [_until(row, ends) for row in sequences[:, prompt:].tolist()]
    return Generated(
        texts=[loaded.tokenizer.decode(row, skip_special_tokens=True) for row in rows],
        prompt_tokens=int(inputs["attention_mask"].sum()),
        new_tokens=sum(len(row) for row in rows),
        prefill=clock.times[0] - clock.start,
        decode=clock.times[-1] - clock.times[0],
    )


class _Pieces(TextStreamer):
    """Passes each finished piece of a text on, instead of printing it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._show = show

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by transformers with the next piece."""
        self._show(f"{text}\n" if stream_end else text)


class _Clock(LogitsProcessor):
    """Records the time at which each token's logits are ready; changes nothing."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.times: list[float] = []
        self.start = synced_clock(device)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.times.append(synced_clock(self._device))
        return scores


def _until(row: list[int], ends: set[int]) -> list[int]:
    """The tokens of a text up to and including its end token; the rest is padding."""
    end = next((i for i, token in enumerate(row) if token in ends), len(row))
    return row[: end + 1]


def _pad_id(loaded: LoadedModel) -> int | None:
    pad, end = loaded.tokenizer.pad_token_id, loaded.tokenizer.eos_token_id
    return end if pad is None else pad
