"""One model that is attached, used and abused, and its twin, which is never attached but shares the rest.

Every step is one call with plain arguments, so a sequence of steps is a script. A step checks what it did;
`check` says after each whether the model is still the one that it has to be.
"""

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from all_methods import ALL, WINDOWS
from ambient import default_dtype, deterministic
from soak.oracle import Oracle, permuted
from tiny import FAMILIES
from torch import nn
from transformers import DynamicCache, StaticCache

import probeprune
from probeprune import UsageError, attach, prepare
from probeprune.model.blocks import find_blocks
from probeprune.model.passes import find_decoder
from probeprune.prepare import Prepared
from probeprune.runtime.handle import Handle

AMBIENT: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: _both(torch.no_grad(), torch.autocast("cpu", torch.bfloat16)),
    "uncached autocast": lambda: _both(
        torch.no_grad(), torch.autocast("cpu", torch.bfloat16, cache_enabled=False)
    ),
    "grad": nullcontext,
    "deterministic": lambda: _both(torch.no_grad(), deterministic()),
    "double": lambda: _both(torch.no_grad(), default_dtype(torch.float64)),
    "cpu": lambda: _both(torch.no_grad(), torch.device("cpu")),
}
"""What a caller may have switched around a call."""
_HOOKS = (
    *("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"),
    *(
        "_load_state_dict_pre_hooks",
        "_load_state_dict_post_hooks",
        "_state_dict_hooks",
        "_state_dict_pre_hooks",
    ),
)
PERHAPS = "weights perhaps changed"
"""A reason for which passes may be refused but need not be."""
LIMITS = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 0.25}
"""Largest difference from the twin over its largest value, by dtype."""


@contextmanager
def _both(*contexts: Any) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


@cache
def prepared(family: str, method: str, ratio: float) -> Prepared:
    """The calibration of one method on an untouched model of a family."""
    return prepare(FAMILIES[family](), ALL[method], ratio, WINDOWS)


@dataclass
class Cached:
    """A cache of the model, its counterpart of the twin, and what filled them."""

    own: Any
    twins: Any
    oracle: Oracle | None
    handle: Handle | None
    mask: torch.Tensor
    since_refresh: int = 0
    ambient: str = "no_grad"
    """The roughest settings under which it was filled."""
    stale: bool = False
    """Whether a pass may have failed since."""


