"""`attach` a method to a model, and `detach` it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from probeprune import plan
from probeprune.algebra.precision import exact
from probeprune.data.windows import BATCH_SIZE
from probeprune.errors import UsageError
from probeprune.methods import Method, check_untrained, get_method
from probeprune.model.experts import Stack, check_kinds
from probeprune.model.multimodal import text_config
from probeprune.model.offloading import is_offloaded
from probeprune.model.passes import check_eval
from probeprune.model.wrappers import unwrapped
from probeprune.prepare import Calibration, statistics_for, text_of
from probeprune.progress import Progress, silent
from probeprune.ranges import plain
from probeprune.runtime.attachment import Attachment
from probeprune.runtime.compiled import check_compilable
from probeprune.runtime.handle import HANDLE, Handle
from probeprune.runtime.measuring import costs_for
from probeprune.runtime.offloaded import OffloadedHandle
from probeprune.strategies.account import Costs
from probeprune.strategies.pruned_block import Cut
from probeprune.strategies.widths import Prunable


@exact()
def attach(
    model: nn.Module,
    method: str | Method,
    ratio: float = 0.0,
    *,
    calibration: Calibration | None = None,
    batch_size: int = BATCH_SIZE,
    cache: Path | None = None,
    progress: Progress = silent,
    costs: Costs | None = None,
    compile: bool = False,
) -> Handle:
    """Prune `model` while it runs, until the handle is detached.

    Example:
        >>> with probeprune.attach(model, "best-dynamic", ratio=0.4, calibration=windows):
        ...     model(**batch)

    Args:
        model: a transformers causal LM of a supported family, in eval mode, with sdpa or eager attention
            for dynamic methods. Its weights are permuted in place; `detach` restores them. Under a dynamic
            method, passes from several threads run one after the other.
        method: a name from `METHODS`, or a `Method`.
        ratio: share of the method's budget (by default the parameters of all blocks) to prune, in [0, 1).
        calibration: windows of token ids (count, length) or a `WindowSource`, where the method needs
            calibration; or the result of `prepare` for this model, method and ratio.
        batch_size, cache, progress: as in `prepare`, for calibration from text.
        costs: what batches cost, for a method whose probe has `pays="auto"`: `handle.costs` of an earlier run
            repeats its decisions. None: measured on this machine, once, and kept in probeprune's cache.
        compile: whether decoder layers run compiled, one by one, by `torch.compile` (docs/speed.md). The
            first passes of a shape take as long as compiling does.

    Raises:
        UsageError: unsupported model, method, ratio or calibration; a model in training mode, or one that
            already has a method attached; `compile` for a model that cannot be compiled here.
        FloatingPointError: NaN or infinite statistics.
    """
    if compile:
        check_compilable(model)
    method, model = get_method(method), unwrapped(model)
    check_untrained(method)
    ratio, batch_size = plain("ratio", ratio), plain("batch_size", batch_size)
    blocks = _checked_blocks(model, method)
    statistics = statistics_for(
        model, method, ratio, calibration, batch_size=batch_size, cache=cache, progress=progress
    )
    scores = plan.all_scores(model, method, blocks, statistics)
    keep = plan.widths(method, ratio, blocks, scores, statistics)
    cuts = plan.first_cuts(method, blocks, scores, keep)
    plan.check_consumers(method, blocks, cuts, statistics)
    kept = Attachment(method, ratio, cuts, statistics, text_of(calibration), costs)
    return _handle(model, kept, blocks, compile)


@exact()
def attach_again(model: nn.Module, kept: Attachment, *, compile: bool = False) -> Handle:
    """Attach what was attached before, to the same model or to one of the same weights.

    Nothing is calibrated or chosen anew, so the result is the same on any device and in any dtype. `compile`
    is as in `attach`.

    Raises `UsageError` as `attach` does, and for an attachment that does not fit the model's blocks.
    """
    if compile:
        check_compilable(model)
    model, method = unwrapped(model), kept.method
    check_untrained(method)
    blocks = _checked_blocks(model, method)
    if len(blocks) != len(kept.cuts):
        raise UsageError(f"the method was attached to a model of {len(kept.cuts)} blocks, not {len(blocks)}.")
    for block, cut in zip(blocks, kept.cuts, strict=True):
        _check_cut(block, cut)
    if plan.needs(method):
        kept.statistics.check(plan.needs(method), blocks)
    plan.check_consumers(method, blocks, kept.cuts, kept.statistics)
    return _handle(model, kept, blocks, compile)


def _check_cut(block: Prunable, cut: Cut) -> None:
    """Raise `UsageError` unless a block can be cut so."""
    fits = block.least <= cut.width <= block.units
    own: list[list[int]] = []
    if cut.units is not None and cut.units.ndim == 2:  # of each expert
        fits = fits and isinstance(block, Stack) and block.fine and len(cut.units) == block.experts
        own = cut.units.tolist()
    elif cut.units is not None:
        own = [cut.units.tolist()]
    elif isinstance(block, Stack):  # with channels that a refit chose
        fits = fits and (block.fine or cut.width == block.units)
    for units in own:
        fits = (
            fits and len(units) == cut.width and units == sorted({u for u in units if 0 <= u < block.units})
        )
    if not fits:
        raise UsageError(f"the units that the method keeps of {block.name} are none of its {block.units}.")


def _checked_blocks(model: nn.Module, method: Method) -> list[Prunable]:
    """The blocks of a model, once nothing stands against attaching a method; see `attach` for the errors."""
    check_eval(model)
    if HANDLE in model.__dict__:
        raise UsageError(
            "this model already has a method attached; detach it first: probeprune.detach(model)."
        )
    blocks = plan.parts_of(model, method)
    check_kinds(blocks, method.blocks)
    if method.when.every_batch and _attention(model) not in ("sdpa", "eager"):
        raise UsageError("probing needs sdpa or eager attention; load the model with one of them.")
    return blocks


def _handle(model: nn.Module, kept: Attachment, blocks: Sequence[Prunable], compile: bool) -> Handle:
    kind = OffloadedHandle if is_offloaded(model) else Handle
    with torch.inference_mode(False), torch.no_grad():  # inference tensors cannot be written outside
        return kind(model, kept, blocks, costs_for(model, kept, blocks), compile)


def detach(model: nn.Module) -> None:
    """Detach the method that is attached to `model`, if any; for use without its handle."""
    handle = unwrapped(model).__dict__.get(HANDLE)
    if handle is not None:
        handle.detach()


def attached_to(model: nn.Module) -> Handle | None:
    """The handle of the method that is attached to a model; None for a model without one."""
    handle: Handle | None = unwrapped(model).__dict__.get(HANDLE)
    return handle


def _attention(model: nn.Module) -> str:
    config: Any = text_config(model.config)
    return str(config._attn_implementation)
