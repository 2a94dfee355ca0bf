"""Collecting: run windows of text through the dense model and collect the moments of every block.

Results are cached by content (the model's weights, the windows, the settings), and a run that was killed
continues from its last part. Knows nothing of methods: one calibration serves them all.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from probeprune.algebra.moments import OWN_POSITIONS, Moments
from probeprune.calibration import stored
from probeprune.data.windows import batches
from probeprune.errors import UsageError
from probeprune.model.blocks import find_blocks, uncalled_consumer
from probeprune.model.forwards import temporary_hooks
from probeprune.model.passes import Pass, check_eval, find_decoder, on_pass, token_windows
from probeprune.model.wrappers import unwrapped
from probeprune.progress import Progress, silent
from probeprune.provenance import content_key

_FORMAT = 2
_SAVE_EVERY = 30.0
"""Minimum number of seconds between two writes to disk."""


@contextmanager
def collecting(model: nn.Module, own_positions: int = OWN_POSITIONS) -> Iterator[dict[str, Moments]]:
    """Collect moments, by block name, from every forward pass of the dense model inside the context.

    Padding is read from the attention mask of the pass. Raises `UsageError` for a pass that continues a KV
    cache, or in which a block's consumer is not called.
    """
    blocks = find_blocks(model)
    moments = {b.name: Moments(b.width, own_positions, b.consumer.weight.device) for b in blocks}
    current: list[Pass] = []
    called: set[str] = set()

    def run(started: Pass, forward: Callable[[], Any]) -> Any:
        if started.continues:
            raise UsageError("calibration runs whole sequences; call the model without a filled KV cache.")
        current[:] = [started]
        called.clear()
        output = forward()
        for block in blocks:
            if block.name not in called:
                raise uncalled_consumer(block)
        return output

    def observe(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            tokens = current[0].tokens
            called.add(name)
            moments[name].update(args[0].view(tokens.batch, tokens.length, -1), tokens)

        return hook

    hooks = (b.consumer.register_forward_pre_hook(observe(b.name)) for b in blocks)
    stop = on_pass(model, run)
    try:
        with temporary_hooks(hooks):
            yield moments
    finally:
        stop()


def calibrate(
    model: nn.Module,
    windows: torch.Tensor,
    *,
    batch_size: int = 16,
    own_positions: int = OWN_POSITIONS,
    cache: Path | None = None,
    progress: Progress = silent,
) -> dict[str, Moments]:
    """Moments of every block of `model`, by block name, on `windows` (count, length) of token ids.

    Args:
        model: a supported causal LM, in eval mode, nothing attached.
        windows: LongTensor, for instance from `data.windows.calibration_windows`.
        batch_size: windows per forward pass.
        own_positions: number of first positions with an energy of their own (the paper: all).
        cache: folder for results, stored by content; a run that was killed continues. None stores nothing.
        progress: called with ("calibration", windows done, windows in total).

    Raises `UsageError` for windows longer than the model's positions or a model in training mode.
    """
    model = unwrapped(model)
    windows = token_windows(model, windows)
    check_eval(model, "calibration needs")
    key = None if cache is None else content_key(model, windows, "moments", _FORMAT, own_positions)
    path = None if cache is None else cache / f"{key}.safetensors"
    before: dict[str, Moments] = {}
    done, entry = 0, stored.read(path, "moments")
    if entry is not None and isinstance(entry[1].get("done"), int):
        before, done = entry[0], entry[1]["done"]
    progress("calibration", done, len(windows))
    if done == len(windows):
        return before
    device = next(model.parameters()).device
    decoder = find_decoder(model)
    saved = time.monotonic()
    with collecting(model, own_positions) as moments, torch.inference_mode():
        merge(moments, {n: m.to(device) for n, m in before.items()})
        for batch in batches(windows[done:], batch_size):
            decoder(input_ids=batch.to(device), use_cache=False)
            done += len(batch)
            progress("calibration", done, len(windows))
            if path is not None and (done == len(windows) or time.monotonic() - saved > _SAVE_EVERY):
                stored.store(path, "moments", moments, done=done)
                saved = time.monotonic()
    # Collected under inference mode; clones are ordinary tensors.
    return {n: Moments.from_state({k: t.clone() for k, t in m.state().items()}) for n, m in moments.items()}


def merge(moments: dict[str, Moments], others: dict[str, Moments]) -> None:
    """Add to `moments` those of other text on the same model, for example from another process."""
    for name, other in others.items():
        moments[name].merge(other)
