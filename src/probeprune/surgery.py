"""Surgery: prune a model once, for good. The result is an ordinary, smaller model.

The order and the cut are those of the runtime (`plan.py`, `model/partition.py`); here the cut is made
permanent.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import nn

from probeprune import plan
from probeprune.algebra.precision import exact
from probeprune.calibration.statistics import Statistics
from probeprune.data.windows import BATCH_SIZE
from probeprune.errors import UsageError
from probeprune.expert_cuts import stack_cuts
from probeprune.methods import METHODS, Method, check_untrained, get_method
from probeprune.model.blocks import Block, UnitKind, find_layers
from probeprune.model.described import check_described, describe
from probeprune.model.experts import ExpertUnit, Stack, check_kinds, find_parts
from probeprune.model.layers import opened
from probeprune.model.offloading import changes_of, check_changes
from probeprune.model.partition import Partition, check_can_cut
from probeprune.model.passes import check_eval
from probeprune.model.stack_cut import StackCut
from probeprune.model.wrappers import unwrapped
from probeprune.plan import Kept, kept_of, parts_of
from probeprune.preparation import Preparation
from probeprune.prepare import Calibration, Prepared, statistics_for
from probeprune.progress import Progress, silent
from probeprune.ranges import check, plain
from probeprune.strategies.allocation import ALLOCATIONS
from probeprune.strategies.compensation import Consumer
from probeprune.strategies.pruned_block import Cut
from probeprune.strategies.schedule import Once
from probeprune.strategies.widths import Prunable, check_alive


@dataclass(frozen=True)
class Pruning:
    """Record of a completed pruning."""

    method: Method
    ratio: float
    """The ratio asked for: a share of the method's budget over all blocks."""
    removed_share: float
    """The share of all blocks' parameters that was removed."""
    parameters: tuple[int, int]
    """Number of parameters of the whole model before and after, with tied ones counted once."""
    kept: tuple[Kept, ...]
    """The units that every block keeps, by their ids in the model as it was given."""
    steps: int = 1
    refits: dict[str, dict[str, float]] = field(default_factory=dict)
    """Figures of each block's refit in the last step, by block name (`compensation.Consumer.record`)."""

    def record(self) -> dict[str, Any]:
        """Everything as JSON values, as written to pruning.json."""
        return {
            "method": self.method.record(),
            "ratio": self.ratio,
            "removed_share": self.removed_share,
            "parameters": list(self.parameters),
            "steps": self.steps,
            "kept": {
                k.name: {
                    "units": list(k.units),
                    "of": k.of,
                    **({"by_expert": [list(own) for own in k.by_expert]} if k.by_expert else {}),
                }
                for k in self.kept
            },
            "refits": self.refits,
        }


