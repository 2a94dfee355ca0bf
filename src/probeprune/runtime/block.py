"""One pruned block while its model runs: its partition and, for dynamic methods, the stages of Probe Pruning.

A batch is probed and the block cut anew, or its consumer refitted to it; small batches reuse what was chosen
before. A pass that continues a cache keeps what its prompt chose, and a refresh chooses an MLP's channels
anew. Which of these a pass is, the handle says (`dynamic.py`). Nothing here waits for an accelerator: numbers
stay on the device, sizes come from shapes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.functional import linear
from torch.profiler import record_function
from torch.utils.hooks import RemovableHandle

from probeprune.algebra.batch_refit import Sample, refit_to_batch
from probeprune.algebra.moments import History, Moments, Tokens
from probeprune.methods import Method
from probeprune.model.blocks import Block
from probeprune.model.partition import Partition
from probeprune.runtime.side_stream import SideStream
from probeprune.strategies import allocation
from probeprune.strategies.compensation import Consumer, lost_bias
from probeprune.strategies.importance import IMPORTANCES, ColumnNorms, Evidence
from probeprune.strategies.probe import Selection, choose, everything, fused_energy, run_ahead

Stage = Literal["idle", "choose", "reuse", "keep", "refresh"]
SAMPLE = 256
"""Tokens of a probe that a refit is made to, at most."""
NO_TOKENS = Tokens(0, 0)


@dataclass
class CurrentPass:
    """What all blocks of a model share of the pass that is under way."""

    stage: Stage = "idle"
    """`choose` or `reuse` (of the choice before) on a batch; `keep` or `refresh` on a pass that continues a
    cache."""
    tokens: Tokens = NO_TOKENS
    probing: bool = False
    """Whether a block is running on its probe: that is no part of the model's own pass."""
    ahead: str = ""
    """The block whose probe ran beside the one before it, until its turn comes."""
    layer_types: Sequence[str] = ()
    """Of every layer, where a model has several types: with windowed attention, say."""
    attention: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What this pass gives to attention beside hidden states, by type of layer, as far as it was seen."""

    def layer_type(self, block: Block) -> str:
        """Of the block's layer."""
        return self.layer_types[block.layer] if self.layer_types else ""

    def end(self) -> None:
        """Forget the pass."""
        self.stage, self.ahead, self.attention = "idle", "", {}


