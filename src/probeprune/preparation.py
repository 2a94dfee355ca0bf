"""Preparation: the pieces of calibration that methods need, each made once and shared.

Only this file decides which pieces a method needs, their order, and the settings that determine each.
`prepare.py` has the public calls.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from probeprune import plan, records
from probeprune.calibration.collecting import calibrate
from probeprune.calibration.damage import damages, savings
from probeprune.calibration.gates import budgets, check_whole, learn_gates
from probeprune.calibration.gradients import saliences
from probeprune.calibration.refit import RefitRequest, refit
from probeprune.calibration.routed import routed_moments
from probeprune.calibration.sensitivity import sensitivities
from probeprune.calibration.statistics import Statistics
from probeprune.calibration.stored import TENSORS
from probeprune.calibration.unfinished import Unfinished, resumed, states_bytes
from probeprune.data.windows import BATCH_SIZE, WindowSource
from probeprune.errors import UsageError
from probeprune.methods import Method
from probeprune.model.blocks import Block
from probeprune.model.identity import content_file
from probeprune.model.passes import token_windows
from probeprune.model.wrappers import unwrapped
from probeprune.places import check_writable
from probeprune.processes import shares
from probeprune.progress import Progress, silent
from probeprune.ranges import plain
from probeprune.strategies import Part
from probeprune.strategies.allocation import ALLOCATIONS
from probeprune.strategies.compensation import Consumer, Refit
from probeprune.strategies.expert_importance import EXPERT_IMPORTANCES
from probeprune.strategies.importance import IMPORTANCES
from probeprune.strategies.probe_every_batch import ProbeEveryBatch
from probeprune.strategies.pruned_block import Cut
from probeprune.strategies.refit_every_batch import RefitEveryBatch
from probeprune.strategies.widths import Damage, Request

_FORMAT = 4
DAMAGE_WINDOWS = 32
"""Number of calibration windows, from the first on, to measure damages on: curves need fewer than a refit."""


@dataclass(frozen=True, eq=False)
class Piece:
    """One part of `Statistics`, in the form that one or more methods need."""

    part: Part
    settings: Mapping[str, Any]
    """All settings that determine it besides model and text, as JSON values."""
    method: Method
    """A method that needs it."""
    cuts: Sequence[Cut] = ()
    """The first cut of every block, for consumers."""
    following: bool = False
    """Whether the consumers must serve refits at every batch, which takes their moments."""

    @property
    def key(self) -> str:
        """Name derived from the part and its settings."""
        text = json.dumps(self.settings, sort_keys=True).encode()
        return f"{self.part}-{hashlib.blake2b(text, digest_size=8).hexdigest()}"

    def served_by(self, value: Mapping[str, Any] | None) -> bool:
        """Whether a value stored under this key suffices: refits at every batch need moments of consumers."""
        if value is None or not self.following:
            return value is not None
        return any(consumer.inverse is not None for consumer in value.values())


Get = Callable[[Piece], dict[str, Any]]
"""Returns a piece: from memory, from disk, or newly made."""


def gather(
    model: nn.Module, method: Method, ratio: float, get: Get, widths: Sequence[int] | None = None
) -> Statistics:
    """The statistics of one method at one ratio, piece by piece.

    Args:
        model: dense, nothing attached.
        method: any method that does not train.
        ratio: share of the method's budget to remove.
        get: returns the pieces.
        widths: number of units that each block keeps, instead of the widths of the method's allocation.

    Raises `UsageError` or `FloatingPointError` for pieces that are missing, not finite, or made
    for another model.
    """
    blocks = plan.parts_of(model, method)
    parts = plan.needs_for(method, blocks)
    channels = plan.loses_experts(method, blocks) and method.experts == "channel"
    pieces: dict[Part, dict[str, Any]] = {}
    if "moments" in parts:
        pieces["moments"] = get(Piece("moments", {"own_positions": _own_positions(method)}, method))
    if "routed" in parts:
        pieces["routed"] = get(Piece("routed", _routed_settings(method), method))
    if "saliences" in parts:
        settings = _salience_settings(method)
        settings |= {"experts": True} if channels else {}
        pieces["saliences"] = get(Piece("saliences", settings, method))
    if "damages" in parts:
        pieces["damages"] = get(
            Piece("damages", {**_curve_settings(method), "budget": method.budget}, method)
        )
    if "gates" in parts and ratio:
        check_whole(model)
        keep = widths
        if not (keep or ALLOCATIONS[method.allocation].needs_scores):
            keep = plan.widths(method, ratio, blocks, [], Statistics(**pieces))
        pieces["gates"] = get(Piece("gates", _gate_settings(method, ratio, keep or []), method))
    statistics = Statistics(**pieces)
    statistics.check(parts if ratio else parts - {"gates"}, blocks, channels)
    if "consumers" in parts and ratio:
        scores = plan.all_scores(model, method, blocks, statistics)
        keep = widths or plan.widths(method, ratio, blocks, scores, statistics)
        cuts = plan.first_cuts(method, blocks, scores, keep)
        pruned = [(b, c) for b, c in zip(blocks, cuts, strict=True) if c.width < b.units]
        units = {b.name: c.width if c.units is None else c.units.tolist() for b, c in pruned}
        following = isinstance(method.when, RefitEveryBatch) and any(b.kind == "mlp" for b, _ in pruned)
        piece = Piece("consumers", {**_refit_settings(method), "units": units}, method, cuts, following)
        statistics = Statistics(**pieces, consumers=get(piece))
    return statistics


def _own_positions(method: Method) -> int:
    return method.when.own_positions if isinstance(method.when, ProbeEveryBatch) else 0


def _routed_settings(method: Method) -> dict[str, Any]:
    of_experts = method.experts == "expert" and EXPERT_IMPORTANCES[method.expert_importance].exchange
    return {"exchange": True} if of_experts else {}


def _salience_settings(method: Method) -> dict[str, Any]:
    importance, gradients = IMPORTANCES[method.importance], method.gradient_settings
    drawn = {"rank": gradients.rank, "draws": gradients.draws, "seed": method.seed}
    return {
        "criterion": importance.criterion,
        "windows": gradients.windows,
        "length": gradients.length,
        **(drawn if importance.draws else {}),
    }


def _gate_settings(method: Method, ratio: float, widths: Sequence[int]) -> dict[str, Any]:
    reads_gradients = IMPORTANCES[method.start.importance].criterion is not None
    return {
        "gates": records.to_json(method.gate_settings),
        "gradients": _salience_settings(method.start) if reads_gradients else None,
        "unit_kind": method.unit_kind,
        "seed": method.seed,
        "widths": list(widths),
        # Without widths, one threshold over all blocks that may lose units.
        **({} if widths else {"ratio": ratio, "skip": method.skip_layers, "blocks": list(method.blocks)}),
    }


def _curve_settings(method: Method) -> dict[str, Any]:
    how = method.refit or Refit()
    return {
        "sensitivity_windows": max(how.sensitivity, 1),
        "damping": how.damping[0],
        "unit_kind": method.unit_kind,
        "seed": method.seed,
    }


def _refit_settings(method: Method) -> dict[str, Any]:
    return {"refit": records.to_json(method.refit), "unit_kind": method.unit_kind, "seed": method.seed}


class Preparation:
    """Makes the pieces that methods need for one model and one text, each once.

    Args:
        model: a supported causal LM in eval mode, with nothing attached while pieces are made.
        calibration: windows of token ids, LongTensor (count, length), or a `WindowSource`. Methods with
            gradients use the first windows, cut to size, or draw windows of their size from the source.
        batch_size: windows per forward pass.
        cache: folder for pieces, stored by content; None stores nothing on disk.
        progress: called with (name of the work, parts done, parts in total).
        following: prepare every refit for `RefitEveryBatch` too, which takes 4 k^2 bytes more per MLP that
            keeps k channels.

    Raises `UsageError` for a cache that cannot be written.

    Only the consumers and the sensitivities requested last stay in memory: consumers are as large as the
    weights they replace, sensitivities take 4 d^2 bytes per block of hidden size d.
    """

    def __init__(
        self,
        model: nn.Module,
        calibration: torch.Tensor | WindowSource,
        *,
        batch_size: int = BATCH_SIZE,
        cache: Path | None = None,
        progress: Progress = silent,
        following: bool = False,
    ) -> None:
        with shares.alike():
            if cache is not None and shares.leads():
                check_writable(cache)
        self.model, self.calibration = unwrapped(model), calibration
        self.batch_size = plain("batch_size", batch_size)
        self.cache, self.progress, self.following = cache, progress, following
        self._windows: torch.Tensor | None = None
        self._pieces: dict[str, dict[str, Any]] = {}
        self._last_sensitivities: tuple[tuple[int, int], dict[str, torch.Tensor]] | None = None
        self._make: dict[Part, Callable[[Piece], dict[str, Any]]] = {
            "moments": self._moments,
            "routed": self._routed,
            "saliences": self._saliences,
            "damages": self._damages,
            "gates": self._gates,
            "consumers": self._consumers,
        }

    def statistics(self, method: Method, ratio: float, widths: Sequence[int] | None = None) -> Statistics:
        """The statistics of `method` at `ratio`; see `gather`."""
        return gather(self.model, method, ratio, self.get, widths)

    @property
    def windows(self) -> torch.Tensor:
        """The calibration windows, LongTensor (count, length)."""
        if self._windows is None:
            source = self.calibration
            with shares.alike():
                windows = source.draw() if isinstance(source, WindowSource) else source
                self._windows = token_windows(self.model, windows)
        return self._windows

    def get(self, piece: Piece) -> dict[str, Any]:
        """The piece from memory, or newly made."""
        if not piece.served_by(self._pieces.get(piece.key)):
            if piece.part == "consumers":
                for key in [k for k in self._pieces if k.startswith("consumers")]:
                    del self._pieces[key]
            self._pieces[piece.key] = self._make[piece.part](piece)
        return self._pieces[piece.key]

    def _moments(self, piece: Piece) -> dict[str, Any]:
        return dict(
            calibrate(
                self.model,
                self.windows,
                batch_size=self.batch_size,
                own_positions=piece.settings["own_positions"],
                cache=self.cache,
                progress=self.progress,
            )
        )

    def _routed(self, piece: Piece) -> dict[str, Any]:
        return dict(
            routed_moments(
                self.model,
                self.windows,
                batch_size=self.batch_size,
                exchange=bool(piece.settings),
                cache=self.cache,
                progress=self.progress,
            )
        )

    def gradient_windows(self, method: Method) -> torch.Tensor:
        """The windows on which `method` takes gradients. Raises `UsageError` for windows too few or too
        short."""
        wanted = method.gradient_settings
        if isinstance(self.calibration, WindowSource):
            return self.calibration.draw(wanted.windows, wanted.length)
        windows = self.windows
        if len(windows) < wanted.windows or windows.shape[1] < wanted.length:
            raise UsageError(
                f"method {method.name!r} takes gradients on {wanted.windows} windows of {wanted.length} "
                f"tokens, and calibration has {len(windows)} of {windows.shape[1]}; give more, or compose "
                "the method with gradients=Gradients(windows=..., length=...)."
            )
        return windows[: wanted.windows, : wanted.length]

    def _saliences(self, piece: Piece) -> dict[str, Any]:
        method = piece.method
        with shares.alike():
            windows = self.gradient_windows(method)
        return dict(
            saliences(
                self.model,
                windows,
                piece.settings["criterion"],
                gradients=method.gradient_settings,
                seed=method.seed,
                experts=bool(piece.settings.get("experts")),
                cache=self.cache,
                progress=self.progress,
            )
        )

    def _sensitivities(self, count: int, seed: int) -> dict[str, torch.Tensor]:
        """Sensitivities on the first `count` windows. The last ones stay in memory: the refit of one method
        at several ratios reads the same."""
        asked = min(count, len(self.windows)), seed
        if self._last_sensitivities is None or self._last_sensitivities[0] != asked:
            self._last_sensitivities = None  # before the next ones are made: both would be in memory
            measured = sensitivities(
                self.model, self.windows[:count], seed=seed, cache=self.cache, progress=self.progress
            )
            self._last_sensitivities = asked, measured
        return self._last_sensitivities[1]

    def _damages(self, piece: Piece) -> dict[str, Any]:
        """Damages of all blocks. Curves are stored on disk; savings are counted, or timed, every time."""
        method, settings = piece.method, _curve_settings(piece.method)
        looked_at = settings["sensitivity_windows"]
        used = self.windows[: max(DAMAGE_WINDOWS, looked_at)]
        path = content_file(self.cache, self.model, used, "damages", _FORMAT, *settings.values())

        def measure(kept: Unfinished) -> dict[str, torch.Tensor]:
            return damages(
                self.model,
                self.windows[:DAMAGE_WINDOWS],
                self._sensitivities(looked_at, method.seed),
                units=method.unit_kind,
                damping=settings["damping"],
                batch_size=self.batch_size,
                progress=self.progress,
                kept=kept,
            )

        states = states_bytes(self.model, self.windows[:DAMAGE_WINDOWS])
        curves = resumed(path, TENSORS, self.model, measure, states=states, settings=self.batch_size)
        saved = savings(self.model, method.unit_kind, method.budget, self.windows[: self.batch_size])
        return {name: Damage(curves[name], *amounts) for name, amounts in saved.items()}

    def _gates(self, piece: Piece) -> dict[str, Any]:
        """Gates trained under the budget of a piece. A run that is stopped trains them anew."""
        method, how = piece.method, piece.method.gate_settings
        assert how is not None
        path = content_file(self.cache, self.model, self.windows, "gates", _FORMAT, dict(piece.settings))

        def learn(_: Unfinished) -> dict[str, torch.Tensor]:
            blocks, own = plan.parts_of(self.model, method), method.start
            scores = plan.all_scores(self.model, own, blocks, gather(self.model, own, 0.0, self.get))
            pairs = zip(blocks, scores, strict=True)
            start = {b.name: s.cpu() for b, s in pairs if isinstance(b, Block) and s is not None}
            ratio, widths = piece.settings.get("ratio", 0.0), piece.settings["widths"]
            wanted = budgets(Request(blocks, ratio, method.skip_layers, kinds=method.blocks), widths)
            learned = learn_gates(
                self.model, self.windows, wanted, start, how, seed=method.seed, progress=self.progress
            )
            return {name: learned.get(name, torch.zeros_like(s)) for name, s in start.items()}

        return resumed(path, "gates", self.model, learn)

    def _consumers(self, piece: Piece) -> dict[str, Any]:
        """Consumers refitted to the cuts of a piece, or to units that the refit chooses."""
        method, how = piece.method, piece.method.refit
        assert how is not None
        following = self.following or piece.following
        windows = self.windows[: how.windows]
        settings = dict(piece.settings), following
        path = content_file(self.cache, self.model, windows, "consumers", _FORMAT, *settings)

        def fit(kept: Unfinished) -> dict[str, Consumer]:
            blocks = plan.parts_of(self.model, method)
            metrics: dict[str, torch.Tensor] = {}
            if how.sensitivity and method.ordered_by_refit:
                metrics = self._sensitivities(min(how.sensitivity, len(windows)), method.seed)
            cuts = {b.name: c for b, c in zip(blocks, piece.cuts, strict=True) if c.width < b.units}
            return refit(
                self.model,
                RefitRequest(cuts, method.unit_kind, metrics, following),
                windows,
                how,
                batch_size=self.batch_size,
                progress=self.progress,
                kept=kept,
            )

        states = (2 if how.sequential else 1) * states_bytes(self.model, windows)
        return resumed(path, "consumers", self.model, fit, states=states, settings=self.batch_size)
