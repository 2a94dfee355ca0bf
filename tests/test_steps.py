"""A step of decoding under the prompt's choice runs no hook of ours; those of others keep their places."""

import pytest
import torch
from tiny import FAMILIES, PARALLEL, PROBING, close, kept, masked, token_ids
from torch import nn
from transformers import DynamicCache

from probeprune import ProbeEveryBatch, attach, compose
from probeprune.model.blocks import find_layers
from probeprune.model.switched_hooks import SwitchedHooks


def test_hooks_come_back_to_their_places():
    module, seen = nn.Linear(2, 2), []

    def hook(name):
        return lambda *args: seen.append(name)

    def call():
        seen.clear()
        module(torch.ones(1, 2))
        return list(seen)

    module.register_forward_pre_hook(hook("a"))
    own = [
        module.register_forward_pre_hook(hook("own"), with_kwargs=True),
        module.register_forward_hook(hook("behind"), always_call=True),
    ]
    hooks = SwitchedHooks()
    hooks.add(own)
    last = module.register_forward_pre_hook(hook("b"))
    assert call() == ["a", "own", "b", "behind"]
    hooks.switch(False)
    hooks.switch(False)
    assert call() == ["a", "b"] and not module._forward_hooks_always_called
    module.register_forward_pre_hook(hook("c"))
    last.remove()
    hooks.switch(True)
    assert call() == ["a", "own", "c", "behind"]
    hooks.add([module.register_forward_pre_hook(hook("second")), module.register_forward_pre_hook(hook("d"))])
    hooks.add([module.register_forward_pre_hook(hook("first"), prepend=True)])
    for _ in range(2):
        hooks.switch(False)
        hooks.switch(True)
        assert call() == ["first", "a", "own", "c", "second", "d", "behind"]
    hooks.switch(False)
    hooks.remove()
    hooks.switch(True)
    assert call() == ["a", "c"] and not module._forward_pre_hooks_with_kwargs


def hooks_of(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in find_layers(model).modules())


@pytest.mark.parametrize(
    ("method", "bare"),
    [
        (PROBING, True),
        (PARALLEL, True),
        ("best-dynamic", True),
        (compose("probe", when=ProbeEveryBatch(refresh=3)), False),
    ],
)
@pytest.mark.parametrize("family", ["llama-gqa", "opt", "phi3-gqa"])
def test_steps_run_without_hooks_and_prompts_with_them(method, bare, family):
    model = FAMILIES[family]()
    counts: list[int] = []
    watch = find_layers(model)[0].register_forward_pre_hook(lambda *_: counts.append(hooks_of(model)))
    with attach(model, method, 0.3, calibration=token_ids(6, 16, seed=9)), torch.no_grad():
        counts.clear()  # of calibration
        for seed in range(2):
            cache = DynamicCache(config=model.config)
            model(token_ids(2, 8, seed=seed), past_key_values=cache)
            for _ in range(2):
                model(token_ids(2, 1, seed=7), past_key_values=cache)
    prompt, step = counts[0], counts[1]
    assert counts == [prompt, step, step] * 2 and prompt > 1
    assert (step == 1) == bare, "the one that counts is left"
    watch.remove()
    assert hooks_of(model) == 0


def test_a_failed_step_and_a_detach_between_steps_leave_nothing(llama):
    model, calibration = llama
    ids = token_ids(2, 8)
    with attach(model, PROBING, 0.3, calibration=calibration) as handle, torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        layer = find_layers(model)[-1]

        def fail(*_):
            raise RuntimeError("stop")

        failing = layer.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="stop"):
            model(token_ids(2, 1), past_key_values=cache)
        failing.remove()
        got = model(ids).logits
        choice = kept(handle)
        cache = model(ids, use_cache=True).past_key_values
        model(token_ids(2, 1), past_key_values=cache)
    assert hooks_of(model) == 0
    with masked(choice), torch.no_grad():
        close(got, model(ids).logits)


def test_what_a_map_shows_follows_its_weight_to_another_dtype_and_back(llama):
    model, calibration = llama
    ids = token_ids(2, 8)
    for method in ("wanda-sp", "best-static", "flap"):
        with attach(model, method, 0.3, calibration=calibration), torch.no_grad():
            wanted = model(ids).logits
            model.double()
            assert model(ids).logits.dtype == torch.float64
            model.float()
            close(model(ids).logits, wanted)
            with torch.enable_grad():
                close(model(ids).logits.detach(), wanted)