class BlockRuntime:
    """One pruned block of an attached model.

    Attributes:
        block: the block.
        keep: units it keeps.
        partition: its weights, kept units first.
        history: running energies, where the method fuses with them.
        beside: the block before this one, where the probe runs beside it.
        swapped: LongTensor (), units brought into the window so far.
        finite: BoolTensor (), whether the last scores were.
        consumer: fitted to calibration text, what refits to a batch start from; None where there are none.
    """

    def __init__(
        self,
        method: Method,
        now: CurrentPass,
        block: Block,
        keep: int,
        scores: torch.Tensor | None,
        moments: Moments | None,
        beside: Block | None,
    ) -> None:
        self.method, self.now = method, now
        self.block, self.keep = block, keep
        self.norms = ColumnNorms.of(block)
        self.partition = Partition(block)
        self._first_scores = scores
        self._score = IMPORTANCES[self.method.importance].score
        device = block.consumer.weight.device
        self.swapped = torch.zeros((), dtype=torch.long, device=device)
        self.finite = torch.ones((), dtype=torch.bool, device=device)
        probe = method.probe
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
        self.consumer: Consumer | None = None
        self.beside = beside
        self._queue = SideStream(device)
        self._residual: torch.Tensor | None = None

    @property
    def chosen(self) -> torch.Tensor | int:
        """The units of the first cut; how many, where no scores say which."""
        return self.keep if self._first_scores is None else self.partition.kept_units

    def start(self) -> None:
        """The first cut: for good if static, a place to start from if dynamic."""
        if self._first_scores is not None:
            self._cut(self._first_scores)

    def refitted(self, consumer: Consumer) -> None:
        """Keep what a refit chose, or was made for, and show it."""
        consumer = consumer.to(self.partition.order.device)
        self.partition.keep(consumer.units)
        self.partition.replace_consumer(consumer.weight, consumer.bias)
        if self.method.when == "batch" and consumer.inverse is not None:
            self.consumer = consumer

    @property
    def follows(self) -> bool:
        """Whether a batch is looked at: not where a refit is for good."""
        return self.method.when == "batch" and (self._score is not None or self.consumer is not None)

    def hooks(self) -> list[RemovableHandle]:
        """Let the stages run whenever the model does; dynamic methods only."""
        if not self.follows:
            return []
        block = self.block
        hooks = [
            block.entry.register_forward_pre_hook(self._before_block, with_kwargs=True),
            block.consumer.register_forward_pre_hook(self._before_consumer),
        ]
        if block.norm is not None:
            hooks.append(block.norm.register_forward_pre_hook(self._before_norm))
        if self.beside is not None:
            # Behind that block's own hooks: its turn begins before this one's probe does.
            hooks.append(self.beside.entry.register_forward_pre_hook(self._before_beside, with_kwargs=True))
            if self.beside.norm is not None:
                hooks.append(self.beside.norm.register_forward_pre_hook(self._before_norm))
        if self._refreshes:
            hooks.append(block.consumer.register_forward_hook(self._after_consumer))
        return hooks

    @property
    def _refreshes(self) -> bool:
        """Heads never do: the cache holds those that the prompt chose."""
        probe = self.method.probe
        return probe is not None and probe.refresh > 0 and self.block.kind == "mlp"

    def _before_norm(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if self.now.stage == "choose" and not self.now.probing:
            self._residual = args[0]

    @torch.no_grad()
    def _before_block(
        self, module: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]
    ) -> None:
        if self.now.stage == "refresh" and self._refreshes:
            self.partition.widen()
        if self.now.stage != "choose" or self.now.probing:
            return
        x, residual, kwargs = self._given(args, kwargs)
        if self.block.kind == "attention":
            self.now.attention[self.now.layer_type(self.block)] = kwargs
        if self.now.ahead == self.block.name:
            self._queue.join()
        else:
            self._probe(residual, x, kwargs)

    @torch.no_grad()
    def _before_beside(
        self, module: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]
    ) -> None:
        """Probe this block beside the one before it, from that one's residual, if all it takes is known."""
        if self.now.stage != "choose" or self.now.probing:
            return
        assert self.beside is not None
        _, residual, given = self._given(args, kwargs)
        if self.beside.kind == "attention":
            self.now.attention[self.now.layer_type(self.beside)] = given
        is_mlp = self.block.kind == "mlp"
        known = {} if is_mlp else self.now.attention.get(self.now.layer_type(self.block))
        if known is None or residual.device != self.block.consumer.weight.device:
            return
        self.now.ahead = self.block.name
        with self._queue.run(residual):
            self._probe(residual, residual, known, self.block.norm)

    def _given(
        self, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        """What a block was called with: its normalised input, the residual in front of it, and the rest."""
        kwargs = dict(kwargs)
        x = self._shaped(args[0] if args else kwargs.pop("hidden_states"))
        residual = x if self._residual is None else self._shaped(self._residual)
        self._residual = None
        return x, residual, kwargs

    def _probe(
        self, residual: torch.Tensor, x: torch.Tensor, kwargs: dict[str, Any], norm: nn.Module | None = None
    ) -> None:
        """All stages from the choice of a probe to the cut, or to the refit."""
        probe, tokens = self.method.probe, self.now.tokens
        assert probe is not None
        with record_function("probeprune::choose"):
            selection = choose(residual, tokens, probe)
        self.partition.widen()
        self.now.probing = True
        try:
            with record_function("probeprune::run_ahead"):
                z = run_ahead(self.block, x, selection, kwargs, norm)
        finally:
            self.now.probing = False
        if self.consumer is not None:
            self._refit(z, selection, self.consumer)
            return
        with record_function("probeprune::score"):
            scores = self._scores(fused_energy(z, selection, tokens, self.history, probe))
        self._cut(scores)

    def _before_consumer(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if self.history is None or self.now.probing:
            return
        if self.now.stage in ("choose", "reuse") or (self.now.stage == "keep" and self._refreshes):
            self._remember(args[0])

    @torch.no_grad()
    def _after_consumer(self, module: nn.Module, args: tuple[torch.Tensor, ...], output: Any) -> None:
        """A refresh: this pass ran dense, so all of it is the probe."""
        if self.now.stage != "refresh":
            return
        assert self.method.probe is not None
        with record_function("probeprune::score"):
            z, tokens = self._shaped(args[0]), self.now.tokens
            whole = everything(tokens, z.device)
            energy = fused_energy(z, whole, tokens, self.history, self.method.probe)
            scores = self._scores(energy)
        if self.history is not None:
            self._remember(args[0])
        self._cut(scores)

    def _remember(self, z: torch.Tensor) -> None:
        assert self.history is not None
        with record_function("probeprune::history"):
            self.history.update(self._shaped(z), self.now.tokens)

    def _scores(self, energy: torch.Tensor) -> torch.Tensor:
        """Scores of the block's units, from channels' energies in the present order."""
        in_order = torch.empty_like(energy)
        in_order[self.partition.channels] = energy
        evidence = Evidence(self.block, self.norms, energy=in_order, seed=self.method.seed)
        assert self._score is not None
        return self._score(evidence)

    def _cut(self, scores: torch.Tensor) -> None:
        with record_function("probeprune::swap"):
            self.finite = torch.isfinite(scores).all()
            self.swapped += self.partition.keep(allocation.choose_units(scores, self.keep, self.block))
            if self.mean is not None:
                channels = self.keep * self.block.unit_width
                self.partition.add_bias(lost_bias(self.partition.consumer_weight, self.mean, channels))

    def _refit(self, z: torch.Tensor, selection: Selection, start: Consumer) -> None:
        """Refit the consumer to the probe `z` (samples, tokens, n) too; the block shows all its units."""
        refit, tokens = self.method.refit, self.now.tokens
        assert refit is not None and start.inverse is not None
        with record_function("probeprune::refit"):
            z, real = z.flatten(0, 1), None
            count = min(len(z), SAMPLE)
            rows = torch.arange(count, device=z.device) * len(z) // count
            if tokens.valid is not None:
                real = tokens.valid[selection.samples][:, selection.tokens].flatten()[rows]
            z, consumer = z[rows], self.block.consumer
            # Not through the module: its hooks are for the model's own pass.
            target = linear(z, consumer.weight, consumer.bias).float()
            kept = z[:, : len(start.inverse)].float()  # in front, as long as nothing swaps
            sample = Sample(kept, target, real, SAMPLE * (1 / refit.batch_share - 1))
            weight, bias = refit_to_batch(sample, start.weight, start.bias, start.inverse, start.mean)
            self.finite = torch.isfinite(weight).all()
            self.partition.replace_consumer(weight, bias)

    def _shaped(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, sequence, width); some layers flatten the first two in front of their MLP."""
        return x.view(self.now.tokens.batch, self.now.tokens.length, x.shape[-1])