@exact()
def prune(
    model: nn.Module,
    method: str | Method,
    ratio: float,
    *,
    calibration: Calibration | None = None,
    steps: int = 1,
    batch_size: int = BATCH_SIZE,
    cache: Path | None = None,
    progress: Progress = silent,
) -> Pruning:
    """Remove units from `model`, in place and for good; `save` writes the result.

    Example:
        >>> probeprune.prune(model, "flap", ratio=0.2, calibration=windows)
        >>> probeprune.save(model, "out/", tokenizer=tokenizer)

    Args:
        model: a transformers causal LM of a supported family, in eval mode, nothing attached.
        method: a method that prunes once: a name from `METHODS`, or a `Method`. `with_equal_widths(method)`
            gives all layers one width, so that plain transformers opens the checkpoint.
        ratio: share of the method's budget (by default the parameters of all blocks) to remove, in (0, 1).
        calibration: windows of token ids (count, length) or a `WindowSource`, where the method needs
            statistics, gradients or a refit; or the result of `prepare` for this model, method and ratio.
        steps: reach the ratio in this many equal steps, calibrating anew before each (LLM-Pruner's iterative
            pruning); needs text, not prepared calibration. An error in a later step leaves the model as the
            previous steps made it.
        batch_size: windows per forward pass of calibration.
        cache: folder for statistics, stored by content; None stores nothing.
        progress: called with (name of the work, parts done, parts in total).

    Raises:
        UsageError: unsupported model, method or ratio, a ratio too small to remove a unit, calibration that
            is missing or does not fit; the model is unchanged.
        FloatingPointError: NaN or infinite statistics, losses or gradients, or a refit that failed; the model
            is unchanged.
    """
    method, model, ratio = get_method(method), unwrapped(model), plain("ratio", ratio)
    steps, batch_size = plain("prune.steps", steps), plain("batch_size", batch_size)
    blocks = _checked_blocks(model, method, steps, calibration)
    before, whole, total = _parameters(model), blocks, _total(blocks)  # a cut changes the blocks' sizes
    planned = _planned_widths(method, ratio, steps, blocks)
    if planned:
        _check_scratch(model, blocks, planned[-1])
    ids = [_all_units(b) for b in blocks]
    consumers: dict[str, Consumer] = {}
    for step in range(steps):
        keep = planned[step] if planned else None
        share = _share(ratio, (step + 1) / steps, total, blocks) if steps > 1 else ratio
        statistics = statistics_for(
            model,
            method,
            share,
            calibration,
            widths=keep,
            batch_size=batch_size,
            cache=cache,
            progress=progress,
        )
        scores = plan.all_scores(model, method, blocks, statistics)
        keep = keep or plan.widths(method, share, blocks, scores, statistics)
        if step == steps - 1:
            _check_removes(keep, blocks, whole, ratio)
        cuts = plan.first_cuts(method, blocks, scores, keep)
        units, consumers = _cut_all(model, method, blocks, cuts, statistics)
        ids = [_of_these(i, units.get(b.name)) for i, b in zip(ids, blocks, strict=True)]
        blocks = parts_of(model, method)
    describe(model)
    return Pruning(
        method=method,
        ratio=ratio,
        removed_share=1 - _total(blocks) / total,
        parameters=(before, _parameters(model)),
        kept=tuple(kept_of(b, i, w.units) for b, i, w in zip(blocks, ids, whole, strict=True)),
        steps=steps,
        refits={name: consumer.record() for name, consumer in consumers.items()},
    )


def _checked_blocks(
    model: nn.Module, method: Method, steps: int, calibration: Calibration | None
) -> list[Prunable]:
    """The blocks of a model, once nothing stands against pruning them; see `prune` for the errors."""
    check_static(method)
    check_eval(model)
    check_steps(method, steps)
    if steps > 1 and isinstance(calibration, Prepared | Preparation):
        raise UsageError("more than one step needs calibration text: each step calibrates the model anew.")
    blocks = parts_of(model, method)
    check_kinds(blocks, method.blocks)
    for block in blocks:
        if isinstance(block, Block):
            check_can_cut(block)
    check_described(model)
    return blocks


def _all_units(block: Prunable) -> torch.Tensor:
    """The ids of all units of a block; of channels of experts, those of each: (experts, channels)."""
    units = torch.arange(block.units, device="cpu")
    return units.expand(block.experts, -1) if isinstance(block, Stack) and block.fine else units


