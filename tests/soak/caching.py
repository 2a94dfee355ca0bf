"""Passes that go on behind a cache, and generation."""

import copy
from contextlib import nullcontext
from typing import Any

import torch
from soak.world import World
from torch import nn

from probeprune import UsageError

GENERATION: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_p": 0.9, "temperature": 1.5, "num_return_sequences": 2},
    "beams": {"num_beams": 3},
    "static": {"cache_implementation": "static"},
    "static beams": {"cache_implementation": "static", "num_beams": 2},
    "no cache": {"use_cache": False},
}


class Caching(World):
    """A world with caches and generation."""

    def go_on(self, length: int, seed: int, ambient: str = "no_grad") -> None:
        """More tokens behind the cache of an earlier pass."""
        cached = self.cache
        assert cached is not None
        if self.model.training and self.model.is_gradient_checkpointing:
            self.cache = None  # transformers leaves the cache out, and some models then compute nonsense
            return
        batch = cached.mask.shape[0]
        ids = torch.randint(3, 120, (batch, length), generator=torch.Generator().manual_seed(seed))
        mask = torch.cat([cached.mask, torch.ones_like(ids)], 1)
        arguments = {"input_ids": ids, "attention_mask": mask}
        own, twins = ({**arguments, "past_key_values": c} for c in (cached.own, cached.twins))
        if cached.handle is not self.handle:
            self._foreign_cache(own)
            return
        refusal = self.unfit or (self.handle is not None and self.model.training and "training")
        refusal = refusal or (cached.stale and "a pass failed")
        when = None if self.handle is None else self.handle.method.when
        refresh = getattr(when, "refresh", 0)
        empty = cached.own.get_seq_length() == 0
        since = 0 if empty else cached.since_refresh + length
        due = 0 < refresh <= since
        oracle = cached.oracle
        before = None if self.handle is None or empty else self._oracle(cached.mask, due)
        if refresh:
            oracle = before
        output = self.attempt(
            "go_on",
            lambda: self._pass(self.model, own, ambient),
            str(refusal or ""),
            lambda: self._pass(self.twin, twins, ambient),
        )
        if output is None:
            self.cache = None
            self._forget("none")
            return
        if self.dynamic and empty:
            oracle = cached.oracle = self._oracle(mask[:, -length:])
        with oracle() if oracle else nullcontext():
            want = self._pass(self.twin, twins, ambient)
        if "autocast" in ambient:
            cached.ambient = ambient
        self._compare(output, want, torch.ones_like(ids).bool(), cached.ambient)
        cached.mask, cached.since_refresh = mask, 0 if due else since

    def _foreign_cache(self, arguments: dict) -> None:
        """A cache that was filled under another method, or none: refused where heads differ."""
        self.cache = None
        handle = self.handle
        if handle is None:
            return
        filled = arguments["past_key_values"].get_seq_length() > 0
        heads = filled and (handle.runtimes or any(p.block.kind == "attention" for p in handle.pruned))
        try:
            self._pass(self.model, arguments, "no_grad")
        except UsageError:
            self.counts["foreign cache", "refused"] += 1
            self._forget("none")
            return
        except FloatingPointError:  # the dense model's, of rows that are masked throughout
            assert self.dtype in (torch.float16, torch.float64)
            self._forget("none")
            return
        assert not heads, "a cache that other heads filled was accepted"
        for seen in self.seen:
            seen.clear()

    def change_cache(self, how: str) -> None:
        """Copy, reorder, repeat, select, crop or empty the cache."""
        cached = self.cache
        assert cached is not None
        batch = cached.mask.shape[0]
        try:
            for name in ("own", "twins"):
                setattr(cached, name, _changed(getattr(cached, name), how, batch))
        except (NotImplementedError, ValueError, RuntimeError, AttributeError, TypeError):
            self.cache = None  # transformers does not do this to such a cache
            return
        if how == "repeat":
            cached.mask = cached.mask.repeat_interleave(2, 0)
        if how == "reorder":
            cached.mask = cached.mask.flip(0)
        if how == "select":
            cached.mask = cached.mask[:1]
        if how == "crop":
            cached.mask = cached.mask[:, : cached.twins.get_seq_length()]
        if how == "reset":
            cached.mask = cached.mask[:, :0]

    def generate(self, kind: str, batch: int, length: int, side: str, seed: int) -> None:
        """Text after a prompt: that of the twin under the units of the prompt."""
        arguments, real = self.inputs(batch, length, side, "2d", seed)
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": 127}
        options |= {"return_dict_in_generate": True, "output_logits": True, **GENERATION[kind]}
        self._begin_prompt()
        refusal = self.unfit or (self.handle is not None and self.model.training and "training")

        def run(model: nn.Module) -> Any:
            torch.manual_seed(seed)
            return model.generate(**arguments, **options)

        output = self.attempt("generate", lambda: run(self.model), str(refusal or ""), lambda: run(self.twin))
        if output is None:
            self._forget("none")
            return
        when = None if self.handle is None else self.handle.method.when
        if getattr(when, "refresh", 0) or (self.dynamic and kind == "no cache"):
            for seen in self.seen:
                seen.clear()
            return
        each = options.get("num_beams", options.get("num_return_sequences", 1))
        oracle = self._oracle(real.repeat_interleave(int(each), 0))
        with oracle() if oracle else nullcontext():
            want = run(self.twin)
        calls, twins = (len(s) for s in self.seen)
        for seen in self.seen:
            seen.clear()
        if self.dtype in (torch.float16, torch.bfloat16) or self.unspecified:
            return
        assert calls == twins, "hooks were called another number of times"
        for one, other in zip(output.logits, want.logits, strict=True):
            if "beams" not in kind:
                self.agree(one, other, "logits of generated tokens")
        assert output.sequences.equal(want.sequences), "other tokens were generated"


def _changed(cache: Any, how: str, batch: int) -> Any:
    if how == "copy":
        return copy.deepcopy(cache)
    if how == "reorder":
        cache.reorder_cache(torch.arange(batch).flip(0))
    if how == "repeat":
        cache.batch_repeat_interleave(2)
    if how == "select":
        cache.batch_select_indices(torch.arange(1))
    if how == "crop":
        cache.crop(-1)
    if how == "reset":
        cache.reset()
    return cache
