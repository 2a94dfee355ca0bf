"""What pruning a model will make, take and be refused for, before any work: from its shape alone.

No weight is read. Memory is what the work holds when it is rehearsed without numbers (`model/footprint.py`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from probeprune.calibration import footprints, gradient_footprints
from probeprune.errors import UsageError
from probeprune.jobs.prune import Texts, check_windows, rehearsed
from probeprune.methods import Method
from probeprune.model.blocks import Block
from probeprune.model.cost import blocks_flops, product_rate
from probeprune.model.described import Layout
from probeprune.model.experts import Stack, find_parts
from probeprune.model.footprint import Batch, Phase, Rehearsal, measuring
from probeprune.model.multimodal import text_config
from probeprune.model.outline import Outline
from probeprune.model.placing import Work, in_use, opening_of, place, retained
from probeprune.model.shared_kv import Carried
from probeprune.plan import Kept, expert_needs, loses_experts, needs, needs_for, parts_of
from probeprune.preparation import DAMAGE_WINDOWS
from probeprune.strategies.allocation import ALLOCATIONS
from probeprune.strategies.compensation import Refit
from probeprune.strategies.expert_importance import EXPERT_IMPORTANCES
from probeprune.strategies.importance import IMPORTANCES
from probeprune.strategies.probe_every_batch import ProbeEveryBatch
from probeprune.strategies.schedule import Once
from probeprune.strategies.widths import Prunable

_TOKENIZER = 1200
"""Bytes of a tokenizer in memory for each token of its vocabulary (SmolLM2's takes 60 MB)."""


@dataclass(frozen=True)
class Job:
    """A pruning job, as `prune_to` does it."""

    method: Method
    ratio: float
    layout: Layout
    texts: Texts
    dtype: torch.dtype
    """To compute in."""
    device: torch.device
    dtype_to_save: torch.dtype
    steps: int = 1


@dataclass(frozen=True)
class Figures:
    """One model, dense or pruned."""

    parameters: int
    """Tied ones once."""
    flops_per_token: int
    """Of the decoder, matrix products, in windows of the length of the job's."""
    head_flops_per_token: int
    """Of the output head."""
    kv_bytes_per_token: int
    """Of the KV cache, in the dtype to save."""
    disk_bytes: int
    """Of the weights, in the dtype to save."""
    serving_bytes: int
    """Memory for one sequence of the job's length: weights, cache and activations, without libraries."""


@dataclass(frozen=True)
class Memory:
    """Bytes that the job takes on its device at its peak, in one mode."""

    bytes: int
    """In all, with what this process has in use."""
    largest: str
    """The part of the work that takes most."""
    parts: tuple[tuple[str, int], ...]
    """Each part, in order, without what this process has in use."""


@dataclass(frozen=True)
class Forecast:
    """What a job will make and take."""

    refused: str | None
    """Why it would be refused, in the words of `prune`; None if it would not."""
    exact: bool
    """Whether widths follow from the ratio; otherwise they will be measured, and the figures after the cut
    are those of an equal one."""
    before: Figures
    after: Figures | None
    in_memory: Memory | None
    by_layer: Memory | None
    """A layer at a time, with all hidden states in files: the least that can be asked for; None where a part
    of the job needs all layers at once."""
    states_bytes: int
    """Of hidden states that a layer at a time keeps in memory as far as they find room, and else in files."""
    base_bytes: int
    """What this process has in use already: libraries, on a CPU; counted in both."""
    seconds: float | None
    """About how long the matrix products of the job take on this machine now; None if that was not asked."""


def forecast(outline: Outline, job: Job, *, memory: int | None = None, timed: bool = False) -> Forecast:
    """What a job on a model will make and take, and why it would be refused.

    Args:
        outline: the model.
        job: what would be done with it.
        memory: the limit that would be given; None for most that is free.
        timed: measure about a second of matrix products, for `seconds`.
    """
    shape, method = outline.model, job.method
    exact = not (ALLOCATIONS[method.allocation].needs or ALLOCATIONS[method.allocation].needs_scores)
    opens_tokenizer = not outline.has_tokenizer and job.device.type == "cpu"
    later = _TOKENIZER * text_config(shape.config).vocab_size if opens_tokenizer else 0
    base = in_use(job.device)[0] + retained(job.device) + later
    refused, after, phases, kept = None, None, [], []
    try:
        done, pruned = rehearsed(shape, method, job.ratio, job.layout, job.steps)
        check_windows(method, job.texts.calibration, shape)
        kept = [len(k.units) for k in done.kept]
        after = _figures(pruned, job)
        phases = phases_of(shape, pruned, kept, job)
        place(outline.name, shape, job.dtype, job.device, memory, lambda *_: phases, outline.stored, later)
    except UsageError as error:
        refused = str(error)
    try:
        before = _figures(shape, job)
    except UsageError as error:  # of no known family
        raise UsageError(refused or str(error)) from None
    if after is None:
        return Forecast(refused, exact, before, None, None, None, 0, base, None)
    opening = opening_of(shape, job.dtype, job.device, outline.stored)
    return Forecast(
        refused,
        exact,
        before,
        after,
        _memory(opening.in_memory(phases), base),
        None if any(p.whole for p in phases) else _memory(opening.by_layer(phases), base),
        max(p.states for p in phases),
        base,
        _seconds(shape, pruned, kept, job) if timed else None,
    )


def _memory(parts: Sequence[tuple[str, int]], base: int) -> Memory:
    largest, size = max(parts, key=lambda part: part[1])
    return Memory(base + size, largest, tuple(parts))


def _figures(model: Any, job: Job) -> Figures:
    blocks, length = find_parts(model), max(job.texts.calibration.length, 1)
    config = text_config(model.config)
    width, vocabulary = config.hidden_size, config.vocab_size
    cached = sum(b.cached_numbers(b.units) for b in blocks if isinstance(b, Block) and b.kind == "attention")
    itemsize = job.dtype_to_save.itemsize
    parameters = sum(p.numel() for p in model.parameters())
    kv = cached * itemsize
    active = Rehearsal(model, job.dtype_to_save, job.device).layer_pass(Batch(1, length))
    flops = blocks_flops(blocks, [b.units for b in blocks], 1, length) // length + Carried(model).given_flops
    return Figures(
        parameters=parameters,
        flops_per_token=flops,
        head_flops_per_token=2 * width * vocabulary,
        kv_bytes_per_token=kv,
        disk_bytes=parameters * itemsize,
        serving_bytes=parameters * itemsize + kv * length + active + 8 * vocabulary,
    )


# -- memory ----------------------------------------------------------------------------------------


def phases_of(shape: Any, pruned: Any, kept: Sequence[int], job: Job) -> list[Phase]:
    """The parts of a job, in order, with what each takes beside the weights.

    Args:
        shape: the dense model, without numbers.
        pruned: the pruned one.
        kept: number of units that each block keeps.
        job: the job.
    """
    method, texts = job.method, job.texts
    batch = Batch(texts.batch_size, texts.evaluation.length)
    dense = Rehearsal(shape, job.dtype, job.device, method.unit_kind)
    phases = _evaluating(dense, batch, texts.evaluation.windows, 0)
    more, held = _statistics(dense, kept, job)
    phases += more
    before = parts_of(shape, method)
    changed = [n for n, (b, k) in enumerate(zip(before, kept, strict=True)) if k < b.units]
    after = find_parts(pruned)
    cut = sum(after[n].parameters for n in changed) * job.dtype.itemsize
    largest = max((p.numel() for b in before for m in _modules(b) for p in m.parameters()), default=0)
    phases.append(Phase("the cut", largest * job.dtype.itemsize, kept=held, layers=2, cut=cut))
    small = Rehearsal(pruned, job.dtype, job.device)
    return phases + _evaluating(small, batch, texts.evaluation.windows, cut)


def _modules(block: Prunable) -> list[nn.Module]:
    """The modules that hold the weights of a block."""
    return [block.module] if isinstance(block, Stack) else [m.linear for m in block.members]


def pruning_work(method: Method, ratio: float, layout: Layout, texts: Texts, steps: int = 1) -> Work:
    """The parts of a pruning job, for `load_model(work=)`. Asked for them, it raises what `rehearse` does."""

    def work(shape: Any, dtype: torch.dtype, device: torch.device) -> list[Phase]:
        done, pruned = rehearsed(shape, method, ratio, layout, steps)
        job = Job(method, ratio, layout, texts, dtype, device, dtype, steps)
        return phases_of(shape, pruned, [len(k.units) for k in done.kept], job)

    return work


def _evaluating(rehearsal: Rehearsal, batch: Batch, windows: int, cut: int) -> list[Phase]:
    if not windows:
        return []
    state, found = "pruned" if cut else "dense", measuring(rehearsal, batch, windows)
    return [Phase(f"{p.name} ({state})", p.work, p.states, layers=p.layers, cut=cut) for p in found]


def comparing_work(methods: Iterable[tuple[Method, float]], texts: Texts) -> Work:
    """The parts of the work that attaches methods, each at its ratio and in turn, and measures perplexity.

    For `load_model(work=)`. Methods that train count as they do before they are trained.
    """

    def work(shape: Any, dtype: torch.dtype, device: torch.device) -> list[Phase]:
        phases: list[Phase] = []
        batch = Batch(texts.batch_size, texts.evaluation.length)
        for method, ratio in methods:
            if not method.when.prunes:
                phases += _evaluating(Rehearsal(shape, dtype, device), batch, texts.evaluation.windows, 0)
                continue
            once = replace(method, when=Once(), blocks=_losing(method))
            done, _ = rehearsed(shape, once, ratio, "per-layer")
            job = Job(method, ratio, "per-layer", texts, dtype, device, dtype)
            dense = Rehearsal(shape, dtype, device, method.unit_kind)
            more, made = _statistics(dense, [len(k.units) for k in done.kept], job, following=True)
            copies = _copies(parts_of(shape, once), done.kept) * dtype.itemsize
            phases += more
            evaluating = _evaluating(dense, batch, texts.evaluation.windows, 0)
            phases += [replace(_with(p, made), copies=copies) for p in evaluating]
        return phases

    return work


def _losing(method: Method) -> tuple[Any, ...]:
    """The kinds of blocks that lose units under a method, whichever schedule takes the place of its own."""
    if method.experts_stay is None:
        return method.blocks
    return tuple(kind for kind in method.blocks if kind != "experts") or method.blocks


def _copies(parts: Sequence[Prunable], kept: Sequence[Kept]) -> int:
    """Parameters that an attached method holds beside the dense weights: what stays of cut stacks of experts
    (`StackCut`)."""
    pairs = zip(parts, kept, strict=True)
    return sum(
        len(k.units) * p.unit_parameters for p, k in pairs if isinstance(p, Stack) and len(k.units) < k.of
    )


def _statistics(
    dense: Rehearsal, kept: Sequence[int], job: Job, following: bool = False
) -> tuple[list[Phase], int]:
    """The parts of the work that collects what the method needs, and the bytes of that."""
    method, text = job.method, job.texts.calibration
    batch, parts = Batch(job.texts.batch_size, text.length), needs(method)
    if dense.stacks and loses_experts(method, dense.stacks):
        parts |= expert_needs(method)
    phases: list[Phase] = []
    held, sensitive = 0, 0
    if "moments" in parts:
        own = method.when.own_positions if isinstance(method.when, ProbeEveryBatch) else 0
        phases.append(footprints.moments(dense, batch, text.windows, own))
        held += phases[-1].kept
    if "routed" in parts:
        exchange = method.experts == "expert" and EXPERT_IMPORTANCES[method.expert_importance].exchange
        phases.append(_with(footprints.routed(dense, batch, text.windows, exchange), held))
        held = phases[-1].kept
    if "saliences" in parts:
        criterion = str(IMPORTANCES[method.importance].criterion)
        wide = dense
        if job.dtype.itemsize < 4:
            wide = Rehearsal(dense.model, torch.float32, job.device, method.unit_kind)
        channels = method.experts == "channel" and loses_experts(method, dense.stacks)
        phases += gradient_footprints.saliences(dense, wide, criterion, method.gradient_settings, channels)
    if gates := method.gate_settings:
        more, started = _statistics(dense, kept, replace(job, method=method.start))
        held += started
        phases += [*more, _with(gradient_footprints.gates(dense, gates), held)]
    how = method.refit or Refit()
    chosen = "consumers" in parts and method.ordered_by_refit
    if "damages" in parts or (chosen and how.sensitivity):
        windows = min(max(how.sensitivity, 1), text.windows)
        more, sensitive = gradient_footprints.sensitivities(dense, windows, text.length)
        phases += more
    if "damages" in parts:
        part = footprints.damages(dense, batch, min(text.windows, DAMAGE_WINDOWS), how.damping[0])
        phases.append(_with(part, sensitive))
    if "consumers" in parts:
        more, made = footprints.consumers(dense, batch, text.windows, how, kept, chosen, following)
        phases += [_with(part, sensitive + held) for part in more]
        held += made
    return phases, held


def _with(phase: Phase, kept: int) -> Phase:
    return replace(phase, kept=phase.kept + kept)


# -- time ------------------------------------------------------------------------------------------


def _seconds(shape: Any, pruned: Any, kept: Sequence[int], job: Job) -> float:
    """About how long the matrix products of a job take: their number, over what this machine does now."""
    method, texts = job.method, job.texts
    blocks = parts_of(shape, method)
    dense, small = _figures_flops(shape, texts), _figures_flops(pruned, texts)
    config = text_config(shape.config)
    head = 2 * config.hidden_size * config.vocab_size
    evaluated = texts.evaluation.windows * texts.evaluation.length
    text, parts = texts.calibration, needs_for(method, blocks)
    tokens = text.windows * text.length
    flops = evaluated * (dense + small + 2 * head)
    double = 0.0
    how = method.refit or Refit()
    if gates := method.gate_settings:  # a pass of the teacher; one with gates, and back to these
        parts |= needs_for(method.start, blocks)
        flops += gates.steps * gates.batch_size * gates.length * 3 * (dense + head)
    flops += tokens * dense * len({"moments", "routed"} & parts)
    if "saliences" in parts:
        gradients = method.gradient_settings
        flops += gradients.windows * gradients.length * (4 * dense + 3 * head)
    chosen = "consumers" in parts and method.ordered_by_refit
    if "damages" in parts or (chosen and how.sensitivity):
        flops += min(max(how.sensitivity, 1), text.windows) * text.length * (4 * dense + 3 * head)
    if "damages" in parts:
        looked_at = min(text.windows, DAMAGE_WINDOWS) * text.length
        flops += looked_at * (dense + sum(_moment_flops(b, b.width) for b in blocks if isinstance(b, Block)))
        double += sum(16 * b.width**3 / 3 for b in blocks if isinstance(b, Block))
    if "consumers" in parts:
        passes = 4 if how.sequential else 1
        flops += min(text.windows, how.windows) * text.length * passes * dense
        for b, k in zip(blocks, kept, strict=True):
            if isinstance(b, Stack):
                if k < b.units:
                    width = b.width if chosen else k
                    seen = min(text.windows, how.windows) * text.length * b.per_token
                    flops += seen * 2 * width * (width + b.hidden_size)
                    double += b.experts * (16 if chosen else 2) * width**3 / 3
                continue
            width = b.width if chosen else k * b.unit_width
            if k < b.units:
                flops += min(text.windows, how.windows) * text.length * _moment_flops(b, width)
                double += (16 if chosen else 2) * width**3 / 3
    linear_blocks = [b for b in blocks if isinstance(b, Block)]
    rate = product_rate(linear_blocks, job.dtype, job.device, min(texts.batch_size * text.length, 1024))
    exact = rate
    if double and job.device.type != "mps":
        exact = product_rate(linear_blocks, torch.float64, job.device, 256)
    return float(flops / rate + double / exact)


def _figures_flops(model: Any, texts: Texts) -> float:
    blocks, length = find_parts(model), texts.calibration.length
    return blocks_flops(blocks, [b.units for b in blocks], 1, length) / length


def _moment_flops(block: Block, width: int) -> int:
    """FLOPs of adding one token to the moments of a refit."""
    return 2 * width * (width + block.hidden_size)