def _of_these(ids: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
    """The ids of the kept ones, which are given by their places among `ids`; all for None."""
    if kept is None:
        return ids
    return ids[kept] if ids.ndim == 1 else ids.gather(1, kept)


def _share(ratio: float, progress: float, total: int, blocks: Sequence[Prunable]) -> float:
    """The share of the blocks' parameters to remove, so that `progress * ratio` of `total` is gone."""
    return max(1 - total * (1 - ratio * progress) / _total(blocks), 0.0)


def _total(blocks: Sequence[Prunable]) -> int:
    """Parameters of the blocks as they are now."""
    return sum(b.parameters for b in blocks)


def _planned_widths(
    method: Method, ratio: float, steps: int, blocks: Sequence[Prunable]
) -> list[list[int]] | None:
    """Widths after each step, where they follow from the ratio alone; else None.

    Raises `UsageError` where the last step would remove nothing, before any calibration.
    """
    rule = ALLOCATIONS[method.allocation]
    if rule.needs or rule.needs_scores:
        return None
    planned = [
        plan.widths(method, ratio * (step + 1) / steps, blocks, [], Statistics()) for step in range(steps)
    ]
    _check_removes(planned[-1], blocks, blocks, ratio)
    return planned


def _cut_all(
    model: nn.Module, method: Method, blocks: Sequence[Prunable], cuts: Sequence[Cut], statistics: Statistics
) -> tuple[dict[str, torch.Tensor], dict[str, Consumer]]:
    """Make the cuts permanent, layer by layer. Returns the ids of the kept units and the refitted consumers,
    by block name."""
    plan.check_consumers(method, blocks, cuts, statistics)
    _check_scratch(model, blocks, [c.width for c in cuts])
    units: dict[str, torch.Tensor] = {}
    consumers: dict[str, Consumer] = {}
    changes = changes_of(model)
    for layer in sorted({b.layer for b, c in zip(blocks, cuts, strict=True) if c.width < b.units}):
        here = [i for i, b in enumerate(blocks) if b.layer == layer]
        own_blocks, own_cuts = [blocks[i] for i in here], [cuts[i] for i in here]
        with opened(model, layer, changes):
            for p in plan.pruned_blocks(method, own_blocks, own_cuts, statistics):
                p.first_cut()
                assert p.first_units is not None
                units[p.block.name] = (
                    torch.arange(p.width, device="cpu") if p.first_units.is_meta else p.first_units.cpu()
                )
                p.partition.cut()
                if p.consumer is not None:
                    consumers[p.block.name] = p.consumer
            for experts in stack_cuts(method, own_blocks, own_cuts, statistics):
                units[experts.stack.name] = experts.units.cpu()
                experts.show()
                experts.shown.forget()
                if experts.consumer is not None:
                    consumers[experts.stack.name] = experts.consumer
    return units, consumers


def _check_scratch(model: nn.Module, blocks: Sequence[Prunable], keep: Sequence[int]) -> None:
    """Raise `UsageError` unless the disk takes the layers that a cut to these widths changes."""
    lost = [(b.units - k) * b.unit_parameters for b, k in zip(blocks, keep, strict=True)]
    size = 0
    for number, layer in enumerate(find_layers(model)):
        own = sum(n for b, n in zip(blocks, lost, strict=True) if b.layer == number)
        if own:
            size += (sum(p.numel() for p in layer.parameters()) - own) * next(layer.parameters()).itemsize
    check_changes(model, size)


def cut(
    model: nn.Module,
    units: Mapping[str, torch.Tensor],
    unit_kind: UnitKind = "group",
    experts: ExpertUnit = "channel",
) -> None:
    """Cut the named blocks of `model` down to these units, for good.

    Args:
        model: a supported causal LM, nothing attached.
        units: ids of the kept units by block name, LongTensor (k,), k >= 1, or (experts, k) for the channels
            of each expert; other blocks stay whole.
        unit_kind: the kind of attention units.
        experts: the kind of units of experts.
    """
    changes = changes_of(model)
    blocks = find_parts(model, unit_kind, experts)
    smaller = [b for b in blocks if b.name in units and units[b.name].shape[-1] < b.units]
    for layer, here in groupby(smaller, lambda block: block.layer):
        with opened(model, layer, changes):
            for block in here:
                if isinstance(block, Stack):
                    check_alive(block, units[block.name].shape[-1])
                    stack_cut = StackCut(block)
                    stack_cut.keep(units[block.name])
                    stack_cut.forget()
                    continue
                partition = Partition(block)
                partition.keep(units[block.name].to(block.consumer.weight.device))
                partition.cut()
    describe(model)


def check_static(method: Method) -> None:
    """Raise `UsageError` unless `method` prunes once."""
    check_untrained(method)
    if isinstance(method.when, Once):
        return
    static = ", ".join(m.name for m in METHODS.values() if m.when == Once())
    why = "it prunes anew at every batch" if method.when.every_batch else "it does not prune"
    raise UsageError(f"method {method.name!r} leaves nothing to cut for good ({why}); use one of {static}.")


def check_steps(method: Method, steps: int) -> None:
    """Raise `UsageError` for a number of steps that `method` does not support."""
    check("prune", steps=steps)
    if steps > 1 and method.budget != "parameters":
        raise UsageError(f"a budget of {method.budget} is met in one step; leave out steps.")


def _check_removes(
    keep: Sequence[int], blocks: Sequence[Prunable], whole: Sequence[Prunable], ratio: float
) -> None:
    if all(k >= b.units for k, b in zip(keep, whole, strict=True)):
        smallest = min(b.unit_parameters for b in blocks) / sum(b.parameters for b in blocks)
        raise UsageError(
            f"ratio {ratio:g} is too small to remove a single unit at these widths (the smallest unit is "
            f"{smallest:.2g} of all blocks, and widths come in steps); raise it, or lower round_to."
        )


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
