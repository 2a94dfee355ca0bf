"""Calibration: run windows of text through the dense model and collect every block's statistics.

Cached by content (the model's weights, the windows, the settings) and resumable: a run that is killed goes
on from its last part. Knows nothing of methods: one calibration serves them all.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from probeprune.allocation import Damage
from probeprune.blocks import Block, find_blocks
from probeprune.compensation import Consumer
from probeprune.data import batches
from probeprune.errors import UsageError
from probeprune.passes import Pass, check_eval, find_decoder, on_pass
from probeprune.statistics import OWN_POSITIONS, Moments

_FORMAT = 1
_SAVE_EVERY = 30.0
"""Seconds between two parts written to disk."""


@dataclass(frozen=True)
class Statistics:
    """What calibration found out about a model's blocks; methods say which part they need."""

    moments: dict[str, Moments] = field(default_factory=dict)
    """Of every block's coupled activation, by block name (`calibrate`)."""
    saliences: dict[str, torch.Tensor] = field(default_factory=dict)
    """Of every row or column of the blocks' linear maps, by their name (`gradients.saliences`)."""
    damages: dict[str, Damage] = field(default_factory=dict)
    """Of every block, by its name (`surgery.method_damages`)."""
    consumers: dict[str, Consumer] = field(default_factory=dict)
    """Refitted to what one method keeps at one ratio, by block name (`surgery.method_consumers`)."""

    def check_moments(self, blocks: Sequence[Block]) -> None:
        """Raise `UsageError` unless these are moments of such blocks, and `FloatingPointError` for NaN."""
        for block in blocks:
            moments = self.moments.get(block.name)
            if moments is None or len(moments.mean) != block.width:
                raise UsageError(
                    f"the statistics do not fit {block.name}; they are of another model: calibrate this one."
                )
            if not all(bool(torch.isfinite(t).all()) for t in moments.state().values()):
                raise FloatingPointError(
                    f"calibration gave NaN or infinite statistics in {block.name}; use float32 or bfloat16."
                )

    def check_saliences(self, blocks: Sequence[Block]) -> None:
        """Likewise for saliences."""
        for m in (m for block in blocks for m in block.members):
            found = self.saliences.get(m.name)
            if found is None or len(found) != m.linear.weight.shape[m.axis]:
                raise UsageError(
                    f"there are no saliences that fit {m.name}; take them of this model with "
                    "probeprune.gradients.saliences."
                )
            if not torch.isfinite(found).all():
                raise FloatingPointError(f"the saliences of {m.name} are NaN or infinite.")

    def check_damages(self, blocks: Sequence[Block]) -> None:
        """Raise `UsageError` unless these are the damages of such blocks."""
        for block in blocks:
            found = self.damages.get(block.name)
            if found is None or found.curve.shape != (block.units + 1,):
                raise UsageError(
                    f"the statistics do not know what a cut of {block.name} would cost; collect the damages "
                    "on this very model: probeprune.surgery.method_damages."
                )

    def check_consumer(self, block: Block, keep: torch.Tensor | int) -> Consumer:
        """The block's refitted consumer. Raises `UsageError` unless it is refitted to these units, or to so
        many where the refit chose them."""
        found = self.consumers.get(block.name)
        count = keep if isinstance(keep, int) else len(keep)
        fits = found is not None and len(found.units) == count
        if found is not None and not isinstance(keep, int):
            fits = found.units.equal(keep.cpu())
        if found is None or not fits or found.weight.shape[1] != count * block.unit_width:
            raise UsageError(
                f"there is no consumer of {block.name} refitted to the units it keeps; refit with this "
                "model, method and ratio: probeprune.surgery.method_consumers."
            )
        return found

    def merge(self, other: "Statistics") -> None:
        """Take in statistics of other text on the same model (another process's share, say)."""
        for name, moments in self.moments.items():
            moments.merge(other.moments[name])


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


def check_windows(model: nn.Module, windows: torch.Tensor) -> None:
    """Raise `UsageError` where windows are longer than the model has positions."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and windows.shape[1] > limit:
        raise UsageError(
            f"windows of {windows.shape[1]} tokens are longer than the model's {limit} positions; "
            f"use windows of at most {limit}."
        )


def content_key(model: nn.Module, windows: torch.Tensor, *settings: object) -> str:
    """A name for what these settings give on this model and these windows."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps([*settings, list(windows.shape)]).encode())
    digest.update(windows.contiguous().numpy().tobytes())
    digest.update(model_fingerprint(model).encode())
    return digest.hexdigest()


def model_fingerprint(model: nn.Module) -> str:
    """A hash of all weights (names, types and bytes) and of the config fields that change the function."""
    digest = hashlib.blake2b(digest_size=16)
    config = {k: v for k, v in model.config.to_dict().items() if not k.startswith("_")}  # type: ignore[operator,union-attr]
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, p in model.named_parameters():
        digest.update(f"{name}{p.dtype}{tuple(p.shape)}".encode())
        digest.update(p.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


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


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a cache entry; it appears under its name only when complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        save_file({k: t.cpu().contiguous() for k, t in tensors.items()}, beside, metadata=metadata)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def cached_tensors(path: Path | None, make: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A cache entry, made and written where there is none yet; without a path made every time."""
    found = None if path is None else load_tensors(path)
    if found is not None:
        return found[0]
    made = make()
    if path is not None:
        save_tensors(path, made, {})
    return made


def load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]] | None:
    """A cache entry and its metadata; one that cannot be read is a miss and will be written again."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            return {k: file.get_tensor(k) for k in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError):
        return None
