"""How much memory each part of calibration takes, by rehearsing it on a model without numbers.

Passes through a layer are run as they will be, on tensors that have shapes alone. What is computed from their
moments (eliminations, solutions) needs numbers: it is run small, and its memory grows with the square of its
size. Knows nothing of methods.
"""

from collections.abc import Mapping, Sequence

import torch

from probeprune.algebra.elimination import eliminate_fitted
from probeprune.algebra.least_squares import Equations, Gram, squared_error
from probeprune.algebra.moments import Moments
from probeprune.algebra.precision import choosing_dtype
from probeprune.calibration import leaving
from probeprune.calibration.expert_refit import experts_at_once, moment_bytes
from probeprune.model.blocks import Block
from probeprune.model.experts import Stack
from probeprune.model.footprint import Batch, LiveBytes, Phase, Rehearsal, states_of
from probeprune.model.layers import LayerRunner, capture
from probeprune.strategies.compensation import Refit

_SIZES = ("per_token", "hidden_size", "experts")
_SMALL = 160
"""Channels of a block whose algebra is run to see what it takes."""


def moments(rehearsal: Rehearsal, batch: Batch, windows: int, own_positions: int) -> Phase:
    """The part of the work that collects moments (`collecting.calibrate`)."""
    batch = Batch(min(batch.size, windows), batch.length)
    with rehearsal.running() as live:
        runner = rehearsal.runner(batch)
        here = {b.kind: b for b in rehearsal.here}
        found = {kind: Moments(b.width, own_positions, rehearsal.device) for kind, b in here.items()}
        with capture(list(here.values())) as captured:
            runner.hidden[0] = runner.run(rehearsal.layer, 0, runner.hidden[0])
        for kind, own in found.items():
            z = captured[kind].z
            own.update(z.view(batch.size, batch.length, -1), runner.tokens(0))
    all_channels = sum(b.width for b in rehearsal.blocks)
    states = states_of(rehearsal.model, rehearsal.dtype, windows - batch.size, batch.length)
    rows = len(vars(Moments(1, own_positions))) - 4 + own_positions + 1  # mean, m2 and the energies
    return Phase("moments", live.peak, states, kept=4 * rows * all_channels)


def routed(rehearsal: Rehearsal, batch: Batch, windows: int, exchange: bool = False) -> Phase:
    """The part of the work that collects moments of experts (`routed.routed_moments`), at most: all tokens of
    a batch go to one expert, whose activations are computed once more beside the layer's own. With
    `exchange`, what the output changes by when an expert leaves (`leaving.exchange_moment`) comes to that."""
    batch = Batch(min(batch.size, windows), batch.length)
    widest = max(s.width for s in rehearsal.stacks)
    again = batch.tokens * (2 * rehearsal.stacks[0].hidden_size + 3 * widest) * rehearsal.dtype.itemsize
    again += 2 * 4 * batch.tokens * widest  # in float32, and its squares
    states = states_of(rehearsal.model, rehearsal.dtype, windows - batch.size, batch.length)
    held = 4 * 2 * sum(s.experts * s.width for s in rehearsal.stacks)
    if exchange:
        held += 4 * sum((2 * s.experts) ** 2 for s in rehearsal.stacks)
        k, d, experts = (max(getattr(s, n) for s in rehearsal.stacks) for n in _SIZES)
        # Changes, contributions, both in a row, an expert's part; shares; the router without an expert.
        again += 4 * leaving.TOKENS * (6 * k * d + (k + 2) * experts) + 2 * 4 * experts * d
    return Phase("moments of experts", rehearsal.layer_pass(batch) + again, states, kept=held)


# -- refits ----------------------------------------------------------------------------------------


