"""Refit the `down_proj` of every expert of a layer on the tokens that are routed to it.

The layer runs with its experts whole, on the hidden states that reach it. A token's experts are to add what
the dense layer's experts gave, and a share of the error accumulated in front of them: each is to add what it
adds now, and its part of the difference, which is split between them as the router weights them. So the
targets of a token's experts add up to the target that one MLP in their place would have, and an error counts
by the square of the router's weight, as it does in the layer's output.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from probeprune.algebra.least_squares import Gram, squared_error
from probeprune.calibration.fitting import Fitted, best_fit, eliminated, explained
from probeprune.calibration.routing import routed_tokens, routing
from probeprune.errors import Notice
from probeprune.model.experts import Stack
from probeprune.model.hidden_states import HiddenStates
from probeprune.model.stack_cut import StackCut
from probeprune.processes import shares
from probeprune.strategies import allocation
from probeprune.strategies.compensation import Consumer, Refit
from probeprune.strategies.importance import ColumnNorms, Evidence, magnitude
from probeprune.strategies.pruned_block import Cut

AT_ONCE = 2**30
"""Bytes of moments of experts that are in memory at a time, if one expert's are not more."""
SCARCE = 1.0
"""How much stronger the damping is for an expert with as many tokens as channels: with t tokens and k
channels it is `1 + SCARCE k / t` times what the refit asks for."""


