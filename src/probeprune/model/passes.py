"""What a forward pass of the decoder tells: which tokens are real, and whether it continues a cache.

Seen at the module that owns the decoder layers, whatever head stands on top; no modelling code is touched.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import nn

from probeprune.algebra.moments import Tokens
from probeprune.errors import UsageError
from probeprune.model.families import find_family


@dataclass(frozen=True)
class Pass:
    """One forward pass of a decoder."""

    tokens: Tokens
    continues: bool
    """Whether the cache holds tokens already; a pass that continues none is a prompt."""
    cache: object | None


def find_decoder(model: nn.Module) -> nn.Module:
    """The module that owns the decoder layers of a supported causal LM."""
    return model.get_submodule(find_family(model).layers.rpartition(".")[0])


def check_eval(model: nn.Module, what: str = "pruning works on") -> None:
    """Raise `UsageError` for a model in training mode; `what` begins the sentence."""
    if model.training:
        raise UsageError(f"{what} a model in eval mode; call model.eval() first.")


def on_pass(model: nn.Module, run: Callable[[Pass, Callable[[], Any]], Any]) -> Callable[[], None]:
    """Let `run(now, forward)` make every forward pass of the model's decoder: it calls `forward` and returns
    its output. The function returned ends that.

    No pair of hooks, because what follows a pass must also follow one that breaks, Ctrl-C included.
    """
    decoder: Any = find_decoder(model)
    signature = inspect.signature(decoder.forward)
    own, forward = decoder.__dict__.get("forward"), decoder.forward

    @wraps(forward)
    def around(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind_partial(*args, **kwargs).arguments
        given = {**given, **given.pop("kwargs", {})}
        return run(read_pass(given), lambda: forward(*args, **kwargs))

    decoder.forward = torch.compiler.disable(around)  # choices are made while it runs: nothing to compile

    def stop() -> None:
        if own is None:
            del decoder.forward
        else:
            decoder.forward = own

    return stop


def read_pass(given: dict[str, Any]) -> Pass:
    """The pass that a decoder's arguments (by name) describe."""
    ids = given.get("input_ids")
    batch, length = (ids if ids is not None else given["inputs_embeds"]).shape[:2]
    cache = given.get("past_key_values")
    past = 0 if cache is None else _past(cache, length)
    mask = given.get("attention_mask")
    if isinstance(mask, dict):  # one mask a layer type; a full one tells padding if there is one
        mask = mask.get("full_attention", next(iter(mask.values())))
    valid = None
    if mask is not None and not (past and length == 1):  # a token just generated is never padding
        valid = _valid(mask, past, length)
        # One look a prompt, where transformers looks too, to build its own mask; none while decoding.
        if valid is not None and not valid.is_meta and bool(valid.all()):
            valid = None
    return Pass(Tokens(batch, length, valid), past > 0, cache)


def _past(cache: Any, length: int) -> int:
    """Tokens in a cache; where a pass of one token asks, 1 may stand for any number."""
    found = cache.get_seq_length()
    if isinstance(found, int) or length > 1:
        return int(found)
    return 1  # a static cache in use: reading its length would wait for the device


def _valid(mask: torch.Tensor, past: int, length: int) -> torch.Tensor | None:
    """Which tokens of a pass are real (batch, length), from its attention mask; None where it cannot tell."""
    if mask.ndim == 4:  # already causal: a real token may attend to itself
        mask = mask[:, 0].diagonal(past, dim1=-2, dim2=-1)
        if past and mask.shape[1] != length:  # a sliding cache's columns are not positions
            return None
        mask = mask if mask.dtype == torch.bool else mask == 0
    elif mask.ndim == 2 and mask.shape[1] >= past + length:
        mask = mask[:, past:]
    if mask.ndim != 2 or mask.shape[1] < length:
        raise UsageError("the attention mask must have shape (batch, sequence).")
    return mask[:, :length].bool()


def check_windows(model: nn.Module, windows: torch.Tensor) -> None:
    """Raise `UsageError` where windows are longer than the model has positions."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and windows.shape[1] > limit:
        raise UsageError(
            f"windows of {windows.shape[1]} tokens are longer than the model's {limit} positions; "
            f"use windows of at most {limit}."
        )
