"""Calibration: run windows of text through the dense model and collect every block's statistics.

Cached by content (the model's weights, the windows, the settings) and resumable: a run that is killed goes
on from its last part. Knows nothing of methods: one calibration serves them all.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from probeprune.algebra.moments import OWN_POSITIONS, Moments
from probeprune.calibration.statistics import Statistics
from probeprune.data.windows import batches
from probeprune.errors import UsageError
from probeprune.files import load_tensors, save_tensors
from probeprune.model.blocks import find_blocks
from probeprune.model.passes import Pass, check_eval, check_windows, find_decoder, on_pass
from probeprune.provenance import content_key

_FORMAT = 1
_SAVE_EVERY = 30.0
"""Seconds between two parts written to disk."""


@contextmanager
def collecting(model: nn.Module, own_positions: int = OWN_POSITIONS) -> Iterator[Statistics]:
    """Collect statistics from every forward pass of the dense model inside the context.

    Padding is read off the attention mask that a pass is given.
    """
    blocks = find_blocks(model)
    statistics = Statistics(
        {b.name: Moments(b.width, own_positions, b.consumer.weight.device) for b in blocks}
    )
    state: list[Pass] = []

    def run(now: Pass, forward: Callable[[], Any]) -> Any:
        if now.continues:
            raise UsageError("calibration runs whole sequences; call the model without a filled KV cache.")
        state[:] = [now]
        return forward()

    def observe(moments: Moments) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            tokens = state[0].tokens
            moments.update(args[0].view(tokens.batch, tokens.length, -1), tokens)

        return hook

    undo = [on_pass(model, run)]
    for block in blocks:
        hook = block.consumer.register_forward_pre_hook(observe(statistics.moments[block.name]))
        undo.append(hook.remove)
    try:
        yield statistics
    finally:
        for step in undo:
            step()


def calibrate(
    model: nn.Module,
    windows: torch.Tensor,
    *,
    batch_size: int = 16,
    own_positions: int = OWN_POSITIONS,
    cache: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Statistics:
    """Statistics of `model` on `windows` (count, length) of token ids.

    Args:
        model: a supported causal LM, in eval mode, nothing attached.
        windows: LongTensor, from `data.calibration_windows` say.
        batch_size: windows a forward pass.
        own_positions: first positions of a sequence whose energy is kept apart (the window length is the
            paper's choice).
        cache: a folder to keep results in; the same model and windows are then read back, and a broken run
            goes on. None keeps nothing.
        progress: called with (windows done, windows in all).

    Raises `UsageError` for windows longer than the model's positions or a model in training mode.
    """
    check_windows(model, windows)
    check_eval(model, "calibration needs")
    key = None if cache is None else content_key(model, windows, "moments", _FORMAT, own_positions)
    path = None if cache is None else cache / f"{key}.safetensors"
    done, statistics = _load(path)
    report = progress or (lambda done, total: None)
    report(done, len(windows))
    if done == len(windows):
        assert statistics is not None
        return statistics
    device = next(model.parameters()).device
    decoder = find_decoder(model)
    saved = time.monotonic()
    with collecting(model, own_positions) as fresh, torch.inference_mode():
        if statistics is not None:
            fresh.merge(Statistics({n: m.to(device) for n, m in statistics.moments.items()}))
        for batch in batches(windows[done:], batch_size):
            decoder(input_ids=batch.to(device), use_cache=False)
            done += len(batch)
            report(done, len(windows))
            if path is not None and (done == len(windows) or time.monotonic() - saved > _SAVE_EVERY):
                _save(path, fresh, done)
                saved = time.monotonic()
    # Collected under inference mode; clones are ordinary tensors again.
    result = {
        n: Moments.from_state({k: t.clone() for k, t in m.state().items()}) for n, m in fresh.moments.items()
    }
    return Statistics(result)


def _save(path: Path, statistics: Statistics, done: int) -> None:
    tensors = {
        f"{name}/{key}": value
        for name, moments in statistics.moments.items()
        for key, value in moments.state().items()
    }
    save_tensors(path, tensors, {"done": str(done)})


def _load(path: Path | None) -> tuple[int, Statistics | None]:
    """Windows done and their statistics, or (0, None)."""
    found = None if path is None else load_tensors(path)
    if found is None:
        return 0, None
    states: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in found[0].items():
        name, _, part = key.rpartition("/")
        states.setdefault(name, {})[part] = value
    try:
        return int(found[1]["done"]), Statistics({n: Moments.from_state(s) for n, s in states.items()})
    except (KeyError, TypeError, ValueError):
        return 0, None