def experts_at_once(stack: Stack, channels: int, sets: int = 1) -> int:
    """Number of experts of which `sets` moments of so many channels are in memory at a time."""
    return min(max(AT_ONCE // (sets * moment_bytes(stack, channels)), 1), stack.experts)


def moment_bytes(stack: Stack, channels: int) -> int:
    """Bytes of the moments of so many channels of one expert."""
    return 4 * channels * (channels + stack.hidden_size)


@dataclass(eq=False)
class StackRefit:
    """The refit of the experts of one layer: whole until `fit`, and cut behind it until `restore`."""

    stack: Stack
    cut: Cut
    """Channels that each expert keeps, or their number for elimination to choose."""
    how: Refit
    first_held: int
    """Index of the first batch that is held out."""
    share: float
    """Share of the accumulated error that the experts make up for."""
    metric: torch.Tensor | None
    """Weighting (d, d) of output errors in the choice of channels; None for equal weights."""
    wanted: HiddenStates | None
    """Takes what the experts are to add; None where the stream that they are fitted on is the dense one."""
    shown: StackCut = field(init=False)

    def __post_init__(self) -> None:
        self.shown = StackCut(self.stack)

    def watch(self, batch: int, run: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The dense layer's output for a batch, which `run` gives.

        `wanted` takes what the experts are to add: what they add here, and the share of what else reaches the
        layer's output, of which that of the pruned stream is to be taken away: (tokens, d), float32.
        """
        if self.wanted is None:
            return run()
        with routing(self.stack) as seen:
            out = run()
        self.wanted[batch] = seen.added.add(seen.beside(out), alpha=self.share) if self.share else seen.added
        return out

    def fit(self, run: Callable[[int], torch.Tensor], batches: int) -> Consumer:
        """Choose the channels, if they are not given, and refit every expert; show the result from here on.

        The layer runs once for each part of the experts whose moments are in memory together, up to the
        experts but for the first time.

        Args:
            run: runs the layer on a batch, given by index, of the stream to fit on.
            batches: number of batches.
        """
        stack, given = self.stack, self.cut.units
        channels = stack.width if given is None else self.cut.width
        step = experts_at_once(stack, channels, 2 if self._holds_out else 1)
        fits: list[_ExpertFit] = []
        for start in range(0, stack.experts, step):
            part = range(start, min(start + step, stack.experts))
            with shares.alike():
                moments = self._moments(run, batches, part, channels)
            shares.pool(gram for pair in moments for gram in pair)
            for expert in part:
                fits.append(self._fit_expert(expert, *moments[expert - start]))
                moments[expert - start] = (Gram(0, 0), Gram(0, 0))  # one after the other is done with
        self._say_unseen([i for i, one in enumerate(fits) if not one.tokens])
        consumer = _joined(fits, stack)
        self.shown.keep(consumer.units)
        self.shown.replace_consumers(consumer.weight, consumer.bias)
        return consumer

    @property
    def _holds_out(self) -> bool:
        """Whether some windows are held out, this process's or another's."""
        return len(self.how.damping) > 1

    def restore(self) -> None:
        """Show the experts whole again."""
        self.shown.restore()

    def _moments(
        self, run: Callable[[int], torch.Tensor], batches: int, part: range, channels: int
    ) -> list[tuple[Gram, Gram]]:
        """Moments of the channels and targets of some experts: on the batches to fit, on those held out.

        The first part makes of `wanted` what is lacking beside what the whole experts add now.
        """
        stack, units, wanted = self.stack, self.cut.units, self.wanted
        d, device = stack.hidden_size, stack.device
        held = channels if self._holds_out else 0
        moments = [(Gram(channels, d, device), Gram(held, d, device)) for _ in part]
        for i in range(batches):
            first = part.start == 0 and wanted is not None
            with routing(stack, stop=not first) as seen:
                out = run(i)
            if first:
                assert wanted is not None
                lacking = wanted[i] - seen.added
                wanted[i] = lacking.sub_(seen.beside(out), alpha=self.share) if self.share else lacking
            each = None if wanted is None else seen.parts(wanted[i])
            for expert, token, x, weights in routed_tokens(stack, seen.given, part):
                z = stack.coupled(expert, x)
                target = stack.output(expert, z).float()
                if each is not None:
                    target = target + each[token]
                if units is not None:
                    z = z[:, units[expert].to(z.device)]
                squares = None if weights is None else weights.float().square()
                moments[expert - part.start][i >= self.first_held].update(z, target, squares)
        return moments

    def _fit_expert(self, expert: int, fit: Gram, held: Gram) -> "_ExpertFit":
        """Choose the channels of one expert, if they are not given, then the damping; fit to all windows."""
        stack, own_bias = self.stack, self._bias(expert)
        own, centred = stack.matrix("down_proj", expert), stack.record.biases
        units, tokens = None if self.cut.units is None else self.cut.units[expert], fit.tokens + held.tokens
        if not fit.count:  # nothing to fit on: as it is
            if units is None:
                units = self._largest(expert)
            return _ExpertFit(units.cpu(), own[:, units.to(own.device)].clone(), own_bias)
        dampings = self._dampings(fit)
        name = f"expert {expert} of {stack.name}"
        if units is None:
            with shares.alike(), explained(name):
                found = eliminated(fit, held, own, centred, dampings, 1, self.metric, self.cut.width)
            scores = shares.agreed_tensors({"scores": found.scores})["scores"]
            units = allocation.choose_units(scores.to(own.device), self.cut.width, stack)
            fit = fit.part(units)
            held = held.part(units) if held.count else held
            dampings = self._dampings(fit)
        weight = own[:, units.to(own.device)]
        judge = held if held.count else fit
        with shares.alike(), explained(name):
            before = squared_error(judge, weight, own_bias)
            best = best_fit(fit, held, weight, centred, dampings)
            which = chosen = dampings.index(best.damping)
        before, error, chosen = shares.agreed((before, best.error, chosen))
        counted = before * judge.count, float(judge.tt)
        if not error < before:
            return _ExpertFit(units.cpu(), weight.clone(), own_bias, tokens, counted[0], *counted)
        with shares.alike(), explained(name):
            if held.count:
                fit.merge(held)
            if held.count or chosen != which:
                best = Fitted.to(fit, weight, centred, self._dampings(fit)[chosen])
        made = None if best.bias is None else best.bias.to(own.dtype)
        fitted = best.weight.to(own.dtype)
        return _ExpertFit(
            units.cpu(), fitted, made, tokens, error * judge.count, *counted, self.how.damping[chosen]
        )

    def _dampings(self, fit: Gram) -> list[float]:
        """The candidates for the damping, stronger where an expert has few tokens for its channels."""
        return [d * (1 + SCARCE * len(fit.z_mean) / fit.tokens) for d in self.how.damping]

    def _bias(self, expert: int) -> torch.Tensor | None:
        if not self.stack.record.biases:
            return None
        held: Any = self.stack.module._parameters["down_proj_bias"]
        own: torch.Tensor = held.detach()[expert]
        return own

    def _largest(self, expert: int) -> torch.Tensor:
        """The channels with the largest weights, for an expert of which nothing else is known."""
        own = self.stack.expert(expert)
        scores = magnitude(Evidence(own, ColumnNorms.of(own)))
        return allocation.choose_units(scores, self.cut.width, self.stack)

    def _say_unseen(self, unseen: Sequence[int]) -> None:
        if unseen:
            more = f" and {len(unseen) - 8} more" if len(unseen) > 8 else ""
            warnings.warn(
                Notice(
                    "no token of the calibration text was routed to experts "
                    f"{', '.join(map(str, unseen[:8]))}{more} of {self.stack.name}, whose weights are not "
                    "refitted; give more windows, or other text."
                ),
                stacklevel=2,
            )


@dataclass(frozen=True, eq=False)
class _ExpertFit:
    """What the refit of one expert gave."""

    units: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    tokens: int = 0
    error: float = 0.0
    """Sums over the tokens that errors are taken on, by the squares of their weights; as `before`, with the
    weight before the refit, and `spread`, of the targets around their mean."""
    before: float = 0.0
    spread: float = 0.0
    damping: float | None = None
    """That of the refit, as asked for; None where the weight stays."""


def _joined(fits: Sequence[_ExpertFit], stack: Stack) -> Consumer:
    """One record for all experts of a layer."""
    spread = sum(f.spread for f in fits) or 1.0
    dampings = [f.damping for f in fits if f.damping is not None]
    biases = [f.bias for f in fits if f.bias is not None]
    return Consumer(
        units=torch.stack([f.units for f in fits]),
        weight=torch.stack([f.weight for f in fits]),
        bias=torch.stack(biases) if stack.record.biases else None,
        damping=median(dampings) if dampings else None,
        error=sum(f.error for f in fits) / spread,
        error_before=sum(f.before for f in fits) / spread,
    )
