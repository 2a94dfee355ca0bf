"""The loop over blocks asks the device for nothing: on a GPU, every answer would stall its queue.

There is no GPU in this test: operations whose result the host has to wait for are refused as they are
dispatched, between the first decoder layer and the last.
"""

from collections import Counter
from contextlib import ExitStack

import pytest
import torch
from tiny import FAMILIES, close, kept, masked, padded, token_ids
from torch.utils._python_dispatch import TorchDispatchMode

from probeprune import Probe, ProbeEveryBatch, RefitEveryBatch, attach, compose
from probeprune.model import partition as partition_module
from probeprune.model.blocks import find_layers

aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense.default,  # .item(), int(), float(), bool()
    aten.is_nonzero.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten._unique2.default,
}


class NoWaiting(TorchDispatchMode):
    """Refuses what a host has to wait for, and counts all operations in `seen`."""

    def __init__(self, seen: Counter) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        by_mask = func in (aten.index.Tensor, aten.index_put_.default) and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        elsewhere = func is aten._to_copy.default and kwargs.get("device") is not None
        if by_mask or elsewhere or func in WAITS:
            raise AssertionError(f"{func} waits for the device")
        self.seen[func] += 1
        return func(*args, **kwargs)


@pytest.fixture
def no_waiting(monkeypatch):
    """Put `NoWaiting` around the decoder layers of a model, with swaps as on an accelerator.

    Gives the operations it saw. Fails where it saw none, or no model was guarded from first to last layer.
    """
    monkeypatch.setattr(partition_module, "_places", lambda moved, most: most)
    seen, passes = Counter(), Counter()
    with ExitStack() as guarded:

        def enter(*_: object) -> None:
            passes["begun"] += 1
            guarded.enter_context(NoWaiting(seen))

        def leave(*_: object) -> None:
            passes["ended"] += 1
            guarded.close()

        def guard(model) -> Counter:
            layers = find_layers(model)
            layers[0].register_forward_pre_hook(enter, prepend=True)
            layers[-1].register_forward_hook(leave)
            return seen

        yield guard
    assert passes["begun"] == passes["ended"] > 0, "no pass was guarded"
    assert seen[aten.mm.default] + seen[aten.addmm.default] >= 7, "the guard saw no model run"


@pytest.mark.parametrize("what", ["item", "mask", "nonzero"])
def test_the_guard_sees_what_waits(what):
    x = torch.ones(3)
    waits = {"item": lambda: bool(x.sum() > 1), "mask": lambda: x[x > 0], "nonzero": lambda: x.nonzero()}
    with pytest.raises(AssertionError, match="waits"), NoWaiting(Counter()):
        waits[what]()


@pytest.mark.parametrize("own", [0, 4])
@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize(
    ("probing", "changes"),
    [
        ({}, {}),
        ({"probe": Probe(tokens=1.0, samples=1.0), "fusion": "none"}, {}),
        ({}, {"compensation": "bias"}),
        ({"probe": Probe(parallel=True)}, {}),
        ({}, {"unit_kind": "query"}),
        ({}, {"unit_kind": "balanced"}),
    ],
    ids=["probe", "full batch", "bias", "parallel", "query", "balanced"],
)
@pytest.mark.parametrize("family", ["llama-gqa", "gemma3", "opt", "phi3-gqa"])
def test_a_prompt_is_probed_without_waiting(family, probing, changes, side, own, no_waiting):
    model = FAMILIES[family]()
    method = compose("probe", when=ProbeEveryBatch(**probing, own_positions=own), **changes)
    ids, mask = padded(side)
    with attach(model, method, 0.3, calibration=token_ids(6, 16, seed=9)) as handle, torch.no_grad():
        model(*padded("none"))
        seen = no_waiting(model)
        got, choice = model(ids, attention_mask=mask).logits[mask.bool()], kept(handle)
    assert seen[aten.index_copy_.default], "no swap was seen"
    if "compensation" not in changes:
        with masked(choice), torch.no_grad():
            close(got, model(ids, attention_mask=mask).logits[mask.bool()])


@pytest.mark.parametrize("refresh", [0, 1])
def test_a_step_is_decoded_without_waiting(refresh, no_waiting):
    model = FAMILIES["llama-gqa"]()
    method = compose("probe", when=ProbeEveryBatch(refresh=refresh))
    with attach(model, method, 0.3, calibration=token_ids(6, 16, seed=9)), torch.no_grad():
        cache = model(token_ids(), use_cache=True).past_key_values
        seen = no_waiting(model)
        model(token_ids(4, 1), past_key_values=cache)
    assert bool(seen[aten.index_copy_.default]) == bool(refresh)


@pytest.mark.parametrize("side", ["none", "left"])
def test_a_batch_is_refitted_to_without_waiting(side, no_waiting):
    model = FAMILIES["llama-gqa"]()
    method = compose("best-dynamic", when=RefitEveryBatch(Probe(pick="even")))
    ids, mask = padded(side)
    with attach(model, method, 0.3, calibration=token_ids(12, 24, seed=9)), torch.no_grad():
        no_waiting(model)
        assert model(ids, attention_mask=mask).logits[mask.bool()].isfinite().all()
