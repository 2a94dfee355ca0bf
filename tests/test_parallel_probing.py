"""Probes that run beside the block before: the same choices, in order, and a broken one hurts no other."""

from contextlib import contextmanager

import pytest
from tiny import (
    FAMILIES,
    PARALLEL,
    SIDES,
    logits,
    moments_of,
    padded,
    token_ids,
)

from probeprune import attach
from probeprune.algebra.moments import History
from probeprune.runtime.block import BlockRuntime


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_runs_beside_is_what_would_run_in_turn(family, side, monkeypatch):
    # A probe beside the block before takes masks and positions from an earlier layer. Here it waits for its
    # turn instead, and takes what its own layer is given.
    model = FAMILIES[family]()
    calibration = token_ids(6, 16, seed=9)
    inputs = padded(side)
    with attach(model, PARALLEL, 0.3, calibration=calibration) as handle:
        logits(model, *inputs)
        want = handle.kept_units()
    probe, stale = BlockRuntime._probe, {}

    def in_turn(self, residual, x, kwargs, norm="in turn"):
        if norm != "in turn":  # not now
            stale[self.block.name] = residual
            self.current.ahead = ""
        elif self.block.name in stale:
            residual = stale[self.block.name]
            probe(self, residual, residual, kwargs, self.block.norm)
        else:
            probe(self, residual, x, kwargs)

    monkeypatch.setattr(BlockRuntime, "_probe", in_turn)
    with attach(model, PARALLEL, 0.3, calibration=calibration) as handle:
        logits(model, *inputs)
        assert handle.kept_units() == want
        pruned = [r.block for r in handle.runtimes]
    late = len({handle.current.layer_type(b) for b in pruned if b.kind == "attention"})
    assert len(stale) == len(pruned) - late, "the first attention of each type of layer alone waits"


def test_a_probe_starts_in_front_of_the_block_before_and_is_waited_for(llama):
    # The order in which a GPU is given its work, told by a queue that only writes down.
    model, calibration = llama
    log = []

    class Queue:
        def __init__(self, name):
            self.name = name

        @contextmanager
        def run(self, read):
            log.append(("starts", self.name))
            yield

        def join(self):
            log.append(("joins", self.name))

    with attach(model, PARALLEL, 0.3, calibration=calibration) as handle:
        names = [r.block.name for r in handle.runtimes]
        hooks = []
        for r in handle.runtimes:
            r.side_stream = Queue(r.block.name)

            def enter(*_: object, r=r) -> None:
                log.append(("runs", r.block.name))

            hooks.append(r.block.entry.register_forward_pre_hook(enter))
        logits(model, *padded("left"))
        for hook in hooks:
            hook.remove()
    want = []
    for name, following in zip(names, [*names[1:], None], strict=True):
        want += [("joins", name)] * (name != names[0])
        want += [("starts", following)] * (following is not None)
        want.append(("runs", name))
    assert log == want


def test_a_batch_after_one_that_broke_beside_is_like_any_other(llama, monkeypatch):
    model, calibration = llama
    moments = moments_of(model, calibration)
    inputs = padded("left")
    with attach(model, PARALLEL, 0.3, calibration=calibration) as handle:
        logits(model, *inputs)
        want = handle.kept_units()
    with attach(model, PARALLEL, 0.3, calibration=calibration) as handle:
        with monkeypatch.context() as broken:
            broken.setattr(handle.runtimes[3].pruned, "cut", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                logits(model, *padded("right"))
        for r in handle.runtimes:  # what the broken batch moved
            fresh = History(moments[r.block.name], 0.99).energy
            r.follower.history.energy[:] = fresh[:, r.pruned.partition.channels]
        logits(model, *inputs)
        assert handle.kept_units() == want