def consumers(
    rehearsal: Rehearsal,
    batch: Batch,
    windows: int,
    how: Refit,
    kept: Sequence[int],
    chosen: bool,
    following: bool = False,
) -> tuple[list[Phase], int]:
    """The parts of the work that refits consumers (`refit.refit`), and the bytes of these, which stay.

    Args:
        rehearsal: the model.
        batch: of one forward pass.
        windows: number of calibration windows.
        how: settings of the refit.
        kept: number of units that each block keeps, stacks of experts among them.
        chosen: whether elimination chooses the units.
        following: whether refits at every batch start from these (`refit.RefitRequest`).
    """
    windows = min(windows, how.windows)
    batch = Batch(min(batch.size, windows), batch.length)
    blocks, stacks = rehearsal.blocks, rehearsal.stacks
    cut = {b.name: k for b, k in zip(rehearsal.parts, kept, strict=True) if k < b.units}
    if not cut:
        return [], 0
    sizes = {b.name: b.hidden_size * cut[b.name] * b.unit_width for b in blocks if b.name in cut}
    sizes |= {s.name: s.experts * s.hidden_size * cut[s.name] for s in stacks if s.name in cut}
    made = sum(sizes.values()) * rehearsal.dtype.itemsize
    if following:
        made += sum(4 * cut[b.name] ** 2 for b in blocks if b.name in cut and b.kind == "mlp")
    here = rehearsal.here
    mine = [b for b in here if b.name in cut] or here
    # In sequence, an MLP is fitted behind the pruned attention of its layer.
    groups = [[b] for b in mine] if how.sequential else [mine]
    work = 0
    for group in groups:
        with rehearsal.running() as live:
            runner = rehearsal.runner(batch)
            pruned = runner.hidden[0].clone() if how.sequential else None
            # Of the windows to fit on, and of those held out; a unit that is to be chosen has moments too.
            grams: dict[str, list[Gram]] = {
                b.kind: [Gram(_channels(b, cut, chosen), b.hidden_size, rehearsal.device) for _ in range(2)]
                for b in group
            }
            _look(runner, rehearsal.layer, here, group, grams, cut, chosen, pruned)
            standing = live.now
        for b in group:
            width = cut.get(b.name, b.units)
            algebra = _algebra_of(b, how.damping[0], width, chosen)
            work = max(work, live.peak, standing + algebra)
        del grams
    lacking = [s for s in stacks if s.name in cut]
    for stack in lacking:
        work = max(work, _experts_refit(rehearsal, stack, batch, windows, how, cut[stack.name], chosen))
    states = states_of(rehearsal.model, rehearsal.dtype, windows - batch.size, batch.length)
    sets = 1
    if how.sequential:  # two streams, and what an MLP and experts are to give, in float32
        aims = states_of(rehearsal.model, torch.float32, windows - batch.size, batch.length)
        more = 1 + bool(lacking)
        states, sets = 2 * states + more * aims, 2 + more
    return [Phase("refit", work, states, sets=sets, kept=made)], made


def _experts_refit(
    rehearsal: Rehearsal, stack: Stack, batch: Batch, windows: int, how: Refit, kept: int, chosen: bool
) -> int:
    """Bytes of the refit of a layer's experts (`expert_refit.StackRefit`), at most: all tokens of a batch go
    to one expert, whose activations are computed once more beside the layer's own, and all experts are fitted
    already beside the moments of a part of them."""
    channels, d = stack.width if chosen else kept, stack.hidden_size
    sets = 1 if len(how.damping) == 1 else 2
    moments = experts_at_once(stack, channels, sets) * sets * moment_bytes(stack, channels)
    # In float32: the output, what is wanted of the experts and what of each, an expert's targets and what
    # they are made of; its activations, and these in distances from their mean.
    again = 4 * batch.tokens * (7 * d + 2 * channels)
    again += batch.tokens * (2 * d + 4 * stack.width) * rehearsal.dtype.itemsize
    algebra = _algebra(channels, 1, d, how.damping[0], kept / stack.width, chosen)
    results = 2 * stack.experts * d * kept * rehearsal.dtype.itemsize  # apart, then joined
    return moments + results + max(rehearsal.layer_pass(batch) + again, algebra)


def _channels(block: Block, cut: Mapping[str, int], chosen: bool) -> int:
    """Channels that the moments of a block's refit have."""
    return block.width if chosen else cut.get(block.name, block.units) * block.unit_width


