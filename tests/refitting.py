"""Refits the slow way: least squares by LAPACK, and whole models watched with hooks."""

import torch
from tiny import FAMILIES, token_ids

from probeprune import Probe, Refit, RefitEveryBatch, compose, find_blocks
from probeprune.algebra.least_squares import FLOOR
from probeprune.preparation import Preparation

WINDOWS = token_ids(24, 24, seed=3)


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def refitting(base="wanda-sp", how=None, **changes):
    """A method with a refit, one layer left dense."""
    options = {"skip_layers": 1, "compensation": how or Refit(), **changes}
    return compose(base, name="refitted", **options)


def following(how=None, probe=None, share=None, **changes):
    """Static units, MLPs refitted at every batch."""
    when = RefitEveryBatch(probe or Probe(), share=share or RefitEveryBatch().share)
    how = how or Refit(damping=(1e-2,), sensitivity=2)
    return refitting("ppsp", how, **{"importance": "obs", "when": when, **changes})


def consumers_of(model, method, ratio, windows=WINDOWS, **options):
    """The consumers of a method at a ratio, made anew."""
    return Preparation(model, windows, **options).statistics(method, ratio).consumers


def explicit(weight, bias, z, t, damping):
    """Damped least squares by LAPACK in float64: the damping as rows of its own under the data."""
    z, t, weight = z.double(), t.double(), weight.double()
    if bias is not None:
        z_mean, t_mean = z.mean(0), t.mean(0)
        z, t = z - z_mean, t - t_mean
    squares = (z**2).sum(0)
    middle = squares.median() or squares[squares > 0].median()  # of the live ones where most are dead
    rows = torch.cat([z, (damping * squares.clamp_min(FLOOR * middle)).sqrt().diag()])
    lacks = torch.cat([t - z @ weight.T, torch.zeros(z.shape[1], len(weight), dtype=torch.float64)])
    fitted = weight + torch.linalg.lstsq(rows, lacks).solution.T
    return fitted, None if bias is None else t_mean - fitted @ z_mean


def watched(model, block, windows):
    """The residual in front of a block, and its consumer's input and output, of a whole model."""
    seen = {}
    attention = next(b for b in find_blocks(model) if b.layer == block.layer)
    hooks = [
        block.norm.register_forward_pre_hook(lambda _, a: seen.update(residual=a[0])),
        block.consumer.register_forward_hook(lambda _, a, o: seen.update(z=a[0], output=o)),
        attention.consumer.register_forward_hook(lambda _, a, o: seen.update(attention=o)),
    ]
    logits(model, windows)
    for hook in hooks:
        hook.remove()
    if getattr(model.config, "use_parallel_residual", False) and block.kind == "mlp":
        seen["residual"] = seen["residual"] + seen["attention"]  # both are added to one residual
    return seen


def some(model):
    """Two thirds of the units of three layers' blocks."""
    g = torch.Generator().manual_seed(0)
    return {
        b.name: torch.randperm(b.units, generator=g)[: max(b.units * 2 // 3, 1)].sort().values
        for b in find_blocks(model)
        if b.layer in (1, 2, 4)
    }


def refitted_dense(family, handle):
    """A dense model with the consumers shown under the handle, other units' columns at zero."""
    dense = FAMILIES[family]()
    for block, shown, kept in zip(find_blocks(dense), handle.blocks, handle.kept_units(), strict=True):
        units = torch.tensor(kept.units)
        columns = (units[:, None] * block.unit_width + torch.arange(block.unit_width)).flatten()
        weight, bias = shown.consumer.weight.detach().clone(), shown.consumer.bias
        with torch.no_grad():
            block.consumer.weight.zero_()
            block.consumer.weight[:, columns] = weight
            if bias is not None:
                block.consumer.bias.copy_(bias)
    return dense
