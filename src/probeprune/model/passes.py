"""Read from a decoder call which tokens are real and whether it continues a cache.

The calls are seen at the module that owns the decoder layers, whatever head stands on top. No modelling code
is touched.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import update_wrapper
from typing import Any

import torch
from torch import nn

from probeprune.algebra.moments import Tokens
from probeprune.errors import UsageError, first_line
from probeprune.model.families import find_family
from probeprune.model.forwards import replace_forward, replace_method
from probeprune.model.multimodal import text_config
from probeprune.model.narrow_linear import refuse_to_copy
from probeprune.model.wrappers import unwrapped


@dataclass(frozen=True)
class Pass:
    """One forward pass of a decoder."""

    tokens: Tokens
    continues: bool
    """Whether the cache already holds tokens; without any, the pass is a prompt."""
    cache: object | None
    mask_heads: int = 1
    """Number of heads for which the attention mask differs; 1 for one mask for all heads."""
    unmasked: torch.Tensor | None = None
    """The token ids, where there is no mask that would tell padding; None otherwise, and for embeddings."""


def find_decoder(model: nn.Module) -> nn.Module:
    """The module that owns the decoder layers of a supported causal LM."""
    return model.get_submodule(find_family(model).layers.rpartition(".")[0])


def check_eval(model: nn.Module, what: str = "pruning works on") -> None:
    """Raise `UsageError` for a model in training mode; `what` begins the sentence."""
    if model.training:
        raise UsageError(f"{what} a model in eval mode; call model.eval() first.")


def on_pass(
    model: nn.Module, run: Callable[[Pass, Callable[[], Any]], Any], *, every_token: bool = False
) -> Callable[[], None]:
    """Route every forward pass of the model's decoder through `run`, until the returned function is called.

    A pair of hooks would not do: work that follows a pass must also follow one that fails, by Ctrl-C too.

    Args:
        model: a causal LM of a supported family.
        run: called with the pass and the decoder's forward, without arguments. It calls that forward and
            returns its output.
        every_token: run all layers on all tokens. Gemma 4 runs the last ones on those alone whose logits are
            asked for, where these layers read keys and values of others.
    """
    decoder = find_decoder(model)
    # The class's signature: the forward of an instance may be a wrapper that takes anything.
    signature = inspect.signature(type(decoder).forward.__get__(decoder))
    routed = _Routed(decoder.forward, signature, run, every_token)
    restore = replace_forward(decoder, routed)

    def undo() -> None:
        restore()
        routed.run = None  # where others have wrapped it meanwhile, it stays in the chain

    return undo


_FOLLOWED = "_probeprune_followed"
"""Attribute of a model whose batches are followed."""


def follow_batches(model: nn.Module) -> Callable[[], None]:
    """Note, until the returned function is called, that what a model computes depends on the batches before
    and on what else is in a batch."""
    return replace_method(model, _FOLLOWED, lambda: True)


def is_followed(model: nn.Module) -> bool:
    """Whether what a model computes depends on the batches before and on what else is in a batch."""
    return _FOLLOWED in unwrapped(model).__dict__


class _Routed:
    """A decoder's forward that goes through `run`, or straight on once that is None."""

    def __init__(
        self,
        forward: Callable[..., Any],
        signature: inspect.Signature,
        run: Callable[[Pass, Callable[[], Any]], Any] | None,
        every_token: bool,
    ) -> None:
        update_wrapper(self, forward)
        self.forward, self.run, self._signature = forward, run, signature
        self._every_token = every_token

    @torch.compiler.disable  # units are chosen in Python while it runs
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = self._signature.bind_partial(*args, **kwargs).arguments
        arguments = {**arguments, **arguments.pop("kwargs", {})}
        given = any(arguments.get(name) is not None for name in ("input_ids", "inputs_embeds"))
        if self.run is None or not given:  # without input the forward raises its own error
            return self.forward(*args, **kwargs)
        if self._every_token and "logits_to_keep" in kwargs:
            kwargs = {**kwargs, "logits_to_keep": 0}
        return self.run(read_pass(arguments), lambda: self.forward(*args, **kwargs))

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.run is not None:
            refuse_to_copy()
        return super().__reduce_ex__(protocol)


CACHE_NAMES = ("cache", "past_key_values", "layer_past")
"""Names under which decoders and layers take their KV cache, the newest release of transformers first."""


def cache_argument(decoder: nn.Module) -> str:
    """The name under which a decoder's forward takes its KV cache."""
    parameters = inspect.signature(type(decoder).forward).parameters
    return next(name for name in CACHE_NAMES if name in parameters)


