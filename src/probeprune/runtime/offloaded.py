"""A method attached to a model whose layers are offloaded: each layer has a handle while it is in memory."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from probeprune.calibration.statistics import Statistics
from probeprune.errors import UsageError
from probeprune.model.blocks import Block, find_layers
from probeprune.model.layers import RunPass, on_layers
from probeprune.model.passes import Pass
from probeprune.plan import Kept, kept_of
from probeprune.runtime.attachment import Attachment
from probeprune.runtime.handle import HANDLE, Handle
from probeprune.strategies.expert_cut import ExpertCut
from probeprune.strategies.pruned_block import Cut, PrunedBlock
from probeprune.strategies.schedule import EveryBatch


class OffloadedHandle(Handle):
    """A method attached to a model whose layers are offloaded, for `decoding.decoded`: a layer at a time.

    Every layer has a handle of its own while it is in memory. Its state (the history of the probe, the choice
    of units) follows the batches of one call of `decoded`; the next call begins from calibration again.
    """

    def _take(self, cuts: Sequence[Cut], statistics: Statistics) -> list[PrunedBlock]:
        """None in place yet: the cuts wait for their layers."""
        when = self.method.when
        if isinstance(when, EveryBatch) and when.probe.parallel:
            raise UsageError(
                "a probe that runs in parallel with the previous block needs all layers in memory; set "
                "parallel to False, or load the model without offloading."
            )
        self._cuts, self._statistics = cuts, statistics
        return []

    def _take_stacks(self, cuts: Sequence[Cut], statistics: Statistics) -> list[ExpertCut]:
        """None either."""
        return []

    def _hook_model(self) -> None:
        self.model.__dict__[HANDLE] = self
        self._undo.append(on_layers(self.model, self._on_layer))
        self._refuse_calls()
        self._undo.append(lambda: self._allow_calls())

    def _refuse_calls(self) -> None:
        """Refuse calls of the model by others: without the layers' handles they would give dense results."""
        # A hook, not another forward: accelerate's own on the layer comes and goes while this one stays.
        self._allow_calls = find_layers(self.model)[0].register_forward_pre_hook(_refuse).remove

    def weights(self) -> list[torch.Tensor]:
        """None: those of a layer in memory are held by its own handle."""
        return []

    @property
    def probed(self) -> tuple[list[Block], list[int]]:
        """Blocks that follow the batch, and the number of units that each keeps."""
        when, pruned = self.method.when, zip(self.blocks, self.widths, strict=True)
        if not isinstance(when, EveryBatch):
            return [], []
        followed = [(b, k) for b, k in pruned if isinstance(b, Block) and k < b.units and when.follows(b)]
        return [b for b, _ in followed], [k for _, k in followed]

    def kept_units(self) -> list[Kept]:
        """The units that every block keeps. Raises `UsageError` for a method that chooses at every batch."""
        if isinstance(self.method.when, EveryBatch):
            raise _not_in_memory()
        units = [
            torch.arange(c.width, device="cpu") if c.units is None else c.units.cpu() for c in self._cuts
        ]
        return [kept_of(b, u.sort(-1).values, b.units) for b, u in zip(self.blocks, units, strict=True)]

    @contextmanager
    def _on_layer(self, layer: int) -> Iterator[RunPass]:
        """What runs the passes of one layer, while that is in memory."""
        self._allow_calls()
        try:
            with self._layer_handle(layer) as handle:
                yield handle.run_pass
                self.batches, self.probed_batches = handle.batches, handle.probed_batches
        finally:
            self._refuse_calls()

    def _layer_handle(self, layer: int) -> "LayerHandle":
        here = [i for i, b in enumerate(self.blocks) if b.layer == layer]
        with torch.inference_mode(False), torch.no_grad():
            own = Attachment(self.method, self.ratio, [self._cuts[i] for i in here], self._statistics)
            return LayerHandle(self.model, own, [self.blocks[i] for i in here], self.costs)


class LayerHandle(Handle):
    """A method attached to the blocks of one layer, or of some; `run_pass` is given the passes."""

    _next: bool | None = None

    def _hook_model(self) -> None:
        """The model's own passes do not come here."""

    def probe_next(self, probed: bool) -> None:
        """Probe the batches that follow, or not, whatever the method says."""
        self._next = probed

    def _is_probed(self, started: Pass, when: EveryBatch) -> bool:
        return super()._is_probed(started, when) if self._next is None else self._next


def _refuse(*args: Any, **kwargs: Any) -> Any:
    raise _not_in_memory()


def _not_in_memory() -> UsageError:
    return UsageError(
        "layers of this model are offloaded, so the attached method runs in perplexity and in task scores "
        "alone, a layer at a time; to call the model, load it without offloading, or prune it."
    )
