"""Refit the consumers that a cut made narrower, layer by layer, on calibration text.

The kept units are given, or chosen here by elimination, an order that takes the refit into account. Two
streams of hidden states run through the model's own layers: one of the dense model, and one of the model
pruned and refitted so far. A block is fitted so that its output on the second stream comes as close as
possible to the dense block's output on the first, plus a share of the error accumulated in the second. The
model itself is left unchanged.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from probeprune.algebra.elimination import eliminate
from probeprune.algebra.least_squares import (
    Gram,
    inverse_moment,
    normal_equations,
    solve,
    squared_error,
    target_variance,
)
from probeprune.algebra.precision import exact
from probeprune.calibration.unfinished import Unfinished
from probeprune.data.windows import BATCH_SIZE, batches
from probeprune.errors import UsageError
from probeprune.model.blocks import Block, UnitKind, find_blocks
from probeprune.model.families import find_family
from probeprune.model.hidden_states import HiddenStates
from probeprune.model.layers import Captured, LayerRunner, capture
from probeprune.model.partition import Partition
from probeprune.model.passes import check_eval, token_windows
from probeprune.processes import shares
from probeprune.progress import Progress, silent
from probeprune.strategies import allocation
from probeprune.strategies.compensation import Consumer, Refit
from probeprune.strategies.pruned_block import Cut


@dataclass(frozen=True, eq=False)
class RefitRequest:
    """The consumers to refit."""

    cuts: Mapping[str, Cut]
    """By block name, the kept units, or their number for elimination to choose, at least one. Other blocks
    stay whole."""
    unit_kind: UnitKind = "group"
    """The kind of attention units."""
    metrics: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """By block name, the weighting (d, d) of output errors in the choice of units
    (`sensitivity.sensitivities`). A block that is missing weights all directions equally."""
    following: bool = False
    """Whether to compute the moments of MLPs that refits at every batch need (`Consumer.inverse`)."""


@exact()
def refit(
    model: nn.Module,
    request: RefitRequest,
    windows: torch.Tensor,
    how: Refit | None = None,
    *,
    batch_size: int = BATCH_SIZE,
    progress: Progress = silent,
    kept: Unfinished | None = None,
) -> dict[str, Consumer]:
    """Fit the consumers of blocks that keep only some units to the dense model's outputs.

    One block is in memory at a time (both blocks of a layer if not sequential). Moments of k channels (the
    kept ones, or all where units are chosen here) at hidden size d take 8 (k^2 + d k) bytes; solving takes
    8 (2 k^2 + d k) and choosing units 8 (3 k^2 + 2 d k). An MLP of 11008 channels at d = 4096 that keeps 60 %
    takes 0.6 GB and 0.9 GB; with the choice of units, 1.3 GB and 3.6 GB. The streams are the hidden states of
    all windows in the model's dtype, two of them if sequential: windows x length x d numbers each.

    Args:
        model: a supported causal LM in eval mode, nothing attached. Restored bit for bit at the end.
        request: which consumers to refit, to which units.
        windows: LongTensor (count, length) of token ids, the last ones held out to choose the damping.
        how: see `Refit`; None for its defaults.
        batch_size: windows per forward pass.
        progress: called with ("refit", layers done, layers in total).
        kept: where the pass begins, and takes down how far it has come; None for the beginning.

    Returns:
        Consumers by block name, for the blocks in `request.cuts`; weights in the model's dtype. With
        `following`, they take 4 k^2 bytes more per MLP.

    Raises:
        UsageError: unsupported model, names that are no blocks, too few or too long windows.
        FloatingPointError: NaN or infinite activations, or moments that cannot be factorised.
    """
    how = how or Refit()
    check_eval(model)
    windows = token_windows(model, windows)
    with shares.alike():
        fitted_on, held = _split(windows, how)
    parts = [*batches(shares.own_rows(fitted_on), batch_size)]
    first_held = len(parts)
    parts += batches(shares.own_rows(held), batch_size)
    with torch.inference_mode(False), torch.no_grad():  # inference tensors cannot be written outside
        blocks = find_blocks(model, request.unit_kind)
        strange = request.cuts.keys() - {b.name for b in blocks}
        if strange:
            raise UsageError(f"{min(strange)} is not a block of this model; find_blocks lists them.")
        kept = Unfinished(model) if kept is None else kept
        with shares.alike():
            runner = LayerRunner(model, parts, hidden=kept.stream("dense", len(parts)))
        added = not find_family(model).norm_last
        return _LayerwiseRefit(runner, request, how, first_held, added, kept).run(blocks, progress)


def _split(windows: torch.Tensor, how: Refit) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows to fit and windows held out."""
    if len(how.damping) == 1 and len(windows):
        return windows, windows[:0]
    held = max(round(how.held_out * len(windows)), 1)
    if len(windows) <= held:
        raise UsageError(
            f"a refit holds {held} of {len(windows)} calibration windows out to choose its damping, which "
            "leaves none to fit; give more windows, or one damping."
        )
    return windows[:-held], windows[-held:]


