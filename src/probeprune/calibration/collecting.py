"""Collecting: run windows of text through the dense model and collect the moments of every block.

Results are cached by content (the model's weights, the windows, the settings), and a run that was killed goes
on at its layer. Knows nothing of methods: one calibration serves them all.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from probeprune.algebra.moments import OWN_POSITIONS, Moments
from probeprune.algebra.precision import exact
from probeprune.algebra.routed_moments import RoutedMoments
from probeprune.calibration.unfinished import Unfinished, resumed, states_bytes
from probeprune.data.windows import batches
from probeprune.model.blocks import Block, find_blocks
from probeprune.model.identity import content_file
from probeprune.model.layers import LayerRunner, capture
from probeprune.model.passes import check_eval, token_windows
from probeprune.model.wrappers import unwrapped
from probeprune.processes import shares
from probeprune.progress import Progress, silent
from probeprune.strategies import Part

_FORMAT = 4
M = TypeVar("M", Moments, RoutedMoments)


@exact()
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

    All windows run through one layer, then through the next: only that layer need be in memory, and the
    hidden states of all windows (windows x length x hidden numbers in the model's dtype).

    Args:
        model: a supported causal LM, in eval mode, nothing attached; its layers may be offloaded.
        windows: LongTensor, for instance from `data.windows.calibration_windows`.
        batch_size: windows per forward pass.
        own_positions: number of first positions with an energy of their own (the paper: all).
        cache: folder for results, stored by content; a run that was killed goes on at the layer it was at.
            None stores nothing.
        progress: called with ("calibration", windows done over all layers, windows times layers).

    Raises `UsageError` for windows longer than the model's positions, a model in training mode, or a block
    whose consumer is not called.
    """
    model = unwrapped(model)
    windows = token_windows(model, windows)
    check_eval(model, "calibration needs")
    blocks = find_blocks(model)
    path = content_file(cache, model, windows, "moments", _FORMAT, own_positions)

    def of_layer(runner: LayerRunner, layer: int) -> dict[str, Moments]:
        here = [b for b in blocks if b.layer == layer]
        return collect(runner, layer, here, own_positions, progress)

    layers = blocks[-1].layer + 1
    moments = by_layer(model, windows, path, "moments", layers, of_layer, batch_size, "calibration", progress)
    return {b.name: moments[b.name] for b in blocks}


def by_layer(
    model: nn.Module,
    windows: torch.Tensor,
    path: Path | None,
    part: Part,
    layers: int,
    of_layer: Callable[[LayerRunner, int], dict[str, M]],
    batch_size: int,
    label: str,
    progress: Progress,
) -> dict[str, M]:
    """Moments by name, collected one layer after the other; of several processes, each takes some windows.

    Args:
        model, windows, batch_size, progress: as in `calibrate`.
        path: where the result is stored; None stores nothing.
        part: its key in `stored.CODECS`.
        layers: number of layers to run, from the first one on.
        of_layer: advances the hidden states through a layer and returns its moments.
        label: what `progress` is called with.
    """

    def take(kept: Unfinished) -> dict[str, M]:
        progress(label, kept.done * len(windows), layers * len(windows))
        parts = [*batches(shares.own_rows(windows), batch_size)]
        with torch.inference_mode():
            with shares.alike():
                runner = LayerRunner(model, parts, hidden=kept.stream("hidden", len(parts)))
            for layer in range(kept.done, layers):
                with shares.alike(), runner.opened(layer):
                    found = of_layer(runner, layer)
                shares.pool(found.values())
                kept.results |= found
                kept.step(layer + 1)
        return kept.results

    states = states_bytes(model, windows)
    made = resumed(path, part, model, take, states=states, settings=batch_size)
    progress(label, layers * len(windows), layers * len(windows))
    # Collected under inference mode; clones are ordinary tensors.
    return {
        name: type(one).from_state({k: t.clone() for k, t in one.state().items()})
        for name, one in made.items()
    }


def collect(
    runner: LayerRunner, layer: int, observed: Sequence[Block], own_positions: int, progress: Progress
) -> dict[str, Moments]:
    """Advance the hidden states through one layer; returns the moments of the blocks observed on the way."""
    moments = {b.name: Moments(b.width, own_positions, b.consumer.weight.device) for b in observed}
    windows = sum(len(batch) for batch in runner.batches)
    done = layer * windows
    for i, hidden in enumerate(runner.hidden):
        with capture(observed) as captured:
            runner.hidden[i] = runner.run(layer, i, hidden)
        for b in observed:
            # Some layers flatten batch and sequence before their MLP.
            moments[b.name].update(captured[b.kind].z.view(*hidden.shape[:2], -1), runner.tokens(i))
        done += len(runner.batches[i])
        progress("calibration", done, len(runner) * windows)
    return moments


def merge(moments: dict[str, Moments], others: dict[str, Moments]) -> None:
    """Add to `moments` those of other text on the same model, for example from another process."""
    for name, other in others.items():
        moments[name].merge(other)