def _look(
    runner: LayerRunner,
    layer: int,
    here: Sequence[Block],
    group: Sequence[Block],
    grams: Mapping[str, list[Gram]],
    cut: Mapping[str, int],
    chosen: bool,
    pruned: torch.Tensor | None,
) -> None:
    """Add one batch to the moments of a refit: what the dense layer makes of it, and the pruned one."""
    with capture(here) as seen:
        runner.hidden[0] = runner.run(layer, 0, runner.hidden[0])
    aims = {b.kind: seen[b.kind].output.float() for b in here}
    if pruned is not None:
        for b in here:
            aims[b.kind] = aims[b.kind].add(seen[b.kind].residual.float().view_as(aims[b.kind]))
        with capture(here, until=group[-1]) as seen:
            runner.run(layer, 0, pruned)
    for b in group:
        z, target = seen[b.kind].z[..., : _channels(b, cut, chosen)], aims[b.kind]
        if pruned is not None:
            target = target.sub(seen[b.kind].residual.float().view_as(target))
        grams[b.kind][0].update(z.flatten(0, -2), target.flatten(0, -2))


def damages(rehearsal: Rehearsal, batch: Batch, windows: int, damping: float) -> Phase:
    """The part of the work that measures damages (`damage.damages`)."""
    batch = Batch(min(batch.size, windows), batch.length)
    here = rehearsal.here
    with rehearsal.running() as live:
        runner = rehearsal.runner(batch)
        grams = {b.kind: Gram(b.width, b.hidden_size, rehearsal.device) for b in here}
        with capture(here) as captured:
            runner.hidden[0] = runner.run(rehearsal.layer, 0, runner.hidden[0])
        for kind, gram in grams.items():
            gram.update(captured[kind].z.flatten(0, -2), captured[kind].output.flatten(0, -2))
        standing = live.now
    work = max([live.peak, *(standing + _algebra_of(b, damping, b.units, True) for b in here)])
    states = states_of(rehearsal.model, rehearsal.dtype, windows - batch.size, batch.length)
    return Phase("damage", work, states)


def _algebra_of(block: Block, damping: float, kept: int, chosen: bool) -> int:
    """Bytes that choosing units and refitting one block take beside its moments."""
    whole = block.width if chosen else kept * block.unit_width
    return _algebra(whole, block.unit_width, block.hidden_size, damping, kept / block.units, chosen)


def _algebra(
    whole: int, unit_width: int, hidden_size: int, damping: float, share: float, chosen: bool
) -> int:
    """As `_algebra_of`, of a consumer that reads so many channels and keeps a share of them."""
    scale = min(1.0, _SMALL / whole)
    width = max(1, round(unit_width * scale)) if unit_width > 1 else 1
    units = max(2, round(whole * scale / width))
    stay = max(1, min(units, round(units * share))) if chosen else units
    k, d = units * width, max(2, round(hidden_size * scale))
    generator = torch.Generator("cpu").manual_seed(0)
    gram, held = Gram(k, d), Gram(k, d)
    gram.update(
        torch.randn(4 * k, k, generator=generator, dtype=torch.float32),
        torch.randn(4 * k, d, generator=generator, dtype=torch.float32),
    )
    weight, metric = torch.ones(d, k, dtype=torch.float32), torch.eye(d, dtype=torch.float32)
    before = [weight, metric, *(t for g in (gram, held) for t in vars(g).values() if torch.is_tensor(t))]
    with LiveBytes(before) as live, torch.no_grad():
        if chosen:
            equations = Equations(gram, weight, False, damping, choosing_dtype(damping))
            right, inverse = equations.right, equations.inverse()
            del equations
            eliminate_fitted(inverse, right, width, metric=metric, keep=stay if stay < units else 0)
            del right, inverse
            columns = torch.arange(stay * width)
            gram, held = gram.part(columns), held.part(columns)
            weight = weight[:, : stay * width]
        squared_error(gram, weight, None)
        equations = Equations(gram, weight, False, damping)
        equations.solution()
        equations.inverse()
    return round(live.peak * (whole / k) ** 2)
