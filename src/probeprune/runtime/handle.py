"""The handle: runs a model's own forward on the kept units until it is detached.

Static methods order and cut once and then cost nothing. Dynamic methods probe every batch, block by block
(`block.py`); a pass that continues a KV cache keeps the units that its prompt chose. This file handles the
whole model: the stage of a pass, the cache that it continues, one pass at a time.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import nn

from probeprune import plan
from probeprune.calibration.statistics import Statistics
from probeprune.errors import Notice, UsageError
from probeprune.model.blocks import Block, uncalled_consumer
from probeprune.model.experts import Stack
from probeprune.model.multimodal import text_config
from probeprune.model.narrow_linear import refuse_to_copy
from probeprune.model.passes import Pass, check_eval, follow_batches, on_pass
from probeprune.model.switched_hooks import SwitchedHooks
from probeprune.plan import Kept, kept_of
from probeprune.runtime import ownership
from probeprune.runtime.attachment import Attachment
from probeprune.runtime.block import BlockRuntime
from probeprune.runtime.choice import Choice, caches_of, check_layout, choice_of, mark
from probeprune.runtime.compiled import CompiledLayers, compiles_alone
from probeprune.runtime.current_pass import CurrentPass
from probeprune.runtime.padding import CHECKED, looks_padded
from probeprune.runtime.refusals import (
    check_places,
    places_of,
    refuse_continuous_batching,
    refuse_loading,
)
from probeprune.strategies import allocation
from probeprune.strategies.account import Account, Costs
from probeprune.strategies.expert_cut import ExpertCut
from probeprune.strategies.pruned_block import Cut, PrunedBlock
from probeprune.strategies.schedule import EveryBatch
from probeprune.strategies.widths import Prunable

HANDLE = "_probeprune_handle"
"""Attribute of an attached model: its handle."""


class Handle:
    """A method attached to a model; a context manager that detaches on exit.

    Attributes:
        model, method, ratio: as given to `attach`.
        kept: what attaching it again takes; None once it is detached.
        blocks: all blocks of the model, stacks of experts among them.
        widths: number of units that each block keeps; the same at every batch.
        pruned: the blocks that lose units, under their cut.
        stacks: the stacks of experts that lose units, under theirs.
        runtimes: the blocks that follow the batch; none for a static method.
        current: the current pass.
        costs: what batches cost, by which it is decided which of them are probed; None where all are.
        batches, probed_batches: number of batches and prompts so far, and of those that were probed.
    """

    def __init__(
        self,
        model: nn.Module,
        kept: Attachment,
        blocks: Sequence[Prunable],
        costs: Costs | None = None,
        compile: bool = False,
    ) -> None:
        self.model, self.method, self.ratio = model, kept.method, kept.ratio
        self.costs, self.batches, self.probed_batches = costs, 0, 0
        self.kept: Attachment | None = kept
        self.blocks, self.widths = blocks, [cut.width for cut in kept.cuts]
        self.current = CurrentPass(layer_types=getattr(text_config(model.config), "layer_types", None) or ())
        self._lock = threading.RLock()
        self._unmasked = CHECKED
        self._owner = object()
        # The choice in view is kept alive by the caches that it filled; without any, nobody can return to it.
        self._choice: weakref.ref[Choice] | None = None
        self._running: Choice | None = None
        self._account: Account | None = None
        self._whole = False  # whether the units in view are one choice, which may serve another batch
        self._since_choice = self._since_refresh = 0  # tokens
        self._hooks = SwitchedHooks()  # off in passes that followers do not see
        self._undo: list[Callable[[], None]] = []
        self.stacks = self._take_stacks(kept.cuts, kept.statistics)
        self.pruned = self._take(kept.cuts, kept.statistics)
        self.runtimes: list[BlockRuntime] = []
        self._compiled: CompiledLayers | None = None
        try:
            ownership.claim(self)
            self._places = places_of(model, [p.block for p in self.pruned])
            self._start(compile)
            if compile:
                self._compiled = CompiledLayers(model, blocks, [r.block for r in self.runtimes])
                self._undo.append(self._compiled.remove)
            if self.method.when.every_batch:
                self._undo.append(follow_batches(model))
            self._hook_model()
        except BaseException:
            self.detach()
            raise

    def _take(self, cuts: Sequence[Cut], statistics: Statistics) -> list[PrunedBlock]:
        """The blocks that lose units, ready for their first cut."""
        return plan.pruned_blocks(self.method, self.blocks, cuts, statistics)

    def _take_stacks(self, cuts: Sequence[Cut], statistics: Statistics) -> list[ExpertCut]:
        """The stacks of experts that lose units."""
        return plan.stack_cuts(self.method, self.blocks, cuts, statistics)

    def _hook_model(self) -> None:
        """Be there in every pass of the model."""
        self.model.__dict__[HANDLE] = self
        self._undo += refuse_loading(self.model, self._held())
        self._undo.append(refuse_continuous_batching(self.model))
        follows = isinstance(self.method.when, EveryBatch)
        self._undo.append(on_pass(self.model, self.run_pass, every_token=follows))

    def _held(self) -> list[str]:
        """Paths of what holds weights that are in view in part: linear maps, and tensors of experts."""
        linears = [m.name for p in self.pruned for m in p.block.members]
        return [*linears, *(f"{s.stack.name}.down_proj" for s in self.stacks)]

    def _start(self, compile: bool) -> None:
        """Make the first cuts and hook the blocks, which are compiled or not."""
        when = self.method.when
        if not isinstance(when, EveryBatch):
            for pruned in self.pruned:
                pruned.first_cut()
            for experts in self.stacks:
                experts.show()
            self._running = Choice(self._owner)  # stays until detached
            return
        for pruned in self.pruned:
            if not when.follows(pruned.block):
                pruned.first_cut()
                continue
            follower = when.follower(pruned)
            follower.start()
            beside = self._beside(pruned.block) if when.probe.parallel else None
            self.runtimes.append(BlockRuntime(pruned, follower, when, self.current, beside))
        self._undo.append(self._hooks.remove)
        for runtime in self.runtimes:
            self._hooks.add(runtime.hooks(compile and compiles_alone(runtime.block)))
        if self.costs is not None:
            self._account = Account(self.costs, when.probe)
            self._whole = all(r.pruned.first_units is not None for r in self.runtimes)

    def _beside(self, block: Block) -> Block | None:
        """The block in front of one; None for the first.

        Raises `UsageError` where experts are in between, which take the place of that block.
        """
        i = self.blocks.index(block)
        if not i:
            return None
        before = self.blocks[i - 1]
        if not isinstance(before, Block):
            raise UsageError(
                "a probe cannot run beside the experts of a mixture of experts; set parallel to False."
            )
        return before

    def weights(self) -> list[torch.Tensor]:
        """The parameters of all blocks, whole, where they are now."""
        linears = (m.linear for b in self.blocks if isinstance(b, Block) for m in b.members)
        modules = dict.fromkeys([*linears, *(b.module for b in self.blocks if isinstance(b, Stack))])
        return [w for module in modules for w in module._parameters.values() if w is not None]

    @property
    def probed(self) -> tuple[list[Block], list[int]]:
        """Blocks that follow the batch, and the number of units that each keeps."""
        return [r.block for r in self.runtimes], [r.pruned.width for r in self.runtimes]

    @property
    def removed_share(self) -> float:
        """Share of all blocks' parameters that the cut removes."""
        return allocation.removed_share(self.blocks, self.widths)

    @property
    def probed_share(self) -> float:
        """Share of the batches and prompts so far that were probed; 1 before there is any."""
        return self.probed_batches / self.batches if self.batches else 1.0

    @property
    def swapped(self) -> int:
        """Number of units brought into view so far, over all blocks. Waits for the device."""
        return sum(int(p.swapped) for p in self.pruned)

    def kept_units(self) -> list[Kept]:
        """The units that every block keeps now."""
        partitions = {p.block.name: p.partition for p in self.pruned}
        kept = {name: p.kept_units.cpu() for name, p in partitions.items()}
        kept |= {s.stack.name: s.units.cpu() for s in self.stacks}
        whole = (torch.arange(b.units, device="cpu") for b in self.blocks)
        return [
            kept_of(b, kept.get(b.name, all_), b.units) for b, all_ in zip(self.blocks, whole, strict=True)
        ]

    def detach(self) -> None:
        """Restore the model, bit for bit. Harmless when called twice.

        Waits for a dynamic method's pass in another thread; raises `UsageError` when called inside a pass.
        """
        with self._lock:
            if self.current.stage is not None:
                raise UsageError("a pass is running under this method; detach when it is over.")
            for step in self._undo:
                step()
            self._undo = []
            for pruned in self.pruned:
                pruned.partition.restore()
            for experts in self.stacks:
                experts.shown.restore()
            self.pruned, self.stacks, self.runtimes, self.kept = [], [], [], None
            ownership.release(self)
            if self.model.__dict__.get(HANDLE) is self:
                del self.model.__dict__[HANDLE]

    def __reduce_ex__(self, protocol: Any) -> Any:
        refuse_to_copy()

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def run_pass(self, started: Pass, forward: Callable[[], Any]) -> Any:
        """One pass of the decoder, or of the layers with these blocks: `forward` runs it."""
        forward = forward if self._compiled is None else self._compiled.guarded(forward)
        run = self._run if isinstance(self.method.when, EveryBatch) else self._run_static
        return run(started, forward)

    def _run_static(self, started: Pass, forward: Callable[[], Any]) -> Any:
        """One pass of the decoder under a static method."""
        self._check_model()
        self._check_pass(started)
        output = forward()
        mark(caches_of(started, output), self._running)
        return output

    def _run(self, started: Pass, forward: Callable[[], Any]) -> Any:
        """One pass of the decoder under a dynamic method."""
        with self._lock:
            if self.current.stage is not None:
                raise UsageError("a pass was started from inside another one of the same model.")
            self._check_model()
            self._check_pass(started)
            self._look_for_padding(started)
            try:
                self._enter(started)
                output = forward()
                if self.current.stage in ("choose", "refresh"):  # other passes keep what was checked then
                    self._check_finite()
                self._check_passed()
            except BaseException:
                self._choice = None  # blocks and cache may be half way between two choices
                self._whole = False
                raise
            finally:
                self.current.end()
                choice, self._running = self._running, None
            mark(caches_of(started, output), choice)
            return output

    def _look_for_padding(self, started: Pass) -> None:
        """Say so once where a prompt looks padded and comes without a mask."""
        if started.continues or started.unmasked is None or not self._unmasked:
            return
        self._unmasked -= 1
        if looks_padded(started.unmasked, self.model.config):
            self._unmasked = 0
            sentence = (
                f"a batch looks padded and has no attention mask, so method {self.method.name!r} takes its "
                "padding for text, in what it chooses and in what it remembers; give attention_mask."
            )
            warnings.warn(Notice(sentence), stacklevel=2)

    def _check_model(self) -> None:
        """Raise `UsageError` where the model has changed since `attach`."""
        check_eval(self.model)
        check_places(self._places)
        for pruned in self.pruned:
            pruned.partition.check()

    def _check_passed(self) -> None:
        """Raise `UsageError` where a block's consumer was not called, so that its follower received nothing.

        A draft by the first layers alone (`assistant_early_exit`) lowers the config's number of layers for as
        long as it runs; the blocks behind them are not asked for.
        """
        config: Any = text_config(self.model.config)
        for runtime in self.runtimes:
            if not runtime.passed and runtime.block.layer < config.num_hidden_layers:
                raise uncalled_consumer(runtime.block)

    def _check_pass(self, started: Pass) -> None:
        """Raise `UsageError` for a cache that other heads filled, or that was allocated for other heads, and
        for a mask of its own for every head."""
        if started.mask_heads > 1 and self._cuts_heads:
            raise UsageError(
                f"the attention mask differs for {started.mask_heads} heads, and the method removes some of "
                "them; give one mask for all heads, of shape (batch, 1, queries, keys)."
            )
        if not started.continues:
            check_layout(started.cache, self.blocks, self.widths)
            return
        own = choice_of(started.cache, self._owner)
        known = own is not None and (own is self._in_view or own.snapshots is not None)
        if self._cuts_heads and not known:
            raise UsageError(
                "this KV cache was not filled under the method that is attached now, or a pass on it failed; "
                "run its prompt again (a learned prefix, as prefix tuning has, needs the dense model)."
            )
        if not known:
            check_layout(started.cache, self.blocks, self.widths, filled=True)

    @property
    def _cuts_heads(self) -> bool:
        """Whether heads are removed, or may be at some batch."""
        return any(p.block.kind == "attention" for p in self.pruned) or bool(self.runtimes)

    @property
    def _in_view(self) -> Choice | None:
        """The choice in view, if a cache or the current pass refers to it."""
        return self._running or (None if self._choice is None else self._choice())

    def _change_choice(self, new: Choice) -> None:
        """Put away the choice in view, if it can be returned to, and show a new one or one put away."""
        old = self._in_view
        if old is not None:
            old.snapshots = [r.pruned.partition.snapshot() for r in self.runtimes]
            old.since_refresh = self._since_refresh
        if new.snapshots is not None:
            for runtime, snapshot in zip(self.runtimes, new.snapshots, strict=True):
                runtime.pruned.partition.show_again(snapshot)
        new.snapshots, self._since_refresh = None, new.since_refresh
        self._running, self._choice, self._whole = new, weakref.ref(new), True

    def _enter(self, started: Pass) -> None:
        """Decide the stage of a pass, and bring back the choice of the cache that it continues."""
        when, tokens = self.method.when, started.tokens
        assert isinstance(when, EveryBatch)
        self.current.tokens = tokens
        self._since_choice += tokens.batch * tokens.length
        if not started.continues:
            self.current.stage = "choose" if self._is_probed(started, when) else "reuse"
            self.batches += 1
            if self.current.stage == "choose":
                self.probed_batches += 1
                self._change_choice(Choice(self._owner))
                self._since_choice = 0
            self._since_refresh = 0
        else:
            own = choice_of(started.cache, self._owner)
            if own is not None and own is not self._in_view:
                self._change_choice(own)
            self._since_refresh += tokens.length
            due = 0 < when.refresh <= self._since_refresh
            self.current.stage = "refresh" if due else "keep"
            self._since_refresh = 0 if due else self._since_refresh
        if self._running is None:  # the units in view stay; a cache may come of this pass
            self._running = self._in_view or Choice(self._owner)
            self._choice = weakref.ref(self._running)
        shown = when.sees(self.current.stage)
        self._hooks.switch(shown)
        if self._compiled is not None:
            self._compiled.switch(shown)
        for runtime in self.runtimes:
            runtime.passed = not shown  # nobody looks

    def _is_probed(self, started: Pass, when: EveryBatch) -> bool:
        """Whether a batch or prompt is probed. A prompt that fills a given cache always is: its choice serves
        the text that follows."""
        if started.cache is not None or not self._whole:
            return True
        if self._account is not None:
            return self._account.pays(started.tokens)
        return self._since_choice >= when.probe.reuse

    def _check_finite(self) -> None:
        """Raise `FloatingPointError` where scores or refits are not finite. Waits for the device once."""
        flags = [p.finite for p in self.pruned if not p.finite.is_meta]
        if flags and not bool(torch.stack([f.to(flags[0].device) for f in flags]).all()):
            raise plan.overflow(next(p.block for p in self.pruned if not p.finite))
