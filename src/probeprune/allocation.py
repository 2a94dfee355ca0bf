"""Allocation: how many units each block keeps, so that the whole model loses what was asked for.

Budgets are counted in parameters of the model's blocks, which for linear maps is the same share of FLOPs a
token. The ratio is over all blocks, those in skipped first layers included. Nothing here looks at a batch.
"""

from collections.abc import Sequence

import torch

from probeprune.blocks import Block
from probeprune.errors import UsageError

ALLOCATIONS = ("uniform", "nominal", "global")


def check_ratio(ratio: float) -> None:
    """Raise `UsageError` unless `ratio` lies in [0, 1)."""
    if not 0 <= ratio < 1:
        raise UsageError(f"pruning ratio {ratio:g} is outside [0, 1); 0.4 prunes 40 % of the model's blocks.")


def layer_ratio(blocks: Sequence[Block], ratio: float, skip_layers: int) -> float:
    """The share `r' = r L / (L - skipped)` that each pruned layer loses (Probe Pruning, section 5).

    Raises `UsageError` where nothing would be left.
    """
    check_ratio(ratio)
    layers = 1 + max(b.layer for b in blocks)
    if ratio and skip_layers >= layers:
        raise UsageError(
            f"skip_layers={skip_layers} leaves none of the model's {layers} layers to prune; lower it."
        )
    share = ratio * layers / max(layers - skip_layers, 1)
    if share >= 1:
        raise UsageError(
            f"ratio {ratio:g} over {layers} layers with the first {skip_layers} dense would remove all units "
            f"of the others; use at most {(layers - skip_layers) / layers - 0.01:.2f} or skip fewer layers."
        )
    return share


def uniform(
    blocks: Sequence[Block], ratio: float, *, skip_layers: int = 3, round_to: int = 1, exact: bool = True
) -> list[int]:
    """Every pruned block loses the same share; returns the units each block keeps.

    Attention loses `int(r' * units)` units. MLPs lose `int(r' * n)` channels, or, with `exact`, whatever
    makes the whole add up to `ratio` (few heads make coarse steps). Kept channels are rounded up to a
    multiple of `round_to`.
    """
    share = layer_ratio(blocks, ratio, skip_layers)
    kept = [b.units for b in blocks]
    pruned = [i for i, b in enumerate(blocks) if b.layer >= skip_layers]
    removed = 0
    for i in pruned:
        block = blocks[i]
        if block.kind == "attention":
            parts = block.kv_heads if block.unit_kind == "balanced" else 1
            kept[i] -= parts * _floor(share * block.units / parts)
            removed += (block.units - kept[i]) * block.unit_parameters
    mlps = [i for i in pruned if blocks[i].kind == "mlp"]
    left = ratio * sum(b.parameters for b in blocks) - removed
    for done, i in enumerate(mlps):
        block = blocks[i]
        if exact:  # what is still to go, spread over the MLPs still to come: errors do not add up
            cut = max(round(left / (len(mlps) - done) / block.unit_parameters), 0)
        else:
            cut = _floor(share * block.units)
        keep = block.units - cut
        keep = min(-(-keep // round_to) * round_to, block.units)
        if keep < 1:
            raise UsageError(
                f"ratio {ratio:g} leaves {block.name} without channels; lower the ratio or skip_layers, "
                "or choose finer attention units."
            )
        kept[i] = keep
        left -= (block.units - keep) * block.unit_parameters
    return kept


def global_threshold(
    blocks: Sequence[Block], scores: Sequence[torch.Tensor], ratio: float, *, skip_layers: int = 3
) -> list[int]:
    """FLAP's allocation: one threshold over the scores of all blocks; returns the units each block keeps.

    Scores must be comparable between blocks (FLAP standardises them within each). From the least important
    unit on, units go until their parameters, which weigh a head against MLP channels, add up to `ratio` of
    all. A block always keeps its best unit; `balanced` units go in steps of one from every group.
    """
    layer_ratio(blocks, ratio, skip_layers)
    budget = ratio * sum(b.parameters for b in blocks)
    candidates = [i for i, b in enumerate(blocks) if b.layer >= skip_layers]
    flat = torch.cat([scores[i].float().cpu() for i in candidates])
    owner = torch.cat([torch.full((blocks[i].units,), i) for i in candidates]).tolist()
    kept = [b.units for b in blocks]
    for index in flat.argsort(stable=True).tolist():
        block = blocks[owner[index]]
        if budget < block.unit_parameters / 2:
            break
        if kept[owner[index]] > 1:
            kept[owner[index]] -= 1
            budget -= block.unit_parameters
    else:
        raise UsageError(f"ratio {ratio:g} cannot be reached while every block keeps a unit; lower it.")
    for i, block in enumerate(blocks):
        if block.unit_kind == "balanced" and block.kind == "attention":
            kept[i] = -(-kept[i] // block.kv_heads) * block.kv_heads
    return kept


def choose_units(scores: torch.Tensor, keep: int, block: Block) -> torch.Tensor:
    """Ids of the `keep` most important units, ascending: LongTensor (keep,). Ties go to the lower id."""
    if block.unit_kind == "balanced" and block.kind == "attention":
        groups = scores.view(block.kv_heads, block.group_size)
        best = groups.argsort(dim=1, descending=True, stable=True)[:, : keep // block.kv_heads]
        first = torch.arange(block.kv_heads, device=scores.device)[:, None] * block.group_size
        return (best + first).flatten().sort().values
    return scores.argsort(descending=True, stable=True)[:keep].sort().values


def removed_share(blocks: Sequence[Block], kept: Sequence[int]) -> float:
    """The share of all blocks' parameters that these widths really remove."""
    removed = sum((b.units - k) * b.unit_parameters for b, k in zip(blocks, kept, strict=True))
    return removed / sum(b.parameters for b in blocks)


def _floor(x: float) -> int:
    """`int(x)`, but 0.2 * 30 / 27 * 9 is 2, not 1.9999999."""
    return int(x + 1e-9)
