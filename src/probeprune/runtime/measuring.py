"""What batches cost a model under a dynamic method, measured on this machine and kept in its cache.

A few pruned layers stand for all. In turn they run dense, pruned with the last choice, and probed, on random
tokens in batches that grow until a pass takes a while. It takes about a second for a small model.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from probeprune.errors import UsageError
from probeprune.files import stored_json, write_json
from probeprune.methods import with_pays
from probeprune.model.blocks import Block, find_layers
from probeprune.model.cost import synced_clock
from probeprune.model.layers import LayerRunner, opened
from probeprune.model.machine import cache_dir
from probeprune.model.multimodal import text_config
from probeprune.model.offloading import is_offloaded
from probeprune.model.passes import Pass, position_limit
from probeprune.model.shadow import twin
from probeprune.processes import shares
from probeprune.provenance import dtype_name
from probeprune.runtime.attachment import Attachment
from probeprune.runtime.offloaded import LayerHandle
from probeprune.strategies.account import Costs
from probeprune.strategies.probe import probe_size
from probeprune.strategies.schedule import EveryBatch
from probeprune.strategies.widths import Prunable

FOLDER = "costs"
"""Folder of the cache, one file for each model, method and machine."""

ROUNDS = 5
"""Most rounds that are timed. The least time of each way counts: what else runs on the machine only adds."""
FEWEST = 3
ENOUGH_ROUNDS = 0.3
"""Seconds of a size after which the fewest rounds are enough."""
SIZES = tuple(16 * 4**i for i in range(6))
"""Batches that are timed, in tokens."""
LEAST = 3
"""Number of sizes that are timed in any case, for the slope of the time."""
ENOUGH = 0.03
"""Seconds of a dense pass after which no larger batch is timed: from there on, time grows in proportion."""
LENGTH = 512
"""Longest sequence of a batch that is timed."""
COLD = 32 << 20
"""Bytes of weights that the timed layers have together, so that no cache of a processor holds them."""

logger = logging.getLogger(__name__)
_known: dict[str, Costs] = {}
"""Costs by key in this process, for a cache that cannot be written."""


def costs_for(model: nn.Module, kept: Attachment, blocks: Sequence[Prunable]) -> Costs | None:
    """The costs by which a method with `pays="auto"` decides what it probes: those that it was given, those
    that were measured on this machine before, or measured now. None where every batch is probed.

    Raises `UsageError` for costs given to a method that probes every batch.
    """
    when = kept.method.when
    if not (isinstance(when, EveryBatch) and when.probe.pays == "auto"):
        if kept.costs is not None:
            raise UsageError(
                "costs decide which batches a probe with pays='auto' takes; leave them out for method "
                f"{kept.method.name!r}."
            )
        return None
    layers = _followed(kept, blocks)
    if not layers:  # nothing to probe
        return None
    if kept.costs is not None:
        return kept.costs
    key = _key(model, kept, blocks)
    if key not in _known:
        with shares.alike():
            found = _stored_or_measured(key, lambda: measured(model, kept, blocks, layers))
        _known[key] = shares.agreed(found)  # processes that share work decide alike
    return _known[key]


def _stored_or_measured(key: str, measure: Callable[[], Costs]) -> Costs:
    file = cache_dir() / FOLDER / f"{key}.json"
    found = _stored(file)
    if found is None:
        found = measure()
        if shares.leads():
            with suppress(UsageError):  # measured again by the next run where the cache cannot be written
                write_json(file, found.record())
    return found


def _stored(file: Any) -> Costs | None:
    try:
        found = Costs(**stored_json(file))
    except (TypeError, UsageError):
        return None
    logger.info("costs of batches, measured before: %s", file)
    return found


def _followed(kept: Attachment, blocks: Sequence[Prunable]) -> list[int]:
    """The layers with a block that follows the batch."""
    when = kept.method.when
    assert isinstance(when, EveryBatch)
    pairs = zip(blocks, kept.cuts, strict=True)
    return sorted(
        {b.layer for b, c in pairs if isinstance(b, Block) and c.width < b.units and when.follows(b)}
    )


def _key(model: Any, kept: Attachment, blocks: Sequence[Prunable]) -> str:
    """A hash of all that costs depend on: shapes of the blocks, whole and cut, the method, the machine."""
    device = blocks[0].consumer.weight.device if isinstance(blocks[0], Block) else model.device
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    facts = {
        "blocks": [
            [b.name, b.kind, b.units, c.width, b.parameters] for b, c in zip(blocks, kept.cuts, strict=True)
        ],
        "method": kept.method.record(),
        "ratio": kept.ratio,
        "dtype": dtype_name(model.dtype),
        "attention": str(text_config(model.config)._attn_implementation),
        "offloaded": is_offloaded(model),
        "device": [str(device), chip],
        "machine": [platform.node(), os.cpu_count(), torch.get_num_threads(), torch.__version__],
    }
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()


@torch.inference_mode(False)
@torch.no_grad()
def measured(model: Any, kept: Attachment, blocks: Sequence[Prunable], layers: Sequence[int]) -> Costs:
    """Time a few of `layers`, which follow the batch; see the top of the file.

    Args:
        model: with nothing attached; the same again at the end.
        kept: the method, its cuts and its statistics.
        blocks: the model's blocks.
        layers: indices of the layers with blocks that follow the batch, ascending.
    """
    chosen = _some(layers, blocks, is_offloaded(model))
    method = with_pays(kept.method, "always")
    probe = method.when.probe  # type: ignore[attr-defined]
    here = [i for i, b in enumerate(blocks) if b.layer in chosen]
    own = Attachment(method, kept.ratio, [kept.cuts[i] for i in here], kept.statistics)
    seconds: dict[int, list[float]] = {}
    sizes: dict[int, int] = {}
    with ExitStack() as stack:
        for layer in chosen:
            stack.enter_context(opened(model, layer))
        twins = [twin(find_layers(model)[layer]) for layer in chosen]
        handle = LayerHandle(model, own, [blocks[i] for i in here])
        stack.callback(handle.detach)
        for size in SIZES:
            batches = _batches(model, size)
            sizes[size] = math.prod(probe_size(probe, *batches[0].shape))
            runner = LayerRunner(model, batches)
            ways = [
                lambda i: _pass(runner, chosen, i, twins),  # noqa: B023
                *(_pruned(handle, runner, chosen, probed) for probed in (False, True)),
            ]
            seconds[size] = _rounds(ways, runner.hidden[0].device)
            if len(seconds) >= LEAST and seconds[size][0] > ENOUGH:
                break
    return _costs(seconds, sizes, len(layers) / len(chosen))


def _some(layers: Sequence[int], blocks: Sequence[Prunable], offloaded: bool) -> list[int]:
    """As many layers as it takes to have `COLD` bytes of weights, spread evenly over those on one device.

    One where layers are fetched one at a time.
    """
    middle = layers[len(layers) // 2]
    own = [b for b in blocks if isinstance(b, Block)]
    devices = {b.layer: b.consumer.weight.device for b in own}
    layers = [i for i in layers if devices[i] == devices[middle]]
    size = sum(b.parameters * b.consumer.weight.element_size() for b in own if b.layer == middle)
    count = 1 if offloaded else min(-(-COLD // size), len(layers))
    return [layers[(2 * i + 1) * len(layers) // (2 * count)] for i in range(count)]


def _batches(model: Any, size: int) -> list[torch.Tensor]:
    """Random tokens: a batch to warm up on and one for each round, LongTensor (batch, length)."""
    length = min(size, LENGTH, position_limit(model.config) or LENGTH)
    count = max(size // length, 1)
    words = model.get_input_embeddings().num_embeddings
    ids = torch.randint(words, (ROUNDS + 1, count, length), generator=torch.Generator().manual_seed(size))
    return [*ids]


def _pass(
    runner: LayerRunner, layers: Sequence[int], batch: int, modules: Sequence[nn.Module | None]
) -> torch.Tensor:
    """One pass of a batch through some layers, or through other modules in their places."""
    hidden = runner.hidden[batch]
    for layer, module in zip(layers, modules, strict=True):
        hidden = runner.run(layer, batch, runner.entering(layer, hidden), module)
    return hidden


def _pruned(
    handle: LayerHandle, runner: LayerRunner, layers: Sequence[int], probed: bool
) -> Callable[[int], Any]:
    """A pass under the method, probed or with the last choice."""

    def run(batch: int) -> Any:
        handle.probe_next(probed)
        started = Pass(runner.tokens(batch), continues=False, cache=None)
        return handle.run_pass(started, lambda: _pass(runner, layers, batch, [None] * len(layers)))

    return run


def _clock(device: torch.device) -> float:
    """Seconds: on a CPU those in which this thread ran, whatever else runs on the machine."""
    return time.thread_time() if device.type == "cpu" else synced_clock(device)


def _rounds(ways: Sequence[Callable[[int], Any]], device: torch.device) -> list[float]:
    """The least seconds of each way, which take turns."""
    begun, least = _clock(device), [math.inf] * len(ways)
    for batch in range(ROUNDS + 1):
        times = [_clock(device)]
        for way in ways:
            way(batch)
            times.append(_clock(device))
        if batch:  # the first warms up
            least = [min(t, b - a) for t, (a, b) in zip(least, pairwise(times), strict=True)]
        if batch >= FEWEST and times[-1] - begun > ENOUGH_ROUNDS:
            break
    return least


def _costs(seconds: dict[int, list[float]], sizes: dict[int, int], scale: float) -> Costs:
    """The costs of all layers, from those of some.

    Args:
        seconds: dense, pruned and probed, by size of the batch.
        sizes: of the probes, by size of the batch.
        scale: of all layers over some.
    """
    probing: dict[int, float] = {}
    for size, (_, pruned, probed) in seconds.items():
        probing[sizes[size]] = min(probing.get(sizes[size], math.inf), max(probed - pruned, 0.0))
    probes = sorted(probing)
    return Costs(
        tokens=tuple(seconds),
        dense=_growing([scale * dense for dense, _, _ in seconds.values()]),
        pruned=_growing([scale * pruned for _, pruned, _ in seconds.values()]),
        probe_tokens=tuple(probes),
        probe=_growing([scale * probing[n] for n in probes]),
    )


def _growing(times: Sequence[float]) -> tuple[float, ...]:
    """Times of growing sizes, none longer than that of a larger size: chance only adds."""
    return tuple(min(times[i:]) for i in range(len(times)))