def read_pass(arguments: dict[str, Any]) -> Pass:
    """The pass described by a decoder's arguments, by name."""
    ids = arguments.get("input_ids")
    batch, length = (ids if ids is not None else arguments["inputs_embeds"]).shape[:2]
    cache = next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)
    past = 0 if cache is None else _past(cache, length)
    mask = arguments.get("attention_mask")
    if isinstance(mask, dict):  # one mask per layer type; prefer a full one, which shows the padding
        mask = mask.get("full_attention", next(iter(mask.values())))
    valid = None
    if mask is not None and not (past and length == 1):  # a token just generated is never padding
        valid = _valid(mask, past, length)
        # Waits for the device once per prompt, where transformers waits too to build its own mask; never
        # while decoding.
        if valid is not None and not valid.is_meta and bool(valid.all()):
            valid = None
    heads = mask.shape[1] if isinstance(mask, torch.Tensor) and mask.ndim == 4 else 1
    return Pass(Tokens(batch, length, valid), past > 0, cache, heads, ids if mask is None else None)


_LENGTH = "_probeprune_length"
"""Attribute of a cache: the tensor with its length, and its version when `remember_length` saw it."""


def remember_length(cache: Any) -> None:
    """Note, after a pass that filled a cache, that its length is not zero: where others leave it, nobody need
    read it again, which would wait for the device."""
    length = cache.get_seq_length()
    if isinstance(length, torch.Tensor) and not length.is_inference():
        setattr(cache, _LENGTH, (length, length._version))


def _past(cache: Any, length: int) -> int:
    """Number of cached tokens. For a one-token pass only zero or non-zero matters, so 1 may mean "some"."""
    cached = cache.get_seq_length()
    if isinstance(cached, int) or length > 1:
        return int(cached)
    if cached.is_inference():  # it counts no versions
        return 1
    seen, version = getattr(cache, _LENGTH, (None, 0))
    if version == cached._version and seen is cached:
        return 1  # a static cache in use
    return int(cached)  # it may have been reset


def _valid(mask: torch.Tensor, past: int, length: int) -> torch.Tensor | None:
    """Which tokens of a pass are real (batch, length), from its mask; None where that cannot be seen."""
    if mask.ndim == 4:  # already causal: a real token may attend to itself
        mask = mask[:, 0].diagonal(past, dim1=-2, dim2=-1)
        if past and mask.shape[1] != length:  # the columns of a sliding cache are not positions
            return None
        mask = mask if mask.dtype == torch.bool else mask == 0
    elif mask.ndim == 2 and mask.shape[1] >= past + length:
        mask = mask[:, past:]
    if mask.ndim != 2 or mask.shape[1] < length:
        raise UsageError("the attention mask must have shape (batch, sequence).")
    return mask[:, :length].bool()


def token_windows(model: nn.Module, windows: Any) -> torch.Tensor:
    """Windows of token ids as a LongTensor (count, length) on the CPU.

    Args:
        model: the model that will read them.
        windows: ids of any integer type, as a tensor, an array or lists; one window may be flat.

    Raises:
        UsageError: no window, ids that are no integers or not in the model's vocabulary, windows longer than
            its positions.
    """
    try:
        ids = windows if isinstance(windows, torch.Tensor) else torch.as_tensor(windows, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"windows must be token ids of shape (count, length), not {type(windows).__name__} "
            f"({first_line(error)})."
        ) from None
    ids = ids[None] if ids.ndim == 1 else ids
    if ids.ndim != 2 or not ids.numel():
        raise UsageError(
            f"windows must be token ids of shape (count, length), at least one, not {tuple(ids.shape)}."
        )
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise UsageError(f"windows must be integer token ids, not {ids.dtype}.")
    ids = ids.long()
    if not ids.is_meta:
        ids = ids.cpu()
        _check_ids(model, ids)
    limit = position_limit(model.config)
    if limit is not None and ids.shape[1] > limit:
        raise UsageError(
            f"windows of {ids.shape[1]} tokens are longer than the model's {limit} positions; "
            f"use windows of at most {limit}."
        )
    return ids


def _check_ids(model: Any, ids: torch.Tensor) -> None:
    vocabulary = model.get_input_embeddings().num_embeddings
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0 or highest >= vocabulary:
        wrong = lowest if lowest < 0 else highest
        raise UsageError(
            f"token id {wrong} is not in the model's vocabulary of {vocabulary}; use this model's tokenizer."
        )


def position_limit(config: Any) -> int | None:
    """The longest sequence that a model is made for, from its config; None where that states none.

    RoPE that is scaled to longer sequences (dynamic NTK, YaRN and others) counts with its factor.
    """
    config = text_config(config)
    named: list[int | None] = [getattr(config, n, None) for n in ("max_position_embeddings", "max_seq_len")]
    limit = next((n for n in named if n is not None), None)
    rope = getattr(config, "rope_parameters", None) or {}
    if limit is None or rope.get("rope_type", "default") in ("default", "proportional"):
        return limit
    original = rope.get("original_max_position_embeddings") or limit
    return max(limit, int(original * (rope.get("factor") or 1)))
