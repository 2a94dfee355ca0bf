"""Damage: what the model's prediction loses when a block is cut to any width, and what a cut saves.

Each block by itself: its units leave in the order of elimination, the rest is refitted to the dense block's
output, and the error that stays counts by the block's sensitivity. One pass gives the curve of every width.
"""

import statistics as numbers
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from probeprune.algebra.elimination import eliminate
from probeprune.algebra.least_squares import Gram, normal_equations
from probeprune.data.windows import batches
from probeprune.model.blocks import Block, UnitKind, find_blocks
from probeprune.model.cost import block_flops, synced_clock
from probeprune.model.layers import LayerRunner, capture
from probeprune.model.partition import Partition
from probeprune.model.passes import check_eval, check_windows
from probeprune.progress import Progress, silent


@torch.no_grad()
def damages(
    model: nn.Module,
    windows: torch.Tensor,
    metrics: Mapping[str, torch.Tensor],
    *,
    units: UnitKind = "group",
    damping: float = 0.1,
    batch_size: int = 16,
    progress: Progress = silent,
) -> dict[str, torch.Tensor]:
    """Nats a token that cutting a block costs, by how many of its units leave.

    To second order and each block alone in an otherwise dense model: what several cuts do to each other is
    left out. One layer is in memory at a time, as in `refit.refit`.

    Args:
        model: a supported causal LM in eval mode, nothing attached.
        windows: LongTensor (count, length) of token ids.
        metrics: sensitivities of the blocks' outputs (`sensitivity.sensitivities`).
        units: what an attention unit is.
        damping: of the moments, as in `least_squares.solve`.
        batch_size: windows a forward pass.
        progress: called with (what, layers done, layers in all).

    Returns:
        By block name (units + 1,), float64, never falling: at i after the first i units of the order left.

    Raises:
        UsageError: unsupported model, windows too long.
        FloatingPointError: NaN or infinite activations, or moments that cannot be factorised.
    """
    check_eval(model)
    check_windows(model, windows)
    blocks = find_blocks(model, units)
    layers = LayerRunner(model, [*batches(windows, batch_size)])
    stream, found = layers.hidden, {}
    for layer in range(len(layers)):
        progress("damage", layer, len(layers))
        here = [b for b in blocks if b.layer == layer]
        moments = {b.kind: Gram(b.width, b.consumer.out_features, b.consumer.weight.device) for b in here}
        for i, hidden in enumerate(stream):
            with capture(here) as seen:
                stream[i] = layers.run(layer, i, hidden)
            for kind, gram in moments.items():
                gram.update(seen[kind].z.flatten(0, -2), seen[kind].output.flatten(0, -2))
        for b in here:
            weight, centred = b.consumer.weight, b.consumer.bias is not None
            try:
                order = eliminate(
                    normal_equations(moments.pop(b.kind), weight, centred, damping)[0],
                    weight,
                    b.unit_width,
                    metric=metrics[b.name],
                )
            except FloatingPointError as problem:
                raise FloatingPointError(f"the damage of {b.name} cannot be told: {problem}.") from None
            found[b.name] = order.damage.cpu() / 2
    progress("damage", len(layers), len(layers))
    return found


def unit_flops(blocks: Sequence[Block], length: int) -> list[int]:
    """What the cut of one unit saves of each block: FLOPs on a sequence of so many tokens."""
    return [block_flops(b, b.units, 1, length) - block_flops(b, b.units - 1, 1, length) for b in blocks]


@torch.no_grad()
def unit_nanoseconds(
    model: nn.Module, blocks: Sequence[Block], ids: torch.Tensor, rounds: int = 5
) -> list[int]:
    """What the cut of one unit saves of each block: nanoseconds of a pass over these ids, on this machine.

    Every block is timed whole and at half its units, in turn; medians over rounds. At least 1, where the
    machine's noise drowns a block.

    Args:
        model: nothing attached; put back at the end.
        blocks: of the model.
        ids: LongTensor (batch, length) of token ids, on the model's device.
        rounds: at least 1.
    """
    layers = LayerRunner(model, [ids])
    device = ids.device
    partitions = [Partition(b) for b in blocks]
    times: list[tuple[list[float], list[float]]] = [([], []) for _ in blocks]
    try:
        for b, partition in zip(blocks, partitions, strict=True):
            partition.keep(torch.arange(max(b.units // 2, 1), device=device))
        for _ in range(rounds + 1):  # the first one warms up
            for i, (b, partition) in enumerate(zip(blocks, partitions, strict=True)):
                for seconds, show in zip(times[i], (partition.widen, partition.narrow), strict=True):
                    show()
                    start = synced_clock(device)
                    layers.run(b.layer, 0, layers.hidden[0])
                    seconds.append(synced_clock(device) - start)
                partition.widen()
    finally:
        for partition in partitions:
            partition.restore()
    saved = [numbers.median(w - n for w, n in zip(whole[1:], half[1:], strict=True)) for whole, half in times]
    return [
        max(round(1e9 * s / max(b.units - b.units // 2, 1)), 1) for s, b in zip(saved, blocks, strict=True)
    ]