@contextmanager
def _explained(block: Block) -> Iterator[None]:
    """Say of which block's refit a `FloatingPointError` is, and what to do."""
    try:
        yield
    except FloatingPointError as problem:
        raise FloatingPointError(
            f"the refit of {block.name} failed: {problem}; give more calibration windows or more damping, or "
            "load the model in float32."
        ) from None


class _LayerwiseRefit:
    """One pass over the layers.

    Attributes:
        request, how: as in `refit`. A block whose units elimination chooses is whole until its turn.
        first_held: index of the first held-out batch.
        kept: where the pass begins, and takes down how far it has come.
        added: whether consumers' outputs are added to the residual stream without a norm.
        dense, pruned: hidden states in front of the current layer, by batch; the same list until the first
            cut.
    """

    def __init__(
        self,
        layers: LayerRunner,
        request: RefitRequest,
        how: Refit,
        first_held: int,
        added: bool,
        kept: Unfinished,
    ) -> None:
        self.layers, self.request, self.how = layers, request, how
        self.first_held, self.added, self.kept = first_held, added, kept
        self.partitions: dict[str, Partition] = {}
        self.dense = self.pruned = layers.hidden
        if kept.has("pruned"):
            self.pruned = kept.stream("pruned", len(self.dense))
        elif how.sequential:
            self.dense.check_disk_for_copy()

    def run(self, blocks: Sequence[Block], progress: Progress) -> dict[str, Consumer]:
        """Fit every block that is cut."""
        last = max((b.layer for b in blocks if b.name in self.request.cuts), default=-1)
        for layer in range(self.kept.done, last + 1):
            progress("refit", layer, last + 1)
            here = [b for b in blocks if b.layer == layer]
            with self.layers.opened(layer), self._partitioned(here) as cut:
                self.kept.results |= self._fit_layer(layer, here, cut, last)
            self.kept.step(layer + 1)
        progress("refit", last + 1, last + 1)
        return self.kept.results

    @contextmanager
    def _partitioned(self, here: Sequence[Block]) -> Iterator[list[Block]]:
        """The blocks of a layer that are cut, with a partition each inside the context."""
        cut = [b for b in here if b.name in self.request.cuts]
        try:
            for block in cut:
                partition = self.partitions[block.name] = Partition(block)
                units = self.request.cuts[block.name].units
                if units is not None:
                    partition.keep(units.to(partition.order.device))
            yield cut
        finally:
            for partition in self.partitions.values():
                partition.restore()
            self.partitions.clear()

    def _fit_layer(
        self, layer: int, here: Sequence[Block], cut: Sequence[Block], last: int
    ) -> dict[str, Consumer]:
        """Fit the blocks of a layer that are cut, and advance the streams through it."""
        fitted: dict[str, Consumer] = {}
        if cut and self.how.sequential and self.pruned is self.dense:
            self.pruned = self.kept.stream("pruned", len(self.dense))
            self.pruned.take(self.dense)
        # In sequence, an MLP is fitted behind the pruned attention of its layer.
        together = [[b] for b in cut] if self.how.sequential else [[*cut]] if cut else []
        for group in together:
            with shares.alike():
                moments = self._moments(here, group, leave=group is together[-1])
            shares.pool(gram for pair in moments.values() for gram in pair)
            for block in group:
                fitted[block.name] = self._fit(block, *moments.pop(block.name))
        if not cut:
            self._leave(layer, self.dense)
        if layer < last and self.pruned is not self.dense:
            self._show(cut, dense=False)
            self._leave(layer, self.pruned)
        return fitted

    def _leave(self, layer: int, stream: HiddenStates) -> None:
        """Advance a stream through a layer."""
        for i, hidden in enumerate(stream):
            stream[i] = self.layers.run(layer, i, hidden)

    def _moments(
        self, here: Sequence[Block], group: Sequence[Block], leave: bool
    ) -> dict[str, tuple[Gram, Gram]]:
        """Moments of the group's inputs and targets: on the batches to fit, on those held out.

        With `leave`, the dense stream is advanced through the layer, as it runs through it anyway.
        """
        moments = {b.name: (self._empty(b), self._empty(b)) for b in group}
        for i in range(len(self.dense)):
            self._show(here, dense=True)
            with capture(here, until=None if leave else group[-1]) as seen:
                behind = self.layers.run(here[0].layer, i, self.dense[i])
            if self.how.sequential:
                self._show(here, dense=False)
                with capture(here, until=group[-1]) as now:
                    self.layers.run(here[0].layer, i, self.pruned[i])
            for b in group:
                k = self.partitions[b.name].shown * b.unit_width
                z, target = seen[b.kind].z[..., :k], seen[b.kind].output
                if self.how.sequential:
                    z = now[b.kind].z
                    target = target.float() + self.how.share * self._error(b, seen, now).view_as(target)
                moments[b.name][i >= self.first_held].update(z.flatten(0, -2), target.flatten(0, -2))
            if leave:
                self.dense[i] = behind
        return moments

    def _empty(self, block: Block) -> Gram:
        d = len(self.partitions[block.name].consumer_weight)
        k = self.partitions[block.name].shown * block.unit_width
        return Gram(k, d, block.consumer.weight.device)

    def _error(self, block: Block, dense: dict[str, Captured], pruned: dict[str, Captured]) -> torch.Tensor:
        """The error of the pruned model's residual stream in front of this block's output."""
        if not self.added:
            return torch.zeros_like(dense[block.kind].output)
        error = dense[block.kind].residual.float() - pruned[block.kind].residual
        attention = dense.get("attention")
        if block.kind == "mlp" and attention is not None and attention.residual is dense["mlp"].residual:
            # Parallel blocks read one residual; the attention has already made up for its share of the error.
            error = error + attention.output - pruned["attention"].output
        return error

    def _fit(self, block: Block, fit: Gram, held: Gram) -> Consumer:
        """Choose the units, if they are not given, then the damping; fit to all windows; show the result from
        here on."""
        partition = self.partitions[block.name]
        own_bias = block.consumer.bias
        if self.request.cuts[block.name].units is None:
            fit, held = self._eliminate(block, fit, held)
        own = partition.consumer_weight
        weight = own[:, : len(fit.zz)]
        bias = (
            torch.zeros(len(own), dtype=torch.float32, device=own.device)
            if self.how.bias and own_bias is None
            else own_bias
        )
        judge = held if held.count else fit
        with shares.alike(), _explained(block):
            before = squared_error(judge, weight, own_bias)
            error, damping = self._best_damping(fit, judge, weight, bias)
        before, error, damping = shares.agreed((before, error, damping))
        with shares.alike(), _explained(block):
            if held.count:
                fit.merge(held)
            best = solve(fit, weight, bias, damping) if error < before else (weight.clone(), own_bias)
            inverse, mean = None, None
            if self.request.following and block.kind == "mlp":
                inverse = inverse_moment(fit, bias is not None, damping).cpu()
                mean = None if bias is None else fit.z_mean.cpu()
        partition.replace_consumer(*best)
        scale = target_variance(judge) or 1.0
        return Consumer(
            units=partition.kept_units.cpu(),
            weight=best[0].to(own.dtype),
            bias=None if best[1] is None else best[1].detach().to(own.dtype),
            damping=damping if error < before else None,
            error=min(error, before) / scale,
            error_before=before / scale,
            inverse=inverse,
            mean=mean,
        )

    def _best_damping(
        self, fit: Gram, judge: Gram, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[float, float]:
        """The smallest error on the moments `judge`, and its damping."""
        return min((squared_error(judge, *solve(fit, weight, bias, d)), d) for d in self.how.damping)

    def _eliminate(self, block: Block, fit: Gram, held: Gram) -> tuple[Gram, Gram]:
        """Keep the units that elimination would remove last; return the moments of their channels."""
        partition = self.partitions[block.name]
        weight, bias = partition.consumer_weight, block.consumer.bias
        damping = self.how.damping[0]
        with shares.alike(), _explained(block):
            if held.count:  # several candidates
                _, damping = self._best_damping(fit, held, weight, bias)
            found = eliminate(
                normal_equations(fit, weight, bias is not None, damping)[0],
                solve(fit, weight, bias, damping)[0],
                block.unit_width,
                metric=self.request.metrics.get(block.name),
            )
        scores = shares.agreed_tensors({"scores": found.scores})["scores"]
        keep = self.request.cuts[block.name].width
        partition.keep(allocation.choose_units(scores.to(partition.order.device), keep, block))
        channels = partition.channels[: keep * block.unit_width]
        return fit.part(channels), held.part(channels)

    def _show(self, blocks: Sequence[Block], dense: bool) -> None:
        for block in blocks:
            partition = self.partitions.get(block.name)
            if partition is not None:
                partition.widen() if dense else partition.narrow()
