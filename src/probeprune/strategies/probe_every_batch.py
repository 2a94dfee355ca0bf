"""Probe Pruning: choose the units of every block anew at every batch (Le et al., ICLR 2025)."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch.profiler import record_function

from probeprune.algebra.moments import OWN_POSITIONS, History, Tokens
from probeprune.errors import BadValue, UsageError, unknown
from probeprune.ranges import check_fields
from probeprune.strategies import Part
from probeprune.strategies.probe import FUSIONS, Probe, Selection, everything, fused_energy
from probeprune.strategies.pruned_block import PrunedBlock
from probeprune.strategies.schedule import EveryBatch, Stage


@dataclass(frozen=True)
class ProbeEveryBatch(EveryBatch):
    """Score every block's units from a probe of each batch, fused with history; keep the best.

    Raises `UsageError` for values out of range.
    """

    kind: ClassVar[str] = "probe"

    probe: Probe = field(default_factory=Probe)
    """The part of a batch that is run ahead."""
    fusion: str = "importance"
    """A key of `probe.FUSIONS`. `importance`: the probe and history, each weighted by its share of the sum;
    `fixed`: weighted by `history_share`; `none`: the probe alone."""
    history_share: float = 0.5
    """Weight of history under `fixed` fusion."""
    decay: float = 0.99
    """Factor by which history decays at every batch."""
    own_positions: int = OWN_POSITIONS
    """Number of first positions with a history of their own (the paper: all; docs/choices.md)."""
    refresh: int = 0  # type: ignore[misc]
    """Number of tokens between two choices of MLP channels while decoding; 0 keeps those of the prompt. A
    refresh runs MLPs dense and is its own probe; the steps in between update history. Heads do not change,
    because the cache holds those of the prompt. A finished sequence still counts: the padding that `generate`
    feeds it cannot be told from text."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.fusion not in FUSIONS:
            raise BadValue("fusion", unknown("fusion", self.fusion, FUSIONS))
        if self.refresh and self.own_positions:
            raise UsageError("refresh needs history that pools positions: give own_positions=0.")

    @property
    def needs(self) -> frozenset[Part]:  # type: ignore[override]
        return frozenset() if FUSIONS[self.fusion] is None else frozenset({"moments"})

    def follower(self, block: PrunedBlock) -> "ProbePruning":
        return ProbePruning(self, block)


class ProbePruning:
    """State of one block under Probe Pruning.

    Attributes:
        history: running energies of the coupled activation; None without fusion.
    """

    def __init__(self, settings: ProbeEveryBatch, block: PrunedBlock) -> None:
        self.settings, self.block = settings, block
        self.history: History | None = None

    def start(self) -> None:
        """Set up the state and make the first cut."""
        if FUSIONS[self.settings.fusion] is not None:
            assert self.block.moments is not None
            self.history = History(self.block.moments, self.settings.decay)
            self.block.partition.companions.append(self.history.energy)
        self.block.first_cut()

    def on_probe(self, z: torch.Tensor, selection: Selection, tokens: Tokens) -> None:
        """Answer a probe; see `Follower`."""
        self.block.cut(self._score(z, selection, tokens))

    def on_pass(self, z: torch.Tensor, tokens: Tokens, stage: Stage) -> None:
        """Take note of a pass; see `Follower`."""
        if stage == "refresh":
            scores = self._score(z, everything(tokens, z.device), tokens)
            self._remember(z, tokens)  # before the cut moves its channels
            self.block.cut(scores)
        elif stage != "keep" or self._refreshes:
            self._remember(z, tokens)

    @property
    def _refreshes(self) -> bool:
        """Whether the block refreshes. Heads never do: the cache holds those that the prompt chose."""
        return self.settings.refresh > 0 and self.block.block.kind == "mlp"

    def _score(self, z: torch.Tensor, selection: Selection, tokens: Tokens) -> torch.Tensor:
        settings = self.settings
        with record_function("probeprune::score"):
            energy = fused_energy(z, selection, tokens, self.history, settings.fusion, settings.history_share)
        return self.block.score(energy)

    def _remember(self, z: torch.Tensor, tokens: Tokens) -> None:
        if self.history is not None:
            with record_function("probeprune::history"):
                self.history.update(z, tokens)
