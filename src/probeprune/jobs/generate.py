"""Text from prompts, and how long it took: prefill and decoding told apart.

Runs the model's own `generate`, whatever is attached to it. Knows nothing of methods.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    BatchEncoding,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TextStreamer,
)

from probeprune.data.windows import pad_batch
from probeprune.errors import UsageError
from probeprune.model.cost import synced_clock
from probeprune.model.loading import LoadedModel


@dataclass(frozen=True)
class Decoding:
    """How the next token is taken. Raises `UsageError` for values out of range."""

    temperature: float = 0.0
    """0 takes the most likely token; else logits are divided by it and the token is drawn."""
    top_p: float = 1.0
    """Draw from the most likely tokens that together have this probability."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise UsageError(f"temperature {self.temperature:g} must not be negative; 0 draws nothing.")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top-p {self.top_p:g} must lie in (0, 1].")
        if self.top_p < 1 and not self.temperature:
            raise UsageError("top-p needs a temperature above 0: without one nothing is drawn.")


@dataclass(frozen=True)
class Generated:
    """What a batch of prompts became.

    Attributes:
        texts: one a prompt, without it.
        prompt_tokens: of all prompts together, padding not counted.
        new_tokens: of all texts together, up to where each ended.
        prefill, decode: seconds until the first token, and from there to the last.
    """

    texts: list[str]
    prompt_tokens: int
    new_tokens: int
    prefill: float
    decode: float

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens a second."""
        return self.prompt_tokens / self.prefill

    @property
    def decode_rate(self) -> float:
        """New tokens a second, of all texts together and behind the first of each; 0 where there is none."""
        return (self.new_tokens - len(self.texts)) / self.decode if self.decode else 0.0


def encode(loaded: LoadedModel, prompts: Sequence[str], *, chat: bool = False) -> BatchEncoding:
    """Prompts as one left-padded batch on the model's device.

    Args:
        loaded: the model; its tokenizer is left as it is.
        prompts: texts, none empty.
        chat: put each into the tokenizer's chat template, as the user's message.

    Raises `UsageError` for an empty prompt, or a tokenizer without chat template.
    """
    tokenizer = loaded.tokenizer
    if any(not p.strip() for p in prompts):
        raise UsageError("a prompt is empty; give it at least one word.")
    if chat and not tokenizer.chat_template:
        raise UsageError(f"the tokenizer of {loaded.name} has no chat template; leave --chat out.")
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
    sampling: Decoding | None = None,
    stream: bool = False,
    to_the_end: bool = False,
) -> Generated:
    """Continue every prompt.

    Args:
        loaded: the model, a method attached or not.
        inputs: from `encode`.
        max_new_tokens: a text ends there at the latest.
        sampling: None takes the most likely tokens.
        stream: print the text as it comes; one prompt only.
        to_the_end: go on after the end of a text, so that measurements are of equal length.

    Raises `UsageError` where prompt and text are longer than the model has positions.
    """
    sampling = sampling or Decoding()
    prompt = inputs["input_ids"].shape[1]
    positions = getattr(loaded.model.config, "max_position_embeddings", None)
    if max_new_tokens < 1:
        raise UsageError("--max-new-tokens must be at least 1.")
    if positions is not None and prompt + max_new_tokens > positions:
        raise UsageError(
            f"a prompt of {prompt} tokens and {max_new_tokens} new ones are more than the model's "
            f"{positions} positions; shorten either."
        )
    own: Any = loaded.model.generation_config
    draws = {"temperature": sampling.temperature, "top_p": sampling.top_p} if sampling.temperature else {}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        min_new_tokens=max_new_tokens if to_the_end else None,
        do_sample=bool(draws),
        eos_token_id=own.eos_token_id,
        pad_token_id=_pad_id(loaded),
        **draws,
    )
    clock = _Clock(loaded.device)
    torch.manual_seed(sampling.seed)
    found: Any = loaded.model.generate(
        **inputs,
        generation_config=config,
        logits_processor=LogitsProcessorList([clock]),
        streamer=TextStreamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)
        if stream
        else None,
    )
    ends = set(torch.as_tensor(own.eos_token_id if own.eos_token_id is not None else []).flatten().tolist())
    rows = [_until(row, ends) for row in found[:, prompt:].tolist()]
    return Generated(
        texts=[loaded.tokenizer.decode(row, skip_special_tokens=True) for row in rows],
        prompt_tokens=int(inputs["attention_mask"].sum()),
        new_tokens=sum(len(row) for row in rows),
        prefill=clock.times[0] - clock.start,
        decode=clock.times[-1] - clock.times[0],
    )


class _Clock(LogitsProcessor):
    """Notes when the logits of every token were there; changes nothing."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.times: list[float] = []
        self.start = synced_clock(device)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.times.append(synced_clock(self._device))
        return scores


def _until(row: list[int], ends: set[int]) -> list[int]:
    """The tokens of a text, its end included; what stands behind is padding."""
    end = next((i for i, token in enumerate(row) if token in ends), len(row))
    return row[: end + 1]


def _pad_id(loaded: LoadedModel) -> int | None:
    pad, end = loaded.tokenizer.pad_token_id, loaded.tokenizer.eos_token_id
    return end if pad is None else pad
