"""The runtime: `attach` a method to a model, run the model's own forward on what is kept, `detach`.

Static methods order and cut once, then cost nothing. Dynamic ones do, for each block and each batch, the
stages of Probe Pruning (`runtime.py`); a pass that continues a KV cache keeps the units its prompt chose.
Here is what concerns the whole model: which stage a pass is, whose cache it continues, one pass at a time.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import nn

from probeprune.calibration.statistics import Statistics
from probeprune.errors import UsageError
from probeprune.methods import Method, check_untrained, get_method
from probeprune.model.blocks import Block, find_blocks
from probeprune.model.passes import Pass, check_eval, on_pass
from probeprune.plan import Kept, check_statistics, overflow, static_scores, widths
from probeprune.runtime.block import BlockRuntime, CurrentPass
from probeprune.strategies import allocation

_ATTACHED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_CHOICES = itertools.count(1)
_CHOICE = "_probeprune_choice"
"""Attribute of a KV cache: under which choice of heads it was filled. A copy of the cache has it too."""


def attach(
    model: nn.Module,
    method: str | Method,
    ratio: float = 0.0,
    *,
    statistics: Statistics | None = None,
) -> Handle:
    """Prune `model` while it runs, until the handle is detached.

    Example:
        >>> with probeprune.attach(model, "probe", ratio=0.4, statistics=statistics):
        ...     model(**batch)

    Args:
        model: a transformers causal LM of a supported family, in eval mode, with sdpa or eager attention
            for dynamic methods. Its weights are permuted in place and put back by `detach`. Under a dynamic
            method, passes from several threads run one after the other.
        method: a name from `METHODS`, or a `Method`.
        ratio: share of the parameters of all blocks to prune, in [0, 1).
        statistics: from `calibrate` on this model, where the method needs them.

    Raises:
        UsageError: unsupported model, method, ratio or statistics; a model in training mode or one that
            is attached already.
    """
    method = get_method(method)
    check_untrained(method)
    allocation.check_ratio(ratio)
    check_eval(model)
    if model in _ATTACHED:
        raise UsageError("this model already has a method attached; detach it first.")
    blocks = find_blocks(model, method.units)
    known = check_statistics(method, blocks, statistics)
    if method.when == "batch" and _attention(model) not in ("sdpa", "eager"):
        raise UsageError("probing needs sdpa or eager attention; load the model with one of them.")
    if method.probe is not None and method.probe.refresh and any(m.own for m in known.moments.values()):
        raise UsageError("refresh needs statistics that pool positions: calibrate with own_positions=0.")
    with torch.inference_mode(False), torch.no_grad():  # what inference mode makes cannot be written outside
        return Handle(model, method, ratio, blocks, known)


def _attention(model: nn.Module) -> str:
    config: Any = model.config
    return str(config._attn_implementation)


def _before(method: Method, blocks: Sequence[Block], i: int) -> Block | None:
    """The block beside which the i-th is probed, if it is."""
    return blocks[i - 1] if i and method.probe is not None and method.probe.parallel else None


class Handle:
    """A method attached to a model; a context manager that detaches on exit.

    Attributes:
        model, method, ratio: as given to `attach`.
        blocks: every prunable block of the model.
        kept: units each block keeps; the same at every batch.
        swapped: units brought into windows so far, by all blocks together.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        ratio: float,
        blocks: Sequence[Block],
        statistics: Statistics,
    ) -> None:
        self.model, self.method, self.ratio = model, method, ratio
        self.blocks = blocks
        self._now = CurrentPass(layer_types=getattr(model.config, "layer_types", None) or ())
        self._lock = threading.RLock()
        self._choice: int | None = None  # the one whose heads the windows show
        self._since_choice = self._since_refresh = 0  # tokens
        self._undo: list[Callable[[], None]] = []
        scores = [static_scores(method, b, statistics) for b in blocks]
        self.kept = widths(method, ratio, blocks, scores, statistics)
        self._runtimes = [
            BlockRuntime(
                method, self._now, b, keep, s, statistics.moments.get(b.name), _before(method, blocks, i)
            )
            for i, (b, keep, s) in enumerate(zip(blocks, self.kept, scores, strict=True))
            if keep < b.units
        ]
        _ATTACHED.add(model)
        try:
            for runtime in self._runtimes:
                runtime.start()
            self._check_finite()
            if method.needs_refit:
                for r in self._runtimes:
                    r.refitted(statistics.check_consumer(r.block, r.chosen))
            if method.when == "batch":
                self._undo.append(on_pass(model, self._run))
                for runtime in self._runtimes:
                    self._undo += [hook.remove for hook in runtime.hooks()]
        except BaseException:
            self.detach()
            raise

    @property
    def probed(self) -> tuple[list[Block], list[int]]:
        """Blocks that follow the batch, and how many units each keeps."""
        runtimes = [r for r in self._runtimes if r.follows]
        return [r.block for r in runtimes], [r.keep for r in runtimes]

    @property
    def removed_share(self) -> float:
        """Share of all blocks' parameters that the cut leaves out."""
        return allocation.removed_share(self.blocks, self.kept)

    @property
    def swapped(self) -> int:
        """Units brought into windows so far, by all blocks together. Waits for an accelerator."""
        return sum(int(r.swapped) for r in self._runtimes)

    def kept_units(self) -> list[Kept]:
        """What every block keeps at present."""
        partitions = {r.block.name: r.partition for r in self._runtimes}
        report = []
        for b in self.blocks:
            units = partitions[b.name].kept_units.tolist() if b.name in partitions else range(b.units)
            report.append(Kept(b.name, b.kind, tuple(units), b.units))
        return report

    def detach(self) -> None:
        """Give the model back as it was, bit for bit. Harmless when called twice.

        Waits for a dynamic method's pass in another thread; raises `UsageError` from inside a pass.
        """
        with self._lock:
            if self._now.stage != "idle":
                raise UsageError("a pass is running under this method; detach when it is over.")
            for step in self._undo:
                step()
            self._undo = []
            for runtime in self._runtimes:
                runtime.partition.restore()
            self._runtimes = []
            _ATTACHED.discard(self.model)

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def _run(self, now: Pass, forward: Callable[[], Any]) -> Any:
        """One pass of the decoder under a dynamic method."""
        with self._lock:
            check_eval(self.model)
            if self._now.stage != "idle":
                raise UsageError("a pass was started from inside another one of the same model.")
            self._enter(now)
            try:
                output = forward()
                self._check_finite()
            except BaseException:
                self._choice = None  # blocks and cache may stand half way between two choices
                raise
            finally:
                self._now.end()
            made = getattr(output, "past_key_values", None)
            if made is not None:
                setattr(made, _CHOICE, self._choice)
            return output

    def _enter(self, now: Pass) -> None:
        """Say what stage a pass is. Raises `UsageError` for a cache that the present heads did not fill."""
        probe = self.method.probe
        assert probe is not None
        self._now.tokens = now.tokens
        self._since_choice += now.tokens.batch * now.tokens.length
        if not now.continues:
            _check_layout(now.cache, self.blocks, self.kept)
            serves = now.cache is None and self._since_choice < probe.reuse
            self._now.stage = "reuse" if serves and self._choice is not None else "choose"
            if self._now.stage == "choose":
                self._choice, self._since_choice = next(_CHOICES), 0
            self._since_refresh = 0
        elif self._choice is None or getattr(now.cache, _CHOICE, None) != self._choice:
            raise UsageError(
                "this KV cache was not filled under the heads kept now: another prompt ran since, or a pass "
                "failed; run its prompt again, and only one generation at a time."
            )
        else:
            self._since_refresh += now.tokens.length
            due = 0 < probe.refresh <= self._since_refresh
            self._now.stage = "refresh" if due else "keep"
            self._since_refresh = 0 if due else self._since_refresh

    def _check_finite(self) -> None:
        """Raise `FloatingPointError` where scores or refits are not finite: one look at the device."""
        flags = [r.finite for r in self._runtimes if not r.finite.is_meta]
        if flags and not bool(torch.stack([f.to(flags[0].device) for f in flags]).all()):
            raise overflow(next(r.block for r in self._runtimes if not r.finite))


def _check_layout(cache: Any, blocks: Sequence[Block], kept: Sequence[int]) -> None:
    """Raise `UsageError` for an empty cache that was laid out in advance for heads that are not kept."""
    layers = getattr(cache, "layers", ())
    for block, keep in zip(blocks, kept, strict=True):
        if block.kind == "mlp" or block.layer >= len(layers):
            continue
        keys = getattr(layers[block.layer], "keys", None)
        heads = keep if block.unit_kind == "group" else block.kv_heads
        if isinstance(keys, torch.Tensor) and keys.ndim == 4 and keys.shape[1] != heads:
            raise UsageError(
                f"the KV cache was laid out for {keys.shape[1]} key-value heads in {block.name}, which keeps "
                f"{heads}; let the first pass lay it out (no prefill_chunk_size with a static cache)."
            )
