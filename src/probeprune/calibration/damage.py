"""Damage of cutting a block to any width, and the FLOPs or time that a cut saves.

Each block is judged alone. Its units leave in the order of elimination, the remaining ones are refitted to
the dense block's output, and the remaining error is weighted by the block's sensitivity. One pass gives the
damage at every width.
"""

from collections.abc import Mapping, Sequence
from statistics import median

import torch
from torch import nn

from probeprune.algebra.elimination import eliminate_with
from probeprune.algebra.factors import factorised
from probeprune.algebra.least_squares import Gram, damped_moment
from probeprune.algebra.precision import exact
from probeprune.calibration.unfinished import Unfinished
from probeprune.data.windows import batches
from probeprune.model.blocks import Block, UnitKind, find_blocks
from probeprune.model.cost import block_flops, synced_clock
from probeprune.model.layers import LayerRunner, capture
from probeprune.model.partition import Partition
from probeprune.model.passes import check_eval, token_windows
from probeprune.processes import shares
from probeprune.progress import Progress, silent


@exact()
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
    kept: Unfinished | None = None,
) -> dict[str, torch.Tensor]:
    """Damage of cutting each block, in nats per token, by the number of units removed.

    To second order, with each block cut alone in an otherwise dense model: interactions between cuts are
    ignored. The moments of one layer are in memory at a time.

    Args:
        model: a supported causal LM in eval mode, with nothing attached.
        windows: LongTensor (count, length) of token ids.
        metrics: sensitivities of the blocks' outputs (`sensitivity.sensitivities`).
        units: kind of attention units.
        damping: damping of the moments, as in `least_squares.Equations`.
        batch_size: windows per forward pass.
        progress: called with (`damage`, layers done, layers in all).
        kept: where the pass begins, and takes down how far it has come; None for the beginning.

    Returns:
        By block name (units + 1,), float64, never decreasing: entry i is the damage after the first i units
        of the elimination order are removed.

    Raises:
        UsageError: unsupported model, windows too long.
        FloatingPointError: NaN or infinite activations, or moments that cannot be factorised.
    """
    check_eval(model)
    windows = token_windows(model, windows)
    blocks = find_blocks(model, units)
    kept = Unfinished(model) if kept is None else kept
    parts = [*batches(shares.own_rows(windows), batch_size)]
    stream, curves = kept.stream("hidden", len(parts)), kept.results
    with shares.alike():
        layers = LayerRunner(model, parts, hidden=stream)
    for layer in range(kept.done, len(layers)):
        progress("damage", layer, len(layers))
        here = [b for b in blocks if b.layer == layer]
        with layers.opened(layer):
            moments = {b.kind: Gram(b.width, b.hidden_size, b.consumer.weight.device) for b in here}
            with shares.alike():
                for i, hidden in enumerate(stream):
                    with capture(here) as captured:
                        stream[i] = layers.run(layer, i, hidden)
                    for kind, gram in moments.items():
                        gram.update(captured[kind].z.flatten(0, -2), captured[kind].output.flatten(0, -2))
            shares.pool(moments.values())
            with shares.alike():
                for b in here:
                    curves[b.name] = _curve(b, moments.pop(b.kind), metrics[b.name], damping)
        kept.step(layer + 1)
    progress("damage", len(layers), len(layers))
    return shares.agreed_tensors(curves)


def _curve(block: Block, moments: Gram, metric: torch.Tensor, damping: float) -> torch.Tensor:
    """Damage of one block by the number of units removed: (units + 1,)."""
    if block.kind == "mixer":  # nobody asks
        return torch.zeros(block.units + 1, dtype=torch.float64, device="cpu")
    weight, centred = block.consumer_weight, block.consumer.bias is not None
    try:
        inverse = torch.cholesky_inverse(factorised(damped_moment(moments, centred, damping)))
        order = eliminate_with(inverse, weight, block.unit_width, metric=metric)
    except FloatingPointError as error:
        raise FloatingPointError(f"the damage of {block.name} cannot be computed: {error}.") from None
    return order.damage.cpu() / 2


def savings(
    model: nn.Module, units: UnitKind, budget: str, windows: torch.Tensor
) -> dict[str, tuple[int, int]]:
    """What removing one unit of each block saves, and what the whole block costs, by block name.

    Args:
        model: a supported causal LM with nothing attached; unchanged at the end.
        units: kind of attention units.
        budget: the quantity: `parameters`, `flops` of a window, or `time`, in nanoseconds, of these windows.
        windows: LongTensor (batch, length) of token ids.
    """
    blocks = find_blocks(model, units)
    if budget == "parameters":
        return {b.name: (b.unit_parameters, b.parameters) for b in blocks}  # not all belong to a unit
    with shares.alike():
        if budget == "flops":
            saved = unit_flops(blocks, windows.shape[1])
        else:
            saved = unit_nanoseconds(model, blocks, windows.to(next(model.parameters()).device))
    saved = shares.agreed(saved)  # measured times differ
    return {b.name: (s, b.units * s) for b, s in zip(blocks, saved, strict=True)}


def unit_flops(blocks: Sequence[Block], length: int) -> list[int]:
    """FLOPs saved per block by removing one unit, for a sequence of `length` tokens."""
    return [block_flops(b, b.units, 1, length) - block_flops(b, b.units - 1, 1, length) for b in blocks]


@torch.no_grad()
def unit_nanoseconds(
    model: nn.Module, blocks: Sequence[Block], ids: torch.Tensor, rounds: int = 5
) -> list[int]:
    """Nanoseconds saved per block by removing one unit, in a pass over these ids on this machine.

    Every block is timed whole and at half its units, in turn; the result is the median over rounds, and at
    least 1 even if the difference is lost in noise; 1 for a block that can lose none.

    Args:
        model: a supported causal LM with nothing attached; unchanged at the end.
        blocks: the model's blocks.
        ids: LongTensor (batch, length) of token ids, on the model's device.
        rounds: number of timed rounds, at least 1.
    """
    layers = LayerRunner(model, [ids])
    device = ids.device
    every, blocks = blocks, [b for b in blocks if b.whole is None]
    partitions = [Partition(b) for b in blocks]
    times: list[tuple[list[float], list[float]]] = [([], []) for _ in blocks]
    try:
        for b, partition in zip(blocks, partitions, strict=True):
            partition.keep(torch.arange(max(b.units // 2, 1), device=device))
        for _ in range(rounds + 1):  # the first is a warm-up
            for i, (b, partition) in enumerate(zip(blocks, partitions, strict=True)):
                for seconds, show in zip(times[i], (partition.widen, partition.narrow), strict=True):
                    show()
                    hidden = layers.entering(b.layer, layers.hidden[0])
                    start = synced_clock(device)
                    layers.run(b.layer, 0, hidden)
                    seconds.append(synced_clock(device) - start)
                partition.widen()
    finally:
        for partition in partitions:
            partition.restore()
    saved = [median(w - n for w, n in zip(whole[1:], half[1:], strict=True)) for whole, half in times]
    a_unit = {
        b: max(round(1e9 * s / max(b.units - b.units // 2, 1)), 1) for s, b in zip(saved, blocks, strict=True)
    }
    return [a_unit.get(b, 1) for b in every]
