"""The runtime: `attach` a method to a model, run the model's own forward on what is kept, `detach`.

Static methods order and cut once, then cost nothing. Dynamic ones do, for each block and each batch, the
stages of Probe Pruning: choose the probe, run it ahead, fuse with history, score and cut, run the full batch,
update history. A pass that continues a KV cache keeps the units its prompt chose.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.profiler import record_function
from torch.utils.hooks import RemovableHandle

from probeprune import allocation
from probeprune.blocks import Block, find_blocks
from probeprune.calibration import Statistics
from probeprune.compensation import lost_bias
from probeprune.errors import UsageError
from probeprune.importance import IMPORTANCES, ColumnNorms, Evidence
from probeprune.methods import Method, check_untrained, get_method
from probeprune.partition import Partition
from probeprune.passes import Pass, check_eval, find_decoder, on_pass
from probeprune.plan import Kept, check_finite, check_statistics, static_scores, widths
from probeprune.probe import choose, fused_energy, run_ahead
from probeprune.statistics import History, Moments

_ATTACHED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


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
            for dynamic methods. Its weights are permuted in place and put back by `detach`.
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
    with torch.inference_mode(False), torch.no_grad():  # what inference mode makes cannot be written outside
        return Handle(model, method, ratio, blocks, known)


def _attention(model: nn.Module) -> str:
    config: Any = model.config
    return str(config._attn_implementation)


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
        self.swapped = 0
        self._hooks: list[RemovableHandle] = []
        self._pass: Pass | None = None
        self._cache: weakref.ref[object] | None = None
        scores = [static_scores(method, b, statistics) for b in blocks]
        self.kept = widths(method, ratio, blocks, scores)
        self._runtimes = [
            _BlockRuntime(self, b, keep, s, statistics.moments.get(b.name))
            for b, keep, s in zip(blocks, self.kept, scores, strict=True)
            if keep < b.units
        ]
        _ATTACHED.add(model)
        try:
            for runtime in self._runtimes:
                runtime.start()
            if method.when == "batch":
                self._hooks.append(on_pass(model, self._begin))
                self._hooks.append(find_decoder(model).register_forward_hook(self._end))
                for runtime in self._runtimes:
                    self._hooks += runtime.hooks()
        except BaseException:
            self.detach()
            raise

    @property
    def removed_share(self) -> float:
        """Share of all blocks' parameters that the cut leaves out."""
        return allocation.removed_share(self.blocks, self.kept)

    def kept_units(self) -> list[Kept]:
        """What every block keeps at present."""
        partitions = {r.block.name: r.partition for r in self._runtimes}
        report = []
        for b in self.blocks:
            units = partitions[b.name].kept_units.tolist() if b.name in partitions else range(b.units)
            report.append(Kept(b.name, b.kind, tuple(units), b.units))
        return report

    def detach(self) -> None:
        """Give the model back as it was, bit for bit. Harmless when called twice."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
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

    def _begin(self, now: Pass) -> None:
        check_eval(self.model)
        if now.past and (self._cache is None or self._cache() is not now.cache):
            raise UsageError(
                "this KV cache was not filled by the last prompt that ran under this method, so its heads "
                "are not the ones kept now; run the prompt again."
            )
        if not now.past:
            self._cache = None if now.cache is None else weakref.ref(now.cache)
        self._pass = now

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        cache = getattr(output, "past_key_values", None)
        if self._pass is not None and not self._pass.past and cache is not None:
            self._cache = weakref.ref(cache)


class _BlockRuntime:
    """One pruned block of an attached model: its partition and, for dynamic methods, its stages."""

    def __init__(
        self, handle: Handle, block: Block, keep: int, scores: torch.Tensor | None, moments: Moments | None
    ) -> None:
        self.handle, self.block, self.keep = handle, block, keep
        self.method = handle.method
        self.norms = ColumnNorms.of(block)
        self.partition = Partition(block)
        self._first_scores = scores
        self._score = IMPORTANCES[self.method.importance].score
        device = block.consumer.weight.device
        probe = self.method.probe
        self.history: History | None = None
        if probe is not None and probe.fusion != "none":
            assert moments is not None
            self.history = History(moments.to(device), probe.decay)
            self.partition.followers.append(self.history.energy)
        self.mean: torch.Tensor | None = None
        if self.method.compensation == "bias":
            assert moments is not None
            self.mean = moments.mean.to(device).clone()
            self.partition.followers.append(self.mean)
        self._residual: torch.Tensor | None = None
        self._probing = False

    def start(self) -> None:
        """The first cut: for good if static, a place to start from if dynamic."""
        if self._first_scores is not None:
            self._cut(self._first_scores)

    def hooks(self) -> list[RemovableHandle]:
        block = self.block
        hooks = [
            block.entry.register_forward_pre_hook(self._before_block, with_kwargs=True),
            block.consumer.register_forward_pre_hook(self._before_consumer),
        ]
        if block.norm is not None:
            hooks.append(block.norm.register_forward_pre_hook(self._before_norm))
        return hooks

    def _before_norm(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self._residual = args[0]

    @torch.no_grad()
    def _before_block(
        self, module: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]
    ) -> None:
        now = self.handle._pass
        if self._probing or now is None or now.past:
            return
        kwargs = dict(kwargs)
        flat = args[0] if args else kwargs.pop("hidden_states")
        x = self._shaped(flat, now)
        residual = x if self._residual is None else self._shaped(self._residual, now)
        self._residual = None
        assert self.method.probe is not None
        with record_function("probeprune::choose"):
            selection = choose(residual, now.tokens, self.method.probe)
        self.partition.widen()
        self._probing = True
        try:
            with record_function("probeprune::run_ahead"):
                z = run_ahead(self.block, x, selection, kwargs)
        finally:
            self._probing = False
        with record_function("probeprune::score"):
            energy = fused_energy(z, selection, now.tokens, self.history, self.method.probe)
            in_order = torch.empty_like(energy)
            in_order[self.partition.channels] = energy
            evidence = Evidence(self.block, self.norms, energy=in_order, seed=self.method.seed)
            scores = self._score(evidence)
        with record_function("probeprune::swap"):
            self._cut(scores)

    def _before_consumer(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        now = self.handle._pass
        if self._probing or self.history is None or now is None or now.past:
            return
        with record_function("probeprune::history"):
            self.history.update(self._shaped(args[0], now), now.tokens)

    def _cut(self, scores: torch.Tensor) -> None:
        check_finite(scores, self.block)
        units = allocation.choose_units(scores, self.keep, self.block)
        self.handle.swapped += self.partition.keep(units)
        if self.mean is not None:
            channels = self.keep * self.block.unit_width
            self.partition.add_bias(lost_bias(self.partition.consumer_weight, self.mean, channels))

    @staticmethod
    def _shaped(x: torch.Tensor, now: Pass) -> torch.Tensor:
        """(batch, sequence, width); some layers flatten the first two in front of their MLP."""
        return x.view(now.tokens.batch, now.tokens.length, x.shape[-1])
