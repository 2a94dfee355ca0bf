"""The other things that users do to a model while a method may be attached, and all steps together."""

import copy
import io
import pickle
import tempfile
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from all_methods import ALL, STATIC, WINDOWS
from soak.weights import Weights
from tiny import opened
from torch import nn

from probeprune import UsageError, prune, save

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


class Full(Weights):
    """A world with all steps."""

    def cast(self, dtype: str) -> None:
        """`.to(dtype)`; gradients are dropped first."""
        self.zero_grad()
        for model in self.both():
            model.to(DTYPES[dtype])
        if self.handle is not None and self.handle.method.compensation.kind != "none":
            self.rounded.add(DTYPES[dtype])
        self.edited = True
        self.cache = None

    def move(self) -> None:
        """`.cpu()`, which changes nothing."""
        for model in self.both():
            model.cpu()

    def switch_attention(self, implementation: str) -> None:
        if implementation == "eager" or self.twin._supports_sdpa:
            for model in self.both():
                model.set_attn_implementation(implementation)

    def checkpointing(self, on: bool) -> None:
        for model in self.both():
            model.gradient_checkpointing_enable() if on else model.gradient_checkpointing_disable()

    def train(self, on: bool) -> None:
        for model in self.both():
            model.train(on)

    def require_grad(self, on: bool) -> None:
        for model in self.both():
            model.requires_grad_(on)

    def hook(self, kind: str, place: int) -> None:
        """Register a hook at a place: `forward`, `pre` or `kwargs` record, `steer` changes the output."""
        name = self.places[place % len(self.places)]
        inner = any(s in name.rpartition(".")[2] for s in ("proj", "fc", "dense", "query"))
        handles = []
        for model, seen in zip(self.both(), self.seen, strict=True):
            module = model.get_submodule(name)

            def note(_: nn.Module, *rest: Any, seen: list = seen) -> None:
                shape = None if inner else tuple(_first(rest[-1]).shape)
                seen.append((name, kind, shape))

            def steer(_: nn.Module, args: Any, output: Any) -> Any:
                return output + 0.5 if isinstance(output, torch.Tensor) else None

            if kind == "pre":
                handles.append(module.register_forward_pre_hook(lambda m, a, note=note: note(m, a)))
            elif kind == "kwargs":
                handles.append(
                    module.register_forward_hook(lambda m, a, k, o, note=note: note(m, o), with_kwargs=True)
                )
            elif kind == "steer" and name.endswith(("norm", "wte", "embed_tokens", "embed_in")):
                handles.append(module.register_forward_hook(steer))
            else:
                handles.append(module.register_forward_hook(note))
        self.hooks.append((name, *handles))

    def unhook(self, index: int) -> None:
        if self.hooks:
            _, *handles = self.hooks.pop(index % len(self.hooks))
            for handle in handles:
                handle.remove()

    def wrap(self, place: int) -> None:
        """Replace a forward by one that calls it, as accelerate does."""
        name = self.places[place % len(self.places)]
        for model in self.both():
            module = model.get_submodule(name)

            def wrapped(*args: Any, _forward: Any = module.forward, **kwargs: Any) -> Any:
                return _forward(*args, **kwargs)

            module.forward = wrapped

    def unwrap(self, place: int) -> None:
        """Take a user's own forward away again, where nothing is attached."""
        name = self.places[place % len(self.places)]
        if self.handle is None:
            for model in self.both():
                model.get_submodule(name).__dict__.pop("forward", None)

    def fail(self, place: int, seed: int, cached: bool) -> None:
        """An exception in a hook, in a new pass or in one that goes on."""
        name = self.places[place % len(self.places)]
        arguments, _ = self.inputs(2, 7, "left", "2d", seed)
        twins: Any = None
        # The dense model cannot refuse the cache of a method that was detached: it may have fewer heads.
        if cached and self.cache is not None and self.cache.handle is self.handle:
            ids = arguments["input_ids"][:1].repeat(self.cache.mask.shape[0], 1)
            mask = torch.cat([self.cache.mask, torch.ones_like(ids)], 1)
            twins = self.cache.twins
            arguments = {"input_ids": ids, "attention_mask": mask, "past_key_values": self.cache.own}
            self.cache = None
        else:
            self._begin_prompt()
        self._mark_stale()

        def fails(*_: object) -> None:
            raise ZeroDivisionError

        hook = self.model.get_submodule(name).register_forward_pre_hook(fails, prepend=True)
        try:
            self._pass(self.model, arguments, "no_grad")
        except (ZeroDivisionError, UsageError):
            pass
        except FloatingPointError:  # the dense model's, of rows that are masked throughout
            assert self.dtype in (torch.float16, torch.float64)
        except RuntimeError as error:  # before the hook's turn: a static cache made under another mode
            try:
                self._pass(self.twin, {**arguments, "past_key_values": twins}, "no_grad")
            except RuntimeError as other:
                assert str(other) == str(error), error
            else:
                raise
        finally:
            hook.remove()
        for seen in self.seen:
            seen.clear()

    def threads(self, seed: int) -> None:
        """Two threads, a pass each at the same time: neither meets the other."""
        if self.unfit or self.model.training or self.hooks:
            return
        self._begin_prompt()
        self._mark_stale()
        given = [self.inputs(2, 8, "left", "2d", seed + i) for i in range(2)]
        found: list[Any] = [None, None]

        def run(i: int) -> None:
            try:
                with torch.no_grad():
                    found[i] = self.model(**given[i][0], use_cache=False).logits
            except BaseException as error:
                found[i] = error

        threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        for (arguments, real), got in zip(given, found, strict=True):
            if isinstance(got, FloatingPointError):
                dense = self._pass(self.twin, {**arguments, "use_cache": False}, "no_grad").logits
                if not dense.isfinite().all():
                    self.counts["threads", "wrong for the dense model too"] += 1
                    return
            if isinstance(got, BaseException):
                raise got
            if not self.dynamic:
                oracle = self._oracle(real)
                with oracle() if oracle else nullcontext():
                    want = self._pass(self.twin, {**arguments, "use_cache": False}, "no_grad").logits
                self.agree(got[real.bool()], want[real.bool()], "logits of a thread")
        self.counts["threads", "ran"] += 1

    # -- copies --------------------------------------------------------------------------------

    def duplicate(self, how: str) -> None:
        """`deepcopy` or `pickle`: refused while attached, else an independent model."""
        if any("forward" in m.__dict__ for m in self.twin.modules()) or self.hooks:
            return  # functions of this file cannot be copied

        def duplicate(model: nn.Module) -> nn.Module:
            return copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))

        attached = self.handle is not None
        refusal = "attached" if attached else ""
        found = self.attempt(how, lambda: duplicate(self.model), refusal, lambda: duplicate(self.twin))
        if found is not None and not attached and not self.model.training:
            arguments, _ = self.inputs(2, 6, "left", "2d", 5)
            got, want = (self._pass(m, arguments, "no_grad").logits for m in (found, self.twin))
            assert got.equal(want) or not want.isfinite().all(), "the copy computes something else"

    def state(self, assign: bool) -> None:
        """`state_dict` gives the dense weights; loading them is refused while attached."""
        saved, twins = self.model.state_dict(), self.twin.state_dict()
        assert saved.keys() == twins.keys()
        if not self.loose:
            for name, value in saved.items():
                assert value.equal(twins[name]), f"{name} in the state dict"
        torch.save(saved, io.BytesIO())
        other = {n: v * 1.25 if v.is_floating_point() else v for n, v in twins.items()}
        pruned = self.handle is not None and self.handle.pruned
        result = self.attempt(
            "load",
            lambda: self.model.load_state_dict({n: v.clone() for n, v in other.items()}, assign=assign),
            "attached" if pruned else "",
            None,
        )
        if result is not None:
            assert not pruned
            self.twin.load_state_dict({n: v.clone() for n, v in other.items()}, assign=assign)
            self.edited, self.cache = True, None

    def cut(self, method: int, layout: str) -> None:
        """Prune a copy for good, and once more from disk: both compute the same."""
        if self.handle is not None or self.model.training or self.hooks or self.edited:
            return
        if any("forward" in m.__dict__ for m in self.twin.modules()):
            return
        name = STATIC[method % len(STATIC)] if layout == "per-layer" else "even widths"
        if name in ("flap", "refit with a bias") or ALL[name].gradients is not None:
            name = "wanda-sp"
        smaller = copy.deepcopy(self.twin)
        prune(smaller, ALL[name], 0.2, calibration=WINDOWS)
        arguments, real = self.inputs(2, 7, "left", "2d", 1)
        want = self._pass(smaller, arguments, "no_grad").logits[real.bool()]
        with tempfile.TemporaryDirectory() as folder:
            if layout == "uniform" and self.family.startswith(("opt", "gpt", "phi3")):
                return  # heads tied to the hidden size
            save(smaller, f"{folder}/smaller", layout=layout)
            again = opened(Path(folder, "smaller"), attn_implementation=smaller.config._attn_implementation)
        self.agree(self._pass(again, arguments, "no_grad").logits[real.bool()], want, "a checkpoint")
        self.counts["cut", "ran"] += 1


def _first(found: Any) -> torch.Tensor:
    """The first tensor of a module's arguments or outputs."""
    if isinstance(found, torch.Tensor):
        return found
    if hasattr(found, "last_hidden_state"):
        return found.last_hidden_state
    if hasattr(found, "keys"):
        found = tuple(found.values())
    return _first(found[0]) if len(found) else torch.empty(0)
