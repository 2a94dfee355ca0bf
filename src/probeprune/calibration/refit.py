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

from probeprune.algebra.least_squares import Gram, squared_error, target_variance
from probeprune.algebra.precision import exact
from probeprune.calibration.expert_refit import StackRefit
from probeprune.calibration.fitting import Fitted, best_fit, eliminated, explained
from probeprune.calibration.unfinished import Unfinished
from probeprune.data.windows import BATCH_SIZE, batches
from probeprune.errors import UsageError
from probeprune.model.blocks import Block, UnitKind, find_blocks
from probeprune.model.experts import Stack, find_stacks
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
    """By the name of a block, or of a stack of experts whose channels go, the kept units, or their number for
    elimination to choose, at least one. Other blocks stay whole."""
    unit_kind: UnitKind = "group"
    """The kind of attention units."""
    metrics: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """By the name of a block or stack, the weighting (d, d) of output errors in the choice of units
    (`sensitivity.sensitivities`). One that is missing weights all directions equally."""
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

    One block is in memory at a time (both blocks of a layer if not sequential), and of the experts of a layer
    as many as `expert_refit.AT_ONCE` holds. Moments of k channels (the kept ones, or all where units are
    chosen here) at hidden size d take 4 (k^2 + d k) bytes, choosing units
    4 (2 k^2 + 3 d k), or twice that with little damping, and solving 8 (k^2 + 3 d k). An MLP of 11008
    channels at d = 4096 takes 0.7 GB of moments and 1.5 GB while units are chosen; solving takes 1.0 GB where
    it keeps 60 %. The streams are the hidden states of all windows in the model's dtype, two of them if
    sequential, and another set in float32 for each block of a layer but the first that is cut, and for its
    experts: windows x length x d numbers each.

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
        blocks, stacks = find_blocks(model, request.unit_kind), find_stacks(model)
        strange = request.cuts.keys() - {b.name for b in blocks} - {s.name for s in stacks}
        if strange:
            raise UsageError(f"{min(strange)} is not a block of this model; find_blocks lists them.")
        kept = Unfinished(model) if kept is None else kept
        with shares.alike():
            runner = LayerRunner(model, parts, hidden=kept.stream("dense", len(parts)))
        added = not find_family(model).norm_last
        return _LayerwiseRefit(runner, request, how, first_held, added, kept).run(blocks, stacks, progress)


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


