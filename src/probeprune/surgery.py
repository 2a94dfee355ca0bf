"""Surgery: prune a model once, for good. What is left is an ordinary, smaller model.

The order and the cut are those of the runtime (`plan.py`, `partition.py`); the window is made permanent.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from probeprune.calibration import stored_consumers
from probeprune.calibration.collecting import calibrate
from probeprune.calibration.damage import damages, unit_flops, unit_nanoseconds
from probeprune.calibration.gradients import Criterion, saliences
from probeprune.calibration.refit import refit
from probeprune.calibration.sensitivity import sensitivities
from probeprune.calibration.statistics import Statistics
from probeprune.errors import UsageError
from probeprune.files import cached_tensors
from probeprune.methods import METHODS, Method, check_untrained, get_method
from probeprune.model.blocks import Block, UnitKind, find_blocks
from probeprune.model.partition import Partition, check_can_cut
from probeprune.model.passes import check_eval
from probeprune.plan import Kept, Scores, check_finite, check_statistics, static_scores, widths
from probeprune.progress import Progress, silent
from probeprune.provenance import content_key
from probeprune.strategies import allocation
from probeprune.strategies.compensation import Consumer, Refit, lost_bias

_FORMAT = 3
DAMAGE_WINDOWS = 32
"""Calibration windows that damages are measured on, the first ones: curves need fewer than a refit."""


@dataclass(frozen=True)
class Pruning:
    """What was done to a model."""

    method: Method
    ratio: float
    """Asked for: share of the parameters of all blocks."""
    removed_share: float
    """Reached."""
    parameters: tuple[int, int]
    """Of the whole model, tied ones once: before, after."""
    kept: tuple[Kept, ...]
    """Of every block, by ids in the model as it was given."""
    steps: int = 1
    refits: dict[str, dict[str, float]] = field(default_factory=dict)
    """By block name what the refit of its consumer gave (`compensation.Consumer`), in the last step."""

    def record(self) -> dict[str, Any]:
        """All of it as JSON has it: what pruning.json keeps."""
        return {
            "method": self.method.record(),
            "ratio": self.ratio,
            "removed_share": self.removed_share,
            "parameters": list(self.parameters),
            "steps": self.steps,
            "kept": {k.name: {"units": list(k.units), "of": k.of} for k in self.kept},
            "refits": self.refits,
        }


def prune(
    model: nn.Module,
    method: str | Method,
    ratio: float,
    *,
    calibration: torch.Tensor | None = None,
    statistics: Statistics | None = None,
    steps: int = 1,
    batch_size: int = 16,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Pruning:
    """Cut units out of `model`, in place and for good; `save` writes what is left.

    Example:
        >>> probeprune.prune(model, "flap", ratio=0.2, calibration=windows)
        >>> probeprune.save(model, "out/", tokenizer=tokenizer)

    Args:
        model: a transformers causal LM of a supported family, in eval mode, nothing attached.
        method: a static one: a name from `METHODS`, or a `Method`. `evenly(method)` gives all layers one
            width, so that the checkpoint opens with plain transformers.
        ratio: share of the parameters of all blocks to remove, in (0, 1); of the method's budget, where it
            has another.
        calibration: windows of token ids (count, length), where the method needs statistics, gradients or a
            refit.
            Gradients are taken on the first `method.gradients.windows` of them and their first
            `method.gradients.length` tokens.
        statistics: instead of `calibration`, collected on this very model; for one step only.
        steps: the ratio is reached in this many equal steps, calibrated anew before each (LLM-Pruner's
            iterative pruning). An error in a later step leaves the model as the steps before made it.
        batch_size: windows a forward pass of calibration.
        cache: a folder to keep statistics in, by content; None keeps nothing.
        progress: called with (what, windows done, windows in all).

    Raises:
        UsageError: unsupported model, method or ratio, a ratio too small to remove a unit, missing or
            unfitting calibration; nothing has been changed.
        FloatingPointError: NaN or infinite statistics, losses or gradients, or a refit that failed; likewise.
    """
    method = get_method(method)
    allocation.check_ratio(ratio)
    check_static(method)
    check_eval(model)
    check_steps(method, steps)
    if steps > 1 and statistics is not None:
        raise UsageError("more than one step needs calibration=, not statistics=.")
    blocks = find_blocks(model, method.units)
    for block in blocks:
        check_can_cut(block)
    before = _parameters(model)
    total = sum(b.parameters for b in blocks)
    whole = [b.units for b in blocks]
    ids = [torch.arange(n) for n in whole]
    shares = [ratio * (i + 1) / steps for i in range(steps)]
    planned = None
    if method.allocation != "global" and not method.needs_damages:  # widths follow from the ratio alone
        planned = [widths(method, share, blocks, []) for share in shares]
        _check_removes(planned[-1], blocks, whole, ratio)
    consumers: dict[str, Consumer] = {}
    for step, share in enumerate(shares):
        known = statistics
        if known is None and method.needs_calibration:
            known = _collect(model, method, calibration, batch_size, cache, progress)
        known = check_statistics(method, blocks, known)
        scores = _scores(method, blocks, known)
        if planned is not None:
            keep = planned[step]
        else:
            left = sum(b.parameters for b in blocks)
            keep = widths(method, max(1 - total * (1 - share) / left, 0.0), blocks, scores, known)
        if step == steps - 1:
            _check_removes(keep, blocks, whole, ratio)
        chosen = _choose(blocks, keep, scores)
        if method.refit is not None:
            if statistics is None:
                assert calibration is not None
                found = _refit(model, method, chosen, calibration, batch_size, cache, progress or silent)
                known = replace(known, consumers=found)
            consumers = {b.name: known.check_consumer(b, chosen[b.name]) for b in blocks if b.name in chosen}
        for i, block in enumerate(blocks):
            if block.name in chosen:
                consumer, which = consumers.get(block.name), chosen[block.name]
                if isinstance(which, torch.Tensor):
                    units = which
                else:
                    assert consumer is not None
                    units = consumer.units
                _cut(method, block, units, known, consumer)
                ids[i] = ids[i][units.cpu()]
        blocks = find_blocks(model, method.units)
    return Pruning(
        method=method,
        ratio=ratio,
        removed_share=1 - sum(b.parameters for b in blocks) / total,
        parameters=(before, _parameters(model)),
        kept=tuple(
            Kept(b.name, b.kind, tuple(u.tolist()), n) for b, u, n in zip(blocks, ids, whole, strict=True)
        ),
        steps=steps,
        refits={name: consumer.record() for name, consumer in consumers.items()},
    )


def cut(model: nn.Module, kept: Mapping[str, torch.Tensor], units: UnitKind = "group") -> None:
    """Cut the named blocks of `model` down to these units, for good.

    Args:
        model: a supported causal LM, nothing attached.
        kept: by block name the ids that stay, LongTensor (k,), k >= 1; other blocks stay whole.
        units: what an attention unit is.
    """
    for block in find_blocks(model, units):
        if block.name in kept and len(kept[block.name]) < block.units:
            partition = Partition(block)
            partition.keep(kept[block.name].to(block.consumer.weight.device))
            partition.cut()


def check_static(method: Method) -> None:
    """Raise `UsageError` unless `method` prunes once."""
    check_untrained(method)
    if method.when == "once":
        return
    static = ", ".join(m.name for m in METHODS.values() if m.when == "once" and m.training == "none")
    why = "it prunes anew at every batch" if method.when == "batch" else "it does not prune"
    raise UsageError(f"method {method.name!r} leaves nothing to cut for good ({why}); use one of {static}.")


def check_steps(method: Method, steps: int) -> None:
    """Raise `UsageError` for a number of steps in which `method` cannot prune."""
    if steps < 1:
        raise UsageError("steps must be at least 1.")
    if steps > 1 and method.budget != "parameters":
        raise UsageError(f"a budget of {method.budget} is met in one step; leave out steps.")


def _collect(
    model: nn.Module,
    method: Method,
    windows: torch.Tensor | None,
    batch_size: int,
    cache: Path | None,
    progress: Progress | None,
) -> Statistics:
    if windows is None:
        raise UsageError(f"method {method.name!r} needs calibration=, windows of token ids (count, length).")
    report = progress or (lambda what, done, of: None)
    found = Statistics()
    if method.needs_gradients:
        found = Statistics(
            saliences=method_saliences(
                model, method, windows, cache=cache, progress=lambda n, of: report("gradients", n, of)
            )
        )
    if method.needs_moments:
        moments = calibrate(
            model,
            windows,
            batch_size=batch_size,
            cache=cache,
            progress=lambda n, of: report("calibration", n, of),
        ).moments
        found = replace(found, moments=moments)
    if method.needs_damages:
        found = replace(
            found, damages=method_damages(model, method, windows, batch_size, cache, progress or silent)
        )
    return found


def method_damages(
    model: nn.Module,
    method: Method,
    windows: torch.Tensor,
    batch_size: int = 16,
    cache: Path | None = None,
    progress: Progress = silent,
) -> dict[str, allocation.Damage]:
    """What `method` allocates by, for `Statistics.damages`; arguments as in `method_consumers`."""
    curves = _damage_curves(model, method, windows, batch_size, cache, progress)
    blocks = find_blocks(model, method.units)
    if method.budget == "flops":
        savings = unit_flops(blocks, windows.shape[1])
    elif method.budget == "time":
        ids = windows[:batch_size].to(next(model.parameters()).device)
        savings = unit_nanoseconds(model, blocks, ids)
    else:
        savings = [b.unit_parameters for b in blocks]
    counted = method.budget == "parameters"  # a block has some that belong to no unit
    return {
        b.name: allocation.Damage(curves[b.name], saving, b.parameters if counted else b.units * saving)
        for b, saving in zip(blocks, savings, strict=True)
    }


def _damage_curves(
    model: nn.Module,
    method: Method,
    windows: torch.Tensor,
    batch_size: int,
    cache: Path | None,
    progress: Progress,
) -> dict[str, torch.Tensor]:
    how = method.refit or Refit()
    looked_at, damping = max(how.sensitivity, 1), how.damping[0]
    path = None
    if cache is not None:
        settings = (looked_at, damping, method.units, method.seed)
        used = windows[: max(DAMAGE_WINDOWS, looked_at)]
        path = cache / f"{content_key(model, used, 'damages', _FORMAT, *settings)}.safetensors"

    def measure() -> dict[str, torch.Tensor]:
        return damages(
            model,
            windows[:DAMAGE_WINDOWS],
            sensitivities(model, windows[:looked_at], seed=method.seed, cache=cache, progress=progress),
            units=method.units,
            damping=damping,
            batch_size=batch_size,
            progress=progress,
        )

    return cached_tensors(path, measure)


def method_saliences(
    model: nn.Module,
    method: Method,
    windows: torch.Tensor,
    *,
    cache: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, torch.Tensor]:
    """The saliences `method` scores by, on the first of these windows, as many and as long as it wants.

    Raises `UsageError` for windows that are fewer or shorter, and what `gradients.saliences` raises.
    """
    want = method.gradients
    assert want is not None
    if len(windows) < want.windows or windows.shape[1] < want.length:
        raise UsageError(
            f"method {method.name!r} takes gradients on {want.windows} windows of {want.length} tokens, and "
            f"calibration has {len(windows)} of {windows.shape[1]}; give more, or compose the method with "
            "gradients=Gradients(windows=..., length=...)."
        )
    return saliences(
        model,
        windows[: want.windows, : want.length],
        cast(Criterion, method.importance),
        rank=want.rank,
        draws=want.draws,
        seed=method.seed,
        cache=cache,
        progress=progress,
    )


def method_consumers(
    model: nn.Module,
    method: str | Method,
    ratio: float,
    windows: torch.Tensor,
    *,
    statistics: Statistics | None = None,
    batch_size: int = 16,
    cache: Path | None = None,
    progress: Progress = silent,
) -> dict[str, Consumer]:
    """The consumers of `model` refitted to what `method` keeps at that ratio, for `Statistics.consumers`.

    With them `attach` and `prune` need no windows, however often they are called.

    Example:
        >>> consumers = method_consumers(model, method, 0.4, windows, statistics=statistics)
        >>> with attach(model, method, 0.4, statistics=replace(statistics, consumers=consumers)):
        ...     model(**batch)

    Args:
        model, windows, batch_size, progress: as in `refit.refit`.
        method: one with `compensation="least-squares"`.
        ratio: share of the parameters of all blocks to remove.
        statistics: what else the method needs.
        cache: a folder to keep results in, by content; None keeps nothing.

    Raises what `refit.refit` raises, and `UsageError` for another method or missing statistics.
    """
    method = get_method(method)
    check_untrained(method)
    if method.refit is None:
        raise UsageError(f"method {method.name!r} refits nothing; compose it with a refit=Refit().")
    blocks = find_blocks(model, method.units)
    known = statistics
    scored = not method.refit_orders
    if method.needs_damages or (scored and (method.needs_moments or method.needs_gradients)):
        known = check_statistics(method, blocks, statistics)
    scores = _scores(method, blocks, known or Statistics())
    chosen = _choose(blocks, widths(method, ratio, blocks, scores, known), scores)
    return _refit(model, method, chosen, windows, batch_size, cache, progress)


def _refit(
    model: nn.Module,
    method: Method,
    chosen: Mapping[str, torch.Tensor | int],
    windows: torch.Tensor,
    batch_size: int,
    cache: Path | None,
    progress: Progress,
) -> dict[str, Consumer]:
    """Consumers refitted to these units, or to as many of the refit's own choice."""
    how, metrics, path = method.refit, None, None
    assert how is not None
    windows = windows[: how.windows]
    if cache is not None:
        which = {name: w if isinstance(w, int) else w.tolist() for name, w in chosen.items()}
        fitted = asdict(how)
        del fitted["batch_share"]  # of no effect until a batch comes
        settings = (fitted, which, method.units, method.seed, method.when == "batch")
        key = content_key(model, windows, "consumers", _FORMAT, *settings)
        path = cache / f"{key}.safetensors"
        stored = stored_consumers.read(path)
        if stored is not None:
            return stored
    if how.sensitivity and any(isinstance(which, int) for which in chosen.values()):
        metrics = sensitivities(
            model, windows[: how.sensitivity], seed=method.seed, cache=cache, progress=progress
        )
    found = refit(
        model,
        chosen,
        windows,
        how,
        units=method.units,
        metrics=metrics,
        following=method.when == "batch",
        batch_size=batch_size,
        progress=progress,
    )
    if path is not None:
        stored_consumers.store(path, found)
    return found


