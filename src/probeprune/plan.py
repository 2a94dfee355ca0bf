"""The plan: scores of every block's units from calibration, and the first cut of every block.

`attach` shows the cut through views; `prune` makes it permanent. Nothing here changes a weight.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import torch
from torch import nn

from probeprune.calibration.statistics import Statistics
from probeprune.errors import Notice, UsageError
from probeprune.methods import Method
from probeprune.model.blocks import Block
from probeprune.model.layers import opened
from probeprune.processes import shares
from probeprune.ranges import plain
from probeprune.strategies import Part, allocation
from probeprune.strategies.allocation import ALLOCATIONS, Request
from probeprune.strategies.importance import IMPORTANCES, ColumnNorms, Evidence
from probeprune.strategies.pruned_block import BatchScorer, Cut, PrunedBlock
from probeprune.strategies.schedule import DuringTraining

Scores = torch.Tensor
"""Importance of a block's units (units,), float32; larger is more important."""


@dataclass(frozen=True)
class Kept:
    """The units that one block keeps."""

    name: str
    kind: Literal["attention", "mlp", "mixer"]
    units: tuple[int, ...]
    """Their ids in the model as given, ascending."""
    of: int
    """Number of units of the whole block."""


def needs(method: Method) -> frozenset[Part]:
    """The parts of `Statistics` that a method needs: the union of the needs of its strategies."""
    importance, rule = IMPORTANCES[method.importance], ALLOCATIONS[method.allocation]
    if not method.when.prunes:
        return frozenset()
    if isinstance(method.when, DuringTraining):  # scores come from training, which starts without calibration
        return rule.needs
    parts = rule.needs | method.compensation.needs | method.when.needs
    # A batch is scored without them; decisions before any batch need them.
    if not method.when.chooses or rule.needs_scores:
        parts |= importance.needs
    return parts


def static_scores(method: Method, block: Block, statistics: Statistics) -> Scores | None:
    """Scores of a block's units before any batch; None where a method has none.

    Raises `FloatingPointError` for scores that are not finite.
    """
    importance = IMPORTANCES[method.importance]
    moments = statistics.moments.get(block.name)
    if not method.when.prunes or importance.score is None:
        return None
    if moments is None and "moments" in importance.needs:
        return None
    device = block.consumer.weight.device
    if moments is not None:
        moments = moments.to(device)
    saliences: tuple[torch.Tensor, ...] = ()
    if importance.criterion is not None:
        saliences = tuple(
            m.part(statistics.saliences[m.name].to(device), block.units).view(block.units, m.width).sum(1)
            for m in block.members
        )
    scores = importance.score(
        Evidence(
            block,
            ColumnNorms.of(block),
            energy=None if moments is None else moments.sample_energy,
            variance=None if moments is None else moments.variance,
            saliences=saliences,
            reduction="sum" if importance.criterion is None else method.gradient_settings.reduction,
            seed=method.seed,
        )
    )
    if not scores.is_meta and not torch.isfinite(scores).all():
        raise overflow(block)
    return scores


def all_scores(
    model: nn.Module, method: Method, blocks: Sequence[Block], statistics: Statistics
) -> list[Scores | None]:
    """The static scores of all blocks of a model; layers that are offloaded are opened one by one.

    Where work is shared out, all processes get those of the first: all that is chosen follows from them.
    """
    scores: list[Scores | None] = []
    with shares.alike():
        for layer, here in groupby(blocks, lambda block: block.layer):
            with opened(model, layer):
                scores += [static_scores(method, block, statistics) for block in here]
    # Without numbers, where only shapes are tried, there is nothing to agree on.
    known = {str(i): s for i, s in enumerate(scores) if s is not None and not s.is_meta}
    same = shares.agreed_tensors(known) if known else {}
    return [same.get(str(i), s) for i, s in enumerate(scores)]