class _LayerwiseRefit:
    """One pass over the layers.

    Attributes:
        request, how: as in `refit`. A block whose units elimination chooses is whole until its turn.
        first_held: index of the first held-out batch.
        kept: where the pass begins, and takes down how far it has come.
        added: whether consumers' outputs are added to the residual stream without a norm.
        parallel: whether the attention and the MLP of the current layer read one residual.
        experts: the refit of the current layer's experts, if they are cut.
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
        self.parallel = False
        self.partitions: dict[str, Partition] = {}
        self.experts: StackRefit | None = None
        self.dense = self.pruned = layers.hidden
        if kept.has("pruned"):
            self.pruned = kept.stream("pruned", len(self.dense))
        elif how.sequential:
            size = next((h.element_size() for h in self.dense), 4)
            # Another stream like it, and what consumers are to give, in float32.
            self.dense.check_disk_for_copies(self.dense.nbytes * (size + 4) // size)

    def run(
        self, blocks: Sequence[Block], stacks: Sequence[Stack], progress: Progress
    ) -> dict[str, Consumer]:
        """Fit every block that is cut, and the experts of every stack that is."""
        cuts = self.request.cuts
        parts: list[Block | Stack] = [*blocks, *stacks]
        last = max((b.layer for b in parts if b.name in cuts), default=-1)
        for layer in range(self.kept.done, last + 1):
            progress("refit", layer, last + 1)
            here = [b for b in blocks if b.layer == layer]
            experts = next((s for s in stacks if s.layer == layer and s.name in cuts), None)
            with self.layers.opened(layer), self._partitioned(here) as cut, self._stacked(experts):
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

    @contextmanager
    def _stacked(self, stack: Stack | None) -> Iterator[None]:
        """Have the refit of a layer's experts, if they lose channels, inside the context."""
        if stack is None:
            yield
            return
        share = self.how.share if self.how.sequential and self.added else 0.0
        wanted = self.dense.beside() if self.how.sequential else None
        cut, metric = self.request.cuts[stack.name], self.request.metrics.get(stack.name)
        self.experts = StackRefit(stack, cut, self.how, self.first_held, share, metric, wanted)
        try:
            yield
        finally:
            self.experts.restore()
            self.experts = None

    def _fit_layer(
        self, layer: int, here: Sequence[Block], cut: Sequence[Block], last: int
    ) -> dict[str, Consumer]:
        """Fit the blocks of a layer that are cut, then its experts, and advance the streams through it.

        The dense stream runs through the layer once. Behind it, in sequence, the pruned one runs up to the
        inputs of each consumer that is fitted, because the units of the block in front are chosen by then,
        and through the layer as it is cut.
        """
        fitted: dict[str, Consumer] = {}
        if (cut or self.experts) and self.how.sequential and self.pruned is self.dense:
            self.pruned = self.kept.stream("pruned", len(self.dense))
            self.pruned.take(self.dense)
        if self.experts is not None and not self.how.sequential:
            fitted |= self._fit_experts(layer, self.experts, self.dense)
            self.experts.restore()
        # In sequence, an MLP is fitted behind the pruned attention of its layer.
        together = [[b] for b in cut] if self.how.sequential else [[*cut]] if cut else []
        aims = {b.name: self.dense.beside() for group in together[1:] for b in group}
        for group in together:
            with shares.alike():
                moments = self._moments(here, group, aims)
            shares.pool(gram for pair in moments.values() for gram in pair)
            for block in group:
                aims.pop(block.name, None)
                fitted[block.name] = self._fit(block, *moments.pop(block.name))
        if not cut:
            for i in range(len(self.dense)):
                self._leave_dense(layer, i)
        self._show(cut, dense=False)
        if self.experts is not None and self.how.sequential:
            fitted |= self._fit_experts(layer, self.experts, self.pruned)
        if layer < last and self.pruned is not self.dense:
            for i, hidden in enumerate(self.pruned):
                self.pruned[i] = self.layers.run(layer, i, hidden)
        return fitted

    def _fit_experts(self, layer: int, experts: StackRefit, stream: HiddenStates) -> dict[str, Consumer]:
        return {experts.stack.name: experts.fit(lambda i: self.layers.run(layer, i, stream[i]), len(stream))}

    def _leave_dense(self, layer: int, batch: int) -> None:
        """Advance a batch of the dense stream through a layer; see what its experts make of it."""

        def run() -> torch.Tensor:
            return self.layers.run(layer, batch, self.dense[batch])

        self.dense[batch] = run() if self.experts is None else self.experts.watch(batch, run)

    def _moments(
        self, here: Sequence[Block], group: Sequence[Block], aims: dict[str, HiddenStates]
    ) -> dict[str, tuple[Gram, Gram]]:
        """Moments of the group's inputs and targets: on the batches to fit, on those held out.

        `aims` takes what the dense layer gives the blocks to be fitted behind this group; of a group that is
        in it, it holds that already. Otherwise the dense stream is advanced through the layer.
        """
        moments = {b.name: (self._empty(b), self._empty(b)) for b in group}
        for i in range(len(self.dense)):
            if group[0].name in aims:
                aim = {b.name: aims[b.name][i] for b in group}
            else:
                self._show(here, dense=True)
                with capture(here) as seen:
                    self._leave_dense(here[0].layer, i)
                aim = {b.name: self._aim(b, seen) for b in group}
                for b in here:
                    if b.name in aims:
                        aims[b.name][i] = self._aim(b, seen)
            if self.how.sequential:
                self._show(here, dense=False)
                with capture(here, until=group[-1]) as seen:
                    self.layers.run(here[0].layer, i, self.pruned[i])
            for b in group:
                k = self.partitions[b.name].shown * b.unit_width
                z, target = seen[b.kind].z[..., :k], aim[b.name]
                if self.how.sequential and self.added:
                    target = target.sub(self._reached(b, seen).view_as(target), alpha=self.how.share)
                moments[b.name][i >= self.first_held].update(z.flatten(0, -2), target.flatten(0, -2))
        return moments

    def _empty(self, block: Block) -> Gram:
        d = len(self.partitions[block.name].consumer_weight)
        k = self.partitions[block.name].shown * block.unit_width
        return Gram(k, d, block.consumer.weight.device)

    def _aim(self, block: Block, dense: dict[str, Captured]) -> torch.Tensor:
        """The block's output in the dense layer, and the share of the residual stream in front of it, of
        which that of the pruned one is to be taken away: (batch, length, d), float32."""
        output = dense[block.kind].output.float()
        if not (self.how.sequential and self.added):
            return output
        if block.kind == "mlp":
            attention = dense.get("attention")
            self.parallel = attention is not None and attention.residual is dense["mlp"].residual
        return output.add(self._reached(block, dense).view_as(output), alpha=self.how.share)

    def _reached(self, block: Block, seen: dict[str, Captured]) -> torch.Tensor:
        """The residual stream that a block adds its output to."""
        residual = seen[block.kind].residual.float()
        if block.kind == "mlp" and self.parallel:
            # Parallel blocks read one residual; the attention has already made up for its share of the error.
            residual = residual + seen["attention"].output
        return residual

    def _fit(self, block: Block, fit: Gram, held: Gram) -> Consumer:
        """Choose the units, if they are not given, then the damping; fit to all windows; show the result from
        here on."""
        partition = self.partitions[block.name]
        own_bias = block.consumer.bias
        if self.request.cuts[block.name].units is None:
            fit, held = self._eliminate(block, fit, held)
        own = partition.consumer_weight
        weight = own[:, : len(fit.z_mean)]
        judge = held if held.count else fit
        centred = self.how.bias or own_bias is not None
        with shares.alike(), explained(block.name):
            before = squared_error(judge, weight, own_bias)
            best = best_fit(fit, held, weight, centred, self.how.damping)
        before, error, damping = shares.agreed((before, best.error, best.damping))
        following = self.request.following and block.kind == "mlp"
        inverse, mean = None, None
        with shares.alike(), explained(block.name):
            if held.count:
                fit.merge(held)
            if (held.count or damping != best.damping) and (error < before or following):
                best = Fitted.to(fit, weight, centred, damping)
            if following:
                inverse = best.equations.inverse().float().cpu()
                mean = fit.z_mean.cpu() if centred else None
        shown = (best.weight, best.bias) if error < before else (weight.clone(), own_bias)
        partition.replace_consumer(*shown)
        scale = target_variance(judge) or 1.0
        return Consumer(
            units=partition.kept_units.cpu(),
            weight=shown[0].to(own.dtype),
            bias=None if shown[1] is None else shown[1].detach().to(own.dtype),
            damping=damping if error < before else None,
            error=min(error, before) / scale,
            error_before=before / scale,
            inverse=inverse,
            mean=mean,
        )

    def _eliminate(self, block: Block, fit: Gram, held: Gram) -> tuple[Gram, Gram]:
        """Keep the units that elimination would remove last; return the moments of their channels."""
        partition = self.partitions[block.name]
        keep = self.request.cuts[block.name].width
        with shares.alike(), explained(block.name):
            found = eliminated(
                fit,
                held,
                partition.consumer_weight,
                self.how.bias or block.consumer.bias is not None,
                self.how.damping,
                block.unit_width,
                self.request.metrics.get(block.name),
                0 if allocation.chosen_by_group(block) else keep,
            )
        scores = shares.agreed_tensors({"scores": found.scores})["scores"]
        partition.keep(allocation.choose_units(scores.to(partition.order.device), keep, block))
        channels = partition.channels[: keep * block.unit_width]
        return fit.part(channels), held.part(channels)

    def _show(self, blocks: Sequence[Block], dense: bool) -> None:
        for block in blocks:
            partition = self.partitions.get(block.name)
            if partition is not None:
                partition.widen() if dense else partition.narrow()
