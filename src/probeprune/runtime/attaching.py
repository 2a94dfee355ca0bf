"""`attach` a method to a model, and `detach` it."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from probeprune import plan
from probeprune.algebra.precision import exact
from probeprune.data.windows import BATCH_SIZE
from probeprune.errors import UsageError
from probeprune.methods import Method, check_untrained, get_method
from probeprune.model.blocks import check_kinds, find_blocks
from probeprune.model.multimodal import text_config
from probeprune.model.offloading import is_offloaded
from probeprune.model.passes import check_eval
from probeprune.model.wrappers import unwrapped
from probeprune.prepare import Calibration, statistics_for
from probeprune.progress import Progress, silent
from probeprune.ranges import plain
from probeprune.runtime.handle import HANDLE, Handle
from probeprune.runtime.offloaded import OffloadedHandle


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

    Raises:
        UsageError: unsupported model, method, ratio or calibration; a model in training mode, or one that
            already has a method attached.
        FloatingPointError: NaN or infinite statistics.
    """
    method, model = get_method(method), unwrapped(model)
    check_untrained(method)
    ratio, batch_size = plain("ratio", ratio), plain("batch_size", batch_size)
    check_eval(model)
    if HANDLE in model.__dict__:
        raise UsageError(
            "this model already has a method attached; detach it first: probeprune.detach(model)."
        )
    blocks = find_blocks(model, method.unit_kind)
    check_kinds(blocks, method.blocks)
    if method.when.every_batch and _attention(model) not in ("sdpa", "eager"):
        raise UsageError("probing needs sdpa or eager attention; load the model with one of them.")
    statistics = statistics_for(
        model, method, ratio, calibration, batch_size=batch_size, cache=cache, progress=progress
    )
    scores = plan.all_scores(model, method, blocks, statistics)
    keep = plan.widths(method, ratio, blocks, scores, statistics)
    cuts = plan.first_cuts(method, blocks, scores, keep)
    plan.check_consumers(method, blocks, cuts, statistics)
    kind = OffloadedHandle if is_offloaded(model) else Handle
    with torch.inference_mode(False), torch.no_grad():  # inference tensors cannot be written outside
        return kind(model, method, ratio, blocks, cuts, statistics)


def detach(model: nn.Module) -> None:
    """Detach the method that is attached to `model`, if any; for use without its handle."""
    handle = unwrapped(model).__dict__.get(HANDLE)
    if handle is not None:
        handle.detach()


def _attention(model: nn.Module) -> str:
    config: Any = text_config(model.config)
    return str(config._attn_implementation)