class World:
    """A tiny model, what is done to it, and a twin to which the same is done except attaching."""

    def __init__(self, family: str) -> None:
        self.family = family
        self.model, self.twin = FAMILIES[family](), FAMILIES[family]()
        self.handle: Handle | None = None
        self.cache: Cached | None = None
        self.hooks: list[tuple[str, Any, Any]] = []
        self.seen: tuple[list, list] = ([], [])
        self.rounded: set[torch.dtype] = set()  # what a compensation has been cast to
        self.unfit = ""  # why passes may be refused
        self.edited = self.unspecified = self.loose = False
        self.counts: Counter[tuple[str, str]] = Counter()
        blocks = find_blocks(self.model)
        decoder = next(n for n, m in self.model.named_modules() if m is find_decoder(self.model))
        layer = blocks[6].name.rpartition(".")[0]
        names = {m: n for n, m in self.model.named_modules()}
        self.places = [
            decoder,
            layer if layer in names.values() else f"{decoder}.layers.3",
            *(names[b.entry] for b in blocks[6:8]),
            *(names[b.norm] for b in blocks[6:8] if b.norm is not None),
            *(names[b.consumer] for b in blocks[6:8]),
            *(names[b.producers[0]] for b in blocks[6:8]),
            names[self.model.get_input_embeddings()],
            "lm_head" if "lm_head" in names.values() else names[self.model.get_output_embeddings()],
        ]

    # -- helpers -------------------------------------------------------------------------------

    def both(self) -> tuple[nn.Module, nn.Module]:
        return self.model, self.twin

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def dynamic(self) -> bool:
        return self.handle is not None and self.handle.method.when.every_batch

    def attempt(self, what: str, call: Callable[[], Any], refusal: str, dense: Callable[[], Any] | None):
        """The result of a call; None where it was refused with reason, or where the twin refuses it too."""
        try:
            result = call()
        except UsageError as error:
            self.counts[what, "refused"] += 1
            assert refusal, f"{what} was refused without need: {error}"
            return None
        except Exception as error:
            if dense is None:
                raise
            try:
                made = dense()
            except Exception as other:
                # Where ours says that numbers overflowed, the dense model may fail at what came of them.
                if not isinstance(error, type(other) | FloatingPointError):
                    raise error from other
            else:
                if not isinstance(error, FloatingPointError) or _finite(made):
                    raise
            self.counts[what, "wrong for the dense model too"] += 1
            return None
        self.counts[what, "ran"] += 1
        return result

    def agree(self, got: torch.Tensor, want: torch.Tensor, what: str, ambient: str = "no_grad") -> None:
        """Equal to rounding."""
        assert got.shape == want.shape, f"{what}: {tuple(got.shape)}, not {tuple(want.shape)}"
        if self.unspecified or not want.isfinite().all() or not want.numel():
            return
        dtypes = {self.dtype, *self.rounded, *([torch.bfloat16] if "autocast" in ambient else [])}
        error = (got.double() - want.double()).abs().max() / want.double().abs().max().clamp_min(1e-30)
        assert error <= max(LIMITS[d] for d in dtypes), f"{what}: an error of {error:.2g}"

    def inputs(self, batch: int, length: int, side: str, mask: str, seed: int) -> tuple[dict, torch.Tensor]:
        """Arguments of a pass, and which of its tokens are real (batch, length)."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, 120, (batch, length), generator=generator)
        real = torch.ones(batch, length, dtype=torch.long)
        if side != "none":
            for row in range(1, batch):
                real[row, : (row * 5 + seed) % length] = 0
            real = real.flip(1) if side == "right" else real
        arguments: dict[str, Any] = {"input_ids": ids}
        if mask == "none":
            real = torch.ones_like(real)
        elif mask == "2d":
            arguments["attention_mask"] = real
        elif mask == "packed":
            real = torch.ones_like(real)
            cut = length // 2
            arguments["position_ids"] = torch.cat([torch.arange(cut), torch.arange(length - cut)])[
                None
            ].repeat(batch, 1)
        else:
            seen = torch.ones(length, length).tril().bool()[None, None] & real.bool()[:, None, None]
            if mask == "holes":
                seen = seen & (torch.rand(batch, 1, length, length, generator=generator) < 0.7)
            seen = seen | torch.eye(length).bool()
            least = torch.finfo(self.dtype).min
            arguments["attention_mask"] = (
                seen
                if mask == "bool"
                else torch.zeros(seen.shape, dtype=self.dtype).masked_fill(~seen, least)
            )
        return arguments, real

    def kept_tokens(self, arguments: dict, real: torch.Tensor) -> torch.Tensor:
        """The tokens that the runtime takes for real: with a mask of its own, all attend to themselves."""
        mask = arguments.get("attention_mask")
        return real if mask is None or mask.ndim == 2 else torch.ones_like(real)

    # -- attach and detach ---------------------------------------------------------------------

    def attach(self, method: str, ratio: float, calibration: str, ambient: str = "no_grad") -> None:
        """Attach a method; calibration is `prepared` or `windows`."""
        training = self.model.training
        given = (
            prepared(self.family, method, ratio)
            if calibration == "prepared" and not self.edited and self.dtype == torch.float32
            else WINDOWS
        )
        refusal = "attached already" if self.handle is not None else "training" if training else ""
        if self.hooks and given is WINDOWS:
            refusal = refusal or "hooks may stand in the way of calibration"

        def call() -> Handle:
            with AMBIENT[ambient]():
                return attach(self.model, ALL[method], ratio, calibration=given)

        try:
            dense = lambda: self._pass(self.twin, {"input_ids": WINDOWS}, ambient)  # noqa: E731
            handle = self.attempt("attach", call, refusal, dense)
        except FloatingPointError:
            assert self.dtype == torch.float16, "only half precision overflows here"
            return
        for seen in self.seen:
            seen.clear()  # of calibration
        if handle is None:
            return
        assert not training and self.handle is None
        self.handle = handle

    def detach(self, how: str, ambient: str = "no_grad") -> None:
        """Detach by `handle`, `function`, `context`, `error`, `twice` or `lost` handle."""
        handle = self.handle
        if handle is None:
            probeprune.detach(self.model)
            return
        self.counts["detach", "ran"] += 1
        with AMBIENT[ambient]():
            if how in ("handle", "twice"):
                handle.detach()
            if how in ("function", "twice"):
                probeprune.detach(self.model)
            if how in ("context", "error"):
                with suppress(ZeroDivisionError), handle:
                    if how == "error":
                        raise ZeroDivisionError
            if how == "lost":
                self.cache = self.handle = handle = None
                gc.collect()
                probeprune.detach(self.model)
        self.handle, self.unfit, self.unspecified = None, "", False
        self.rounded.clear()

    # -- passes --------------------------------------------------------------------------------

    def _pass(self, model: nn.Module, arguments: dict, ambient: str) -> Any:
        torch.manual_seed(0)
        with AMBIENT[ambient]():
            return model(**arguments)

    def forward(
        self,
        batch: int,
        length: int,
        side: str,
        mask: str,
        seed: int,
        cache: str = "none",
        ambient: str = "no_grad",
        extras: bool = False,
    ) -> None:
        """A pass over a new batch, with a cache or without, compared with the twin under the same units."""
        arguments, real = self.inputs(batch, length, side, mask, seed)
        if extras:
            arguments |= {"output_hidden_states": True, "output_attentions": True}
        caches: list[Any] = [None, None]
        if cache == "none":
            arguments["use_cache"] = False
        elif cache == "static":
            caches = [StaticCache(config=m.config, max_cache_len=40) for m in self.both()]
        elif cache == "dynamic":
            caches = [DynamicCache(config=m.config) for m in self.both()]
        own, twins = ({**arguments, **({"past_key_values": c} if c else {})} for c in caches)
        self._begin_prompt()
        refusal = self.unfit or (self.handle is not None and self.model.training and "training")
        output = self.attempt(
            "forward",
            lambda: self._pass(self.model, own, ambient),
            str(refusal or ""),
            lambda: self._pass(self.twin, twins, ambient),
        )
        if output is None:
            self._forget(cache)
            return
        demanded = refusal not in ("", False, PERHAPS) and not self.unspecified and not self.model.training
        assert not demanded, f"not refused: {refusal}"
        oracle = self._oracle(self.kept_tokens(arguments, real))
        with oracle() if oracle else nullcontext():
            want = self._pass(self.twin, twins, ambient)
        self._compare(output, want, real.bool(), ambient)
        if cache != "none":
            self.cache = Cached(
                output.past_key_values, want.past_key_values, oracle, self.handle, real.clone()
            )
            self.cache.ambient = ambient

    def _oracle(self, real: torch.Tensor, whole: bool = False) -> Oracle | None:
        return None if self.handle is None else Oracle(self.handle, self.twin, real, whole)

    def _begin_prompt(self) -> None:
        """An earlier cache may still go on, under its own units. Under a refresh these depend on every pass
        in between, which no formula here follows."""
        if self.handle is not None and getattr(self.handle.method.when, "refresh", 0):
            self.cache = None

    def _mark_stale(self) -> None:
        if self.cache is not None and self.dynamic:
            self.cache.stale = True

    def _forget(self, cache: str) -> None:
        if self.cache is not None and (cache != "none" or self.dynamic):
            self.cache.stale = True
        for seen in self.seen:
            seen.clear()

    def _compare(self, output: Any, want: Any, real: torch.Tensor, ambient: str) -> None:
        self.agree(output.logits[real], want.logits[real], "logits", ambient)
        for name in ("hidden_states", "attentions"):
            got, wanted = getattr(output, name, None), getattr(want, name, None)
            assert (got is None) == (wanted is None), name
            if got is not None:
                assert len(got) == len(wanted), f"{len(got)} {name}, not {len(wanted)}"
                for one, other in zip(got, wanted, strict=True):
                    if name == "hidden_states":
                        self.agree(one[real], other[real], name, ambient)
                    elif one is not None:
                        assert one.shape[0::2] == other.shape[0::2], name
        self._compare_seen()

    def _compare_seen(self) -> None:
        """Users' hooks saw the model's own pass, once, as the twin's saw the twin's."""
        own, twins = self.seen
        assert own == twins, f"hooks saw {own}, not {twins}"
        for seen in self.seen:
            seen.clear()

    # -- what always holds ---------------------------------------------------------------------

    def check(self) -> None:
        """Weights, hooks and attributes are those of the twin, attached or not."""
        if self.loose and self.handle is None:
            self._settle()
        want = (
            permuted(self.handle, self.twin)
            if self.handle is not None
            else dict(self.twin.named_parameters())
        )
        got = dict(self.model.named_parameters())
        assert got.keys() == want.keys()
        for name, parameter in got.items():
            same = parameter.dtype == want[name].dtype and (self.loose or _equal(parameter, want[name]))
            assert same, f"{name} is not the twin's"
        twins = dict(self.twin.named_buffers())
        for name, buffer in self.model.named_buffers():
            assert buffer.dtype == twins[name].dtype and buffer.equal(twins[name]), name
        for place, own, _ in self.hooks:
            module = self.model.get_submodule(place)
            assert own.id in module._forward_hooks or own.id in module._forward_pre_hooks, place
        if self.handle is None:
            self._check_detached()

    def _check_detached(self) -> None:
        twins = dict(self.twin.named_modules())
        for name, module in self.model.named_modules():
            twin = twins[name]
            assert type(module) is type(twin), name
            others = (module.__dict__.keys() ^ twin.__dict__.keys()) - {"_previous_max_cache_length"}
            assert not others, f"{name} has or lacks {others}"
            for kind in _HOOKS:
                assert len(getattr(module, kind)) == len(getattr(twin, kind)), f"{name}{kind}"
        if not self.model.training:
            arguments, _ = self.inputs(2, 6, "left", "2d", 3)
            got, want = (self._pass(m, arguments, "no_grad").logits for m in self.both())
            assert got.equal(want) or not want.isfinite().all(), "the dense model computes something else"
            self._compare_seen()

    def _settle(self) -> None:
        """After a step of an optimiser the two are equal to rounding; from here on they are equal."""
        for (name, own), twin in zip(self.model.named_parameters(), self.twin.parameters(), strict=True):
            self.agree(own.detach(), twin.detach(), name)
            twin.data.copy_(own.data)
        self.loose = False


def _finite(output: Any) -> bool:
    """Whether the logits of an output, of one pass or of a generated text, are finite."""
    logits = getattr(output, "logits", ())
    return all(bool(part.isfinite().all()) for part in (logits if isinstance(logits, tuple) else [logits]))


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit for bit, or NaN in the same places: eager attention in float64 gives such gradients to both."""
    return one.equal(other) or (one.shape == other.shape and one.nan_to_num(1.5).equal(other.nan_to_num(1.5)))