def widths(
    method: Method,
    ratio: float,
    blocks: Sequence[Block],
    scores: Sequence[Scores | None],
    statistics: Statistics,
) -> list[int]:
    """Number of units that each block keeps under the method's allocation.

    A `Notice` says so where the method asks for heads that cannot go. Raises `UsageError` for an impossible
    ratio.
    """
    ratio = plain("ratio", ratio)
    if not method.when.prunes or not ratio:
        return [b.units for b in blocks]
    rule = ALLOCATIONS[method.allocation]
    kept = rule.widths(
        Request(
            blocks,
            ratio,
            skip_layers=method.skip_layers,
            round_to=method.round_to,
            kinds=method.blocks,
            scores=[s for s in scores if s is not None] if rule.needs_scores else (),
            damages=[statistics.damages[b.name] for b in blocks] if "damages" in rule.needs else (),
        )
    )
    whole = next((b.whole for b in blocks if b.whole is not None and b.kind in method.blocks), None)
    if whole is not None:
        sentence = f"no head of this model can go, because it {whole}; MLPs lose all that the ratio asks for."
        warnings.warn(Notice(sentence), stacklevel=2)
    return kept


def first_cuts(
    method: Method,
    blocks: Sequence[Block],
    scores: Sequence[Scores | None],
    keep: Sequence[int],
) -> list[Cut]:
    """The first cut of every block, given the widths in `keep`, including blocks that keep all units."""

    def cut(block: Block, width: int, scores: Scores | None) -> Cut:
        if scores is None:
            return Cut(width)
        # On a weightless model (shapes only) any units will do.
        units = (
            torch.arange(width, device="cpu")
            if scores.is_meta
            else allocation.choose_units(scores, width, block)
        )
        return Cut(width, units)

    return [cut(b, k, s) for b, k, s in zip(blocks, keep, scores, strict=True)]


def pruned_blocks(
    method: Method, blocks: Sequence[Block], cuts: Sequence[Cut], statistics: Statistics
) -> list[PrunedBlock]:
    """The blocks that lose units, ready for their first cut.

    Raises `UsageError` where a refitted consumer is missing or was made for other units.
    """
    pruned: list[PrunedBlock] = []
    try:
        for block, cut in zip(blocks, cuts, strict=True):
            if cut.width >= block.units:
                continue
            consumer, units = None, cut.units
            if "consumers" in method.compensation.needs:
                consumer = statistics.check_consumer(block, cut.width, cut.units)
                units = consumer.units
            moments = statistics.moments.get(block.name)
            scorer = _batch_scorer(method, block)
            pruned.append(
                PrunedBlock(block, Cut(cut.width, units), method.compensation, moments, consumer, scorer)
            )
    except BaseException:
        for p in pruned:
            p.partition.restore()
        raise
    return pruned


def check_consumers(
    method: Method, blocks: Sequence[Block], cuts: Sequence[Cut], statistics: Statistics
) -> None:
    """Raise `UsageError` where a refitted consumer that the cuts need is missing, or was made for other
    units."""
    if "consumers" in method.compensation.needs:
        for block, cut in zip(blocks, cuts, strict=True):
            if cut.width < block.units:
                statistics.check_consumer(block, cut.width, cut.units)


def _batch_scorer(method: Method, block: Block) -> BatchScorer | None:
    score = IMPORTANCES[method.importance].score
    if not method.when.chooses or score is None:
        return None
    return BatchScorer(block, score, method.seed)


def overflow(block: Block) -> FloatingPointError:
    """The error for scores of a block's units, or a refitted weight, that are not finite."""
    return FloatingPointError(
        f"the importance or the refit of {block.name} is NaN or infinite; the model's activations overflowed."
    )


def unprepared(method: Method) -> UsageError:
    """The error for a method that needs calibration, without one."""
    return UsageError(
        f"method {method.name!r} needs calibration=, windows of token ids (count, length) or the result of "
        "probeprune.prepare."
    )
