"""The plan: scores of every block's units from calibration, and the first cut of every block.

`attach` shows the cut through views; `prune` makes it permanent. Nothing here changes a weight.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import torch
from torch import nn

from probeprune.calibration.statistics import Statistics
from probeprune.errors import Notice, UsageError
from probeprune.methods import Method
from probeprune.model.blocks import Block
from probeprune.model.experts import Stack, find_parts
from probeprune.model.layers import opened
from probeprune.model.stack_cut import StackCut
from probeprune.processes import shares
from probeprune.ranges import plain
from probeprune.strategies import Part, allocation
from probeprune.strategies.allocation import ALLOCATIONS, Request
from probeprune.strategies.expert_cut import ExpertCut
from probeprune.strategies.expert_importance import EXPERT_IMPORTANCES, by_rank, channel_scores
from probeprune.strategies.importance import IMPORTANCES, ColumnNorms, Evidence
from probeprune.strategies.pruned_block import BatchScorer, Cut, PrunedBlock
from probeprune.strategies.schedule import DuringTraining
from probeprune.strategies.widths import Damage, Prunable

Scores = torch.Tensor
"""Importance of a block's units (units,), float32; larger is more important."""


@dataclass(frozen=True)
class Kept:
    """The units that one block keeps."""

    name: str
    kind: Literal["attention", "mlp", "mixer", "experts"]
    units: tuple[int, ...]
    """Their ids in the model as given, ascending; of channels of experts their places, since each expert
    keeps channels of its own (`by_expert`)."""
    of: int
    """Number of units of the whole block."""
    by_expert: tuple[tuple[int, ...], ...] = ()
    """For experts that lost channels, the ids of those that each keeps."""


def kept_of(block: Prunable, units: torch.Tensor, of: int) -> Kept:
    """What a block keeps: ids (kept,), or (experts, kept) of channels of experts; `of` units in all."""
    if units.ndim == 1:
        return Kept(block.name, block.kind, tuple(units.tolist()), of)
    own = tuple(map(tuple, units.tolist())) if units.shape[1] < of else ()
    return Kept(block.name, block.kind, tuple(range(units.shape[1])), of, own)


def parts_of(model: nn.Module, method: Method) -> list[Prunable]:
    """All that a ratio of a method counts in a model: its blocks and its stacks of experts, in order."""
    return find_parts(model, method.unit_kind, method.experts, method.experts_stay)


def loses_experts(method: Method, blocks: Sequence[Prunable]) -> bool:
    """Whether a method takes units from stacks of experts, and there are some."""
    if method.experts_stay is not None or not method.when.prunes or "experts" not in method.blocks:
        return False
    return any(b.kind == "experts" for b in blocks)


def expert_needs(method: Method) -> frozenset[Part]:
    """The parts of `Statistics` that a method needs of a mixture of experts alone."""
    if method.experts_stay is not None or not method.when.prunes or "experts" not in method.blocks:
        return frozenset()
    if method.experts == "channel":
        reads = "moments" in IMPORTANCES[method.importance].needs
    else:
        reads = EXPERT_IMPORTANCES[method.expert_importance].routed
    return frozenset({"routed"}) if reads else frozenset()


def needs_for(method: Method, blocks: Sequence[Prunable]) -> frozenset[Part]:
    """The parts of `Statistics` that a method needs for these blocks."""
    return needs(method) | (expert_needs(method) if loses_experts(method, blocks) else frozenset())


def may_need(method: Method) -> frozenset[Part]:
    """The parts of `Statistics` that a method needs of some models."""
    return needs(method) | expert_needs(method)


def needs(method: Method) -> frozenset[Part]:
    """The parts of `Statistics` that a method needs: the union of the needs of its strategies. Those for
    experts are in `needs_for`."""
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


