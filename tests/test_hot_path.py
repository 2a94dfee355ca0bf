"""The loop over blocks asks the device for nothing: on a GPU, every answer would stall its queue.

There is no GPU in this test: operations whose result the host has to wait for are refused as they are
dispatched, between the first decoder layer and the last.
"""

from contextlib import ExitStack

import pytest
import torch
from tiny import FAMILIES, PROBING, close, kept, masked, padded, token_ids
from torch.utils._python_dispatch import TorchDispatchMode

from probeprune import Probe, attach, calibrate, compose
from probeprune.model import partition as partition_module
from probeprune.model.blocks import find_layers
from probeprune.strategies.probe_every_batch import ProbeEveryBatch

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
    """Refuses what a host has to wait for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        by_mask = func in (aten.index.Tensor, aten.index_put_.default) and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        elsewhere = func is aten._to_copy.default and kwargs.get("device") is not None
        if by_mask or elsewhere or func in WAITS:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **kwargs)


@pytest.fixture
def no_waiting(monkeypatch):
    """Put `NoWaiting` around the decoder layers of a model, with swaps as on an accelerator."""
    monkeypatch.setattr(partition_module, "_places", lambda moved, most: most)
    with ExitStack() as guarded:

        def enter(*_: object) -> None:
            guarded.enter_context(NoWaiting())

        def guard(model) -> None:
            layers = find_layers(model)
            layers[0].register_forward_pre_hook(enter, prepend=True)
            layers[-1].register_forward_hook(lambda *_: guarded.close())

        yield guard


@pytest.mark.parametrize("what", ["item", "mask", "nonzero"])
def test_the_guard_sees_what_waits(what):
    x = torch.ones(3)
    waits = {"item": lambda: bool(x.sum() > 1), "mask": lambda: x[x > 0], "nonzero": lambda: x.nonzero()}
    with pytest.raises(AssertionError, match="waits"), NoWaiting():
        waits[what]()


@pytest.mark.parametrize("own", [0, 4])
@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"probe": Probe(reuse=0, fusion="none", tokens=1.0, samples=1.0)},
        {"compensation": "bias"},
        {"probe": Probe(parallel=True)},
        {"units": "query"},
        {"units": "balanced"},
    ],
    ids=["probe", "full batch", "bias", "parallel", "query", "balanced"],
)
@pytest.mark.parametrize("family", ["llama-gqa", "gemma3", "opt", "phi3-gqa"])
def test_a_prompt_is_probed_without_waiting(family, changes, side, own, no_waiting):
    model = FAMILIES[family]()
    calibration = token_ids(6, 16, seed=9), own_positions=own
    ids, mask = padded(side)
    with attach(model, compose(PROBING, **changes), 0.3, calibration=calibration) as handle, torch.no_grad():
        model(*padded("none"))
        no_waiting(model)
        got, choice = model(ids, attention_mask=mask).logits[mask.bool()], kept(handle)
    if "compensation" not in changes:
        with masked(choice), torch.no_grad():
            close(got, model(ids, attention_mask=mask).logits[mask.bool()])


@pytest.mark.parametrize("refresh", [0, 1])
def test_a_step_is_decoded_without_waiting(refresh, no_waiting):
    model = FAMILIES["llama-gqa"]()
    calibration = token_ids(6, 16, seed=9)
    method = compose("probe", when=ProbeEveryBatch(Probe(reuse=0), refresh=refresh))
    with attach(model, method, 0.3, calibration=calibration), torch.no_grad():
        cache = model(token_ids(), use_cache=True).past_key_values
        no_waiting(model)
        model(token_ids(4, 1), past_key_values=cache)
