"""All methods that do not train, and what each must compute, written out by hand from its formulas.

Every general property runs over `ALL`. It is made from `METHODS`, so a row there is tested by being there. A
new compensation needs one more thing, its formula in `BY_HAND`; so does a schedule that changes consumers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import torch
from tiny import FAMILIES, PARALLEL, close, logits, opened, padded, snapshot, token_ids
from torch import nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from probeprune import METHODS, Gates, Method, Refit, attach, compose, prepare, prune, save
from probeprune.algebra.moments import Moments
from probeprune.methods import with_equal_widths
from probeprune.model.blocks import Block
from probeprune.model.linear_maps import oriented
from probeprune.prepare import Calibration, Prepared
from probeprune.runtime.handle import Handle
from probeprune.strategies.compensation import Consumer
from probeprune.strategies.importance import IMPORTANCES
from probeprune.strategies.probe import probe_size
from probeprune.strategies.probe_every_batch import ProbeEveryBatch
from probeprune.strategies.refit_every_batch import RefitEveryBatch
from probeprune.strategies.schedule import Once, When

RATIO = 0.3
WINDOWS = token_ids(8, 16, seed=9)
"""Calibration text, shorter than the sequences that the models will see."""


def _affordable(method: Method) -> Method:
    """The same method with gradients, and gates, on windows that tiny models can read."""
    if method.gate_settings is not None:
        return replace(method, gates=Gates(steps=3, batch_size=2, length=16))
    if IMPORTANCES[method.importance].criterion is None:
        return method
    return replace(method, gradients=replace(method.gradient_settings, windows=4, length=16))


COMPOSED = (
    PARALLEL,
    compose("probe", name="balanced heads", unit_kind="balanced"),
    compose("probe", name="query heads", unit_kind="query"),
    compose("probe", name="probe and bias", compensation="bias"),
    compose("probe", name="refresh", when=ProbeEveryBatch(refresh=2)),
    compose("wanda-sp", name="static balanced heads", unit_kind="balanced"),
    with_equal_widths(compose("wanda-sp", name="even widths")),
    compose("ppsp", name="least damage", allocation="damage"),
    compose("best-static", name="refit with a bias", compensation=Refit(bias=True)),
    compose("best-dynamic", name="scored, refit every batch", importance="wanda-sp"),
)
"""Combinations that no row of `METHODS` has."""


def untrained() -> dict[str, Method]:
    """All methods of `METHODS` that do not train, and `COMPOSED`, by name."""
    return {m.name: _affordable(m) for m in (*METHODS.values(), *COMPOSED) if not m.when.trains}


ALL = untrained()
STATIC = [n for n, m in ALL.items() if isinstance(m.when, Once) and m.unit_kind != "query"]
"""Methods that can be cut for good."""
KEEP_THE_PROMPT = [n for n, m in ALL.items() if not (m.when.every_batch and m.when.refresh)]
"""Methods that generate text under what the prompt chose."""
PROBE_THE_WHOLE = [
    n for n, m in ALL.items() if m.when.every_batch and probe_size(m.when.probe, 4, 24) == (4, 24)
]
"""Methods whose probe is all of a batch of 96 tokens."""
SOME_FAMILIES = ("llama-gqa", "opt", "phi3-gqa", "gpt-neox")
EVERYWHERE = (
    *("wanda-sp", "ppsp", "magnitude", "random"),
    *("probe", "probe-reuse", "full-batch", "parallel", "best-dynamic"),
)
"""Methods whose passes are checked on all families."""
_ONE_OF_EACH_KIND = ("wanda-sp", "flap", "best-static", "probe", "full-batch", "best-dynamic")
SPREAD = [
    *((SOME_FAMILIES[0], name) for name in ALL),
    *((f, n) for f in SOME_FAMILIES[1:] for n in _ONE_OF_EACH_KIND),
]
"""(family, method): all methods on one family, and one method of each kind on the others: another kind of
block meets every kind of choice, compensation and schedule. That each method computes the right thing on each
of the families is what `test_all_methods.py` says first; all else runs over these pairs."""


@cache
def prepared(family: str) -> tuple[PreTrainedModel, Prepared]:
    """A tiny model of a family, and the calibration of all methods that run on it."""
    model = FAMILIES[family]()
    names = ALL if family in SOME_FAMILIES else EVERYWHERE
    return model, prepare(model, [ALL[n] for n in names], RATIO, WINDOWS)


INPUTS = (padded("left"), padded("right"), padded("none", 4, 40), padded("none", 1))
"""Batches with and without padding, longer than calibration text, and of one sequence: (ids, mask)."""


# -- the formulas --------------------------------------------------------------------------------


@dataclass
class CutBlock:
    """One block under a cut, and the batch under way, as the formulas read them.

    Attributes:
        channels: the channels of `z` that stay, LongTensor (k,), by their place in the dense model.
        lost: the others.
        moments, consumer: as in `PrunedBlock`; None where there are none.
        when: the method's schedule, if the block follows batches; None if not.
        mask: (batch, sequence), 1 for real tokens.
        fitted: weight and bias fitted to the first batch, once there is one.
    """

    block: Block
    channels: torch.Tensor
    lost: torch.Tensor
    moments: Moments | None
    consumer: Consumer | None
    when: When | None
    mask: torch.Tensor
    fitted: tuple[torch.Tensor, torch.Tensor | None] | None = field(default=None)


def plain(cut: CutBlock, z: torch.Tensor) -> torch.Tensor:
    """The dense consumer with zeros for the channels that left."""
    consumer = cut.block.consumer
    return linear(z.index_fill(1, cut.lost, 0), oriented(consumer, consumer.weight), consumer.bias)


def with_lost_means(cut: CutBlock, z: torch.Tensor) -> torch.Tensor:
    """FLAP: what the channels that left give on average, added."""
    assert cut.moments is not None
    weight = oriented(cut.block.consumer, cut.block.consumer.weight)  # its gradient counts too
    return plain(cut, z) + weight[:, cut.lost] @ cut.moments.mean[cut.lost]


def refitted(cut: CutBlock, z: torch.Tensor) -> torch.Tensor:
    """The refitted consumer on the channels that stay; refitted again to the first batch where it follows."""
    assert cut.consumer is not None
    weight, bias = cut.consumer.weight, cut.consumer.bias
    if isinstance(cut.when, RefitEveryBatch):
        cut.fitted = cut.fitted or _fit(cut, cut.when, z)
        weight, bias = cut.fitted
    own = cut.block.consumer.bias
    return linear(z[:, cut.channels], weight.to(z.dtype), own if bias is None else bias.to(z.dtype))


def _fit(cut: CutBlock, when: RefitEveryBatch, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias that are best for calibration text and the batch's probe, from normal equations in
    float64: `argmin_D sum_i |e_i - D z_i|^2 + prior tr D M D'`."""
    start, consumer = cut.consumer, cut.block.consumer
    assert start is not None and start.inverse is not None
    batch, length = cut.mask.shape
    samples, positions = probe_size(when.probe, batch, length)
    assert samples == batch, "a probe of some samples is not written out here"
    columns = torch.tensor([(2 * i + 1) * length // (2 * positions) for i in range(positions)])
    rows = z.view(batch, length, -1)[:, columns][cut.mask[:, columns].bool()].double()
    own = cut.block.consumer_weight.double()
    target = linear(rows, own, None if consumer.bias is None else consumer.bias.double())
    rows, w = rows[:, cut.channels], start.weight.double()
    error = target - rows @ w.T - (0 if start.bias is None else start.bias.double())
    centred = rows if start.mean is None else rows - start.mean.double()
    prior = 256 * (1 / when.share - 1)
    moment = centred.T @ centred + prior * torch.linalg.inv(start.inverse.double())
    change = torch.linalg.solve(moment, centred.T @ error).T
    bias = start.bias
    if start.mean is not None and bias is not None:
        bias = (bias.double() - change @ start.mean.double()).float()
    return (w + change).float(), bias


BY_HAND: dict[str, Callable[[CutBlock, torch.Tensor], torch.Tensor]] = {
    "none": plain,
    "bias": with_lost_means,
    "least-squares": refitted,
}
"""By the compensation's kind: a consumer's output (tokens, hidden) from the dense block's `z` (tokens, n)."""


class ByHand:
    """What a method makes of its model at present, written out: the dense model, its consumers replaced.

    Made while the method is attached, used when it is not. A consumer that follows batches is fitted to the
    first batch that passes, and then stays.
    """

    def __init__(self, handle: Handle, mask: torch.Tensor) -> None:
        self.formula = BY_HAND[handle.method.compensation.kind]
        following = {r.block.name for r in handle.runtimes}
        self.cuts = []
        for pruned in handle.pruned:
            block, units = pruned.block, pruned.partition.kept_units
            kept = torch.zeros(block.units, dtype=torch.bool).index_fill_(0, units, True)
            kept = kept.repeat_interleave(block.unit_width)
            when = handle.method.when if block.name in following else None
            self.cuts.append(
                CutBlock(
                    block,
                    kept.nonzero()[:, 0],
                    (~kept).nonzero()[:, 0],
                    pruned.moments,
                    pruned.consumer,
                    when,
                    mask,
                )
            )

    @contextmanager
    def __call__(self) -> Iterator[None]:
        hooks = []
        for cut in self.cuts:

            def replace_output(_: nn.Module, args: tuple, output: torch.Tensor, cut=cut) -> torch.Tensor:
                return self.formula(cut, args[0].flatten(0, -2)).view(output.shape)

            hooks.append(cut.block.consumer.register_forward_hook(replace_output))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


@cache
def dense_logits(model: PreTrainedModel) -> list[torch.Tensor]:
    """Logits of a model with nothing attached on all `INPUTS`."""
    return [logits(model, *batch) for batch in INPUTS]


def check_passes(model: PreTrainedModel, method: Method, calibration: Calibration) -> None:
    """Under `method` the model computes what the formulas say of the units it keeps, and comes back after."""
    before, results = snapshot(model), []
    with attach(model, method, RATIO, calibration=calibration) as handle:
        assert abs(handle.removed_share - (RATIO if method.when.prunes else 0)) < 0.02
        for batch in INPUTS:
            results.append((logits(model, *batch), ByHand(handle, batch[1])))
    before.assert_untouched()
    for (got, by_hand), batch, dense in zip(results, INPUTS, dense_logits(model), strict=True):
        with by_hand():
            close(got, logits(model, *batch))
        if method.when.prunes:
            assert (got - dense).abs().max() > 0.01 * dense.abs().max(), "nothing was pruned"
        else:
            assert got.equal(dense)


def check_cut(
    build: Callable[[], PreTrainedModel], method: Method, calibration: Calibration, folder: Path
) -> PreTrainedModel:
    """A model cut by `method` computes what the attached one does, and so does its checkpoint, opened again.

    `calibration` must not be tied to one model object. Returns the model from the checkpoint.
    """
    model, batch = build(), padded("left")
    with attach(model, method, RATIO, calibration=calibration) as handle:
        attached, units = logits(model, *batch), handle.kept_units()
    smaller = build()
    pruning = prune(smaller, method, RATIO, calibration=calibration)
    cut = logits(smaller, *batch)
    assert pruning.kept == tuple(units)
    assert abs(pruning.removed_share - RATIO) < 0.02
    close(cut, attached)
    exported = save(smaller, folder / "checkpoint")
    loaded = opened(folder / "checkpoint")
    # Biases that a config gives to whole blocks are zeros where the block had none.
    biases = sum(p.numel() for p in exported.parameters()) - smaller.num_parameters()
    assert smaller.num_parameters() <= loaded.num_parameters() < model.num_parameters()
    assert loaded.num_parameters() == exported.num_parameters()
    assert logits(loaded, *batch).equal(logits(exported, *batch))
    if biases:
        close(logits(exported, *batch), cut)
    else:
        assert logits(exported, *batch).equal(cut)
    return loaded