def expert_scores(method: Method, stack: Stack, statistics: Statistics) -> Scores | None:
    """Scores of a stack's units: of experts (experts,), or of channels (experts, channels); None where no
    unit goes.

    A `Notice` names the experts that no token of the calibration text reached. Raises `FloatingPointError`
    for scores that are not finite.
    """
    if not loses_experts(method, [stack]):
        return None
    if stack.unit == "channel" and method.ordered_by_refit:
        return None
    moments = statistics.routed.get(stack.name)
    if "routed" in needs_for(method, [stack]):
        if moments is None:
            return None
        moments = moments.to(stack.device)
        unseen = (moments.count == 0).nonzero().flatten().tolist()
        if unseen:
            more = f" and {len(unseen) - 8} more" if len(unseen) > 8 else ""
            warnings.warn(
                Notice(
                    "no token of the calibration text was routed to experts "
                    f"{', '.join(map(str, unseen[:8]))}{more} of {stack.name}, which score lowest; give more "
                    "windows, or other text."
                ),
                stacklevel=2,
            )
    if stack.unit == "expert":
        rule = EXPERT_IMPORTANCES[method.expert_importance]
        if rule.exchange and (moments is None or len(moments.exchange) != 2 * stack.experts):
            raise UsageError(
                f"the statistics do not say what each expert's leaving changes in {stack.name}; prepare this "
                "model and method: probeprune.prepare."
            )
        scores = rule.score(stack, moments, method.seed)
    else:
        scores = channel_scores(
            stack, method.importance, moments, method.seed, **_saliences(method, stack, statistics)
        )
    if not scores.is_meta and not torch.isfinite(scores).all():
        raise overflow(stack)
    return scores


def _saliences(method: Method, stack: Stack, statistics: Statistics) -> dict[str, Any]:
    """What channels of experts are scored by, for an importance from gradients."""
    if IMPORTANCES[method.importance].criterion is None:
        return {}
    found = statistics.saliences
    own = {key: found[f"{stack.name}.{key}"].to(stack.device) for key in (stack.record.producer, "down_proj")}
    return {"saliences": own, "reduction": method.gradient_settings.reduction}


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
    if importance.learned and block.name not in statistics.gates:
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
            gates=statistics.gates[block.name].to(device) if importance.learned else None,
            reduction="sum" if importance.criterion is None else method.gradient_settings.reduction,
            seed=method.seed,
        )
    )
    if not scores.is_meta and not torch.isfinite(scores).all():
        raise overflow(block)
    return scores


def all_scores(
    model: nn.Module, method: Method, blocks: Sequence[Prunable], statistics: Statistics
) -> list[Scores | None]:
    """The static scores of all blocks of a model; layers that are offloaded are opened one by one.

    Where work is shared out, all processes get those of the first: all that is chosen follows from them.
    """
    scores: list[Scores | None] = []
    with shares.alike():
        for layer, here in groupby(blocks, lambda block: block.layer):
            with opened(model, layer):
                for block in here:
                    if isinstance(block, Stack):
                        scores.append(expert_scores(method, block, statistics))
                    else:
                        scores.append(static_scores(method, block, statistics))
    # Without numbers, where only shapes are tried, there is nothing to agree on.
    known = {str(i): s for i, s in enumerate(scores) if s is not None and not s.is_meta}
    same = shares.agreed_tensors(known) if known else {}
    return [same.get(str(i), s) for i, s in enumerate(scores)]


