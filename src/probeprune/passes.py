"""What a forward pass of the decoder tells: which tokens are real, and whether it continues a cache.

Hooks on the module that owns the decoder layers, whatever head stands on top; no modelling code is touched.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from probeprune.blocks import find_family
from probeprune.errors import UsageError
from probeprune.statistics import Tokens


@dataclass(frozen=True)
class Pass:
    """One forward pass of a decoder."""

    tokens: Tokens
    past: int
    """Tokens already in the cache."""
    cache: object | None


def find_decoder(model: nn.Module) -> nn.Module:
    """The module that owns the decoder layers of a supported causal LM."""
    return model.get_submodule(find_family(model).layers.rpartition(".")[0])


def check_eval(model: nn.Module, what: str = "pruning works on") -> None:
    """Raise `UsageError` for a model in training mode; `what` begins the sentence."""
    if model.training:
        raise UsageError(f"{what} a model in eval mode; call model.eval() first.")


def on_pass(model: nn.Module, begin: Callable[[Pass], None]) -> RemovableHandle:
    """Call `begin` before every forward pass of the model's decoder; remove the handle to stop."""
    decoder = find_decoder(model)
    signature = inspect.signature(decoder.forward)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = signature.bind_partial(*args, **kwargs).arguments
        given = {**given, **given.pop("kwargs", {})}
        begin(read_pass(given))

    return decoder.register_forward_pre_hook(hook, with_kwargs=True)


def read_pass(given: dict[str, Any]) -> Pass:
    """The pass that a decoder's arguments (by name) describe."""
    ids = given.get("input_ids")
    shape = (ids if ids is not None else given["inputs_embeds"]).shape
    cache = given.get("past_key_values")
    past = 0 if cache is None else int(cache.get_seq_length())
    mask = given.get("attention_mask")
    if isinstance(mask, dict):  # one mask a layer type; a full one tells padding if there is one
        mask = mask.get("full_attention", next(iter(mask.values())))
    valid = None
    if past == 0 and mask is not None:
        if mask.ndim == 4:  # already causal: a real token may attend to itself
            diagonal = mask[:, 0].diagonal(dim1=-2, dim2=-1)
            mask = diagonal if diagonal.dtype == torch.bool else diagonal == 0
        if mask.ndim != 2 or mask.shape[1] < shape[1]:
            raise UsageError("the attention mask must have shape (batch, sequence).")
        valid = mask[:, : shape[1]].bool()
        if not valid.is_meta and bool(valid.all()):
            valid = None
    return Pass(Tokens(shape[0], shape[1], valid), past, cache)