def _choose(
    blocks: Sequence[Block], keep: Sequence[int], scores: Sequence[Scores | None]
) -> dict[str, torch.Tensor | int]:
    """By block name, for blocks that lose units, the ids that stay, ascending; how many, without scores."""

    def which(block: Block, keep: int, scores: Scores | None) -> torch.Tensor | int:
        if scores is None:
            return keep
        # Without weights (shapes only) it makes no difference which units stay.
        return torch.arange(keep) if scores.is_meta else allocation.choose_units(scores, keep, block)

    return {b.name: which(b, k, s) for b, k, s in zip(blocks, keep, scores, strict=True) if k < b.units}


def _scores(method: Method, blocks: Sequence[Block], statistics: Statistics) -> list[Scores | None]:
    """Of every block; None where the refit makes the order."""
    found = [static_scores(method, b, statistics) for b in blocks]
    for block, scores in zip(blocks, found, strict=True):
        if scores is not None:
            check_finite(scores, block)
    return found


def _cut(
    method: Method, block: Block, units: torch.Tensor, statistics: Statistics, consumer: Consumer | None
) -> None:
    """Cut one block down to these units."""
    partition = Partition(block)
    mean = None
    if method.compensation == "bias":
        mean = statistics.moments[block.name].mean.to(units.device).clone()
        partition.followers.append(mean)
    partition.keep(units)
    if mean is not None:
        partition.add_bias(lost_bias(partition.consumer_weight, mean, len(units) * block.unit_width))
    if consumer is not None:
        partition.replace_consumer(consumer.weight, consumer.bias)
    partition.cut()


def _check_removes(keep: Sequence[int], blocks: Sequence[Block], whole: Sequence[int], ratio: float) -> None:
    if all(k >= n for k, n in zip(keep, whole, strict=True)):
        smallest = min(b.unit_parameters for b in blocks) / sum(b.parameters for b in blocks)
        raise UsageError(
            f"ratio {ratio:g} is too small to remove a single unit at these widths (the smallest unit is "
            f"{smallest:.2g} of all blocks, and widths come in steps); raise it, or lower round_to."
        )


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