def widths(
    method: Method,
    ratio: float,
    blocks: Sequence[Prunable],
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
    if method.budget != "parameters" and any(b.kind == "experts" for b in blocks):
        raise UsageError(
            f"a budget of {method.budget} is not counted for mixtures of experts; use a budget of parameters."
        )
    kept = rule.widths(
        Request(
            blocks,
            ratio,
            skip_layers=method.skip_layers,
            round_to=method.round_to,
            kinds=method.blocks,
            scores=_comparable(blocks, scores) if rule.needs_scores else (),
            damages=[_damage(statistics, b) for b in blocks] if "damages" in rule.needs else (),
        )
    )
    stays = {b.kind: b.whole for b in blocks if b.whole is not None and b.kind in method.blocks}
    if "attention" in stays:
        heads = [b for b in blocks if b.kind == "attention"]
        staying = sum(b.whole is not None for b in heads)
        all_stay, mixture = staying == len(heads), any(b.kind == "experts" for b in blocks)
        others = "MLPs" if all_stay and not mixture else "the other blocks"
        which = "this model" if all_stay else f"{staying} of {len(heads)} attention blocks of this model"
        sentence = f"no head of {which} can go, because it {stays['attention']}"
        warnings.warn(Notice(f"{sentence}; {others} lose all that the ratio asks for."), stacklevel=2)
    if "experts" in stays:
        sentence = f"experts stay whole, because {stays['experts']}, and count as whole in the ratio"
        warnings.warn(Notice(f"{sentence}; the other blocks lose all that it asks for."), stacklevel=2)
    return kept


def _comparable(blocks: Sequence[Prunable], scores: Sequence[Scores | None]) -> list[Scores]:
    """One score for each width of every block; zeros for experts that stay whole.

    Of scores without numbers, where only shapes are tried, places take their place: an equal cut.
    """
    if all(s is None for s in scores):
        return []
    device = next(s.device for s in scores if s is not None)
    found: list[Scores] = []
    for block, own in zip(blocks, scores, strict=True):
        if own is not None:
            own = by_rank(own) if own.ndim == 2 else own
            found.append(_places(len(own)) if own.is_meta else own)
        elif isinstance(block, Stack):
            found.append(torch.zeros(block.units, dtype=torch.float32, device=device))
    return found


def _places(units: int) -> Scores:
    """Scores (units,) by which all blocks lose the same share under one threshold."""
    return (torch.arange(units, dtype=torch.float32, device="cpu") + 0.5) / units


def _damage(statistics: Statistics, block: Prunable) -> Damage:
    """The damage of cutting a block; stacks of experts, which stay whole, count in the budget alone."""
    if isinstance(block, Stack):
        curve = torch.zeros(block.units + 1, dtype=torch.float64, device="cpu")
        return Damage(curve, block.unit_parameters, block.parameters)
    return statistics.damages[block.name]


def first_cuts(
    method: Method,
    blocks: Sequence[Prunable],
    scores: Sequence[Scores | None],
    keep: Sequence[int],
) -> list[Cut]:
    """The first cut of every block, given the widths in `keep`, including blocks that keep all units."""

    def cut(block: Prunable, width: int, scores: Scores | None) -> Cut:
        if scores is None:
            return Cut(width)
        if scores.is_meta:  # on a weightless model (shapes only) any units will do
            units = torch.arange(width, device="cpu")
            return Cut(width, units if scores.ndim == 1 else units.expand(len(scores), -1))
        return Cut(width, allocation.choose_units(scores, width, block))

    return [cut(b, k, s) for b, k, s in zip(blocks, keep, scores, strict=True)]


def stack_cuts(
    method: Method, blocks: Sequence[Prunable], cuts: Sequence[Cut], statistics: Statistics
) -> list[ExpertCut]:
    """The stacks of experts that lose units.

    Raises `UsageError` where refitted experts are missing or were made for other units.
    """
    found = []
    for block, cut in zip(blocks, cuts, strict=True):
        if not isinstance(block, Stack) or cut.width >= block.units:
            continue
        consumer, units = None, cut.units
        if "consumers" in method.compensation.needs:
            consumer = statistics.check_consumer(block, cut.width, cut.units)
            units = consumer.units
        assert units is not None
        found.append(ExpertCut(StackCut(block), units, consumer))
    return found


def pruned_blocks(
    method: Method, blocks: Sequence[Prunable], cuts: Sequence[Cut], statistics: Statistics
) -> list[PrunedBlock]:
    """The blocks that lose units, ready for their first cut; those of experts are in `stack_cuts`.

    Raises `UsageError` where a refitted consumer is missing or was made for other units.
    """
    pruned: list[PrunedBlock] = []
    try:
        for block, cut in zip(blocks, cuts, strict=True):
            if cut.width >= block.units or isinstance(block, Stack):
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
    method: Method, blocks: Sequence[Prunable], cuts: Sequence[Cut], statistics: Statistics
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


def overflow(block: Prunable) -> FloatingPointError:
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
