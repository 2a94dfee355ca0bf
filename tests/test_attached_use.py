"""What users and other libraries do to a model while a method is attached: follows, or is refused whole.

Each kind was found by the soak test (`tests/soak`).
"""

import copy
import pickle

import pytest
import torch
from tiny import FAMILIES, PROBING, close, kept, logits, masked, padded, snapshot, token_ids
from torch.nn.utils.parametrize import register_parametrization

from probeprune import UsageError, attach
from probeprune.model.blocks import find_blocks
from probeprune.model.passes import find_decoder

METHODS = ("wanda-sp", PROBING)


@pytest.mark.parametrize("where", ["model", "decoder", "layer", "mlp", "linear"])
@pytest.mark.parametrize("method", METHODS)
def test_a_state_dict_that_is_refused_has_changed_nothing(llama, method, where):
    model, calibration = llama
    decoder = find_decoder(model)
    part = {
        "model": model,
        "decoder": decoder,
        "layer": decoder.layers[4],
        "mlp": decoder.layers[4].mlp,
        "linear": decoder.layers[4].mlp.down_proj,
    }[where]
    before = snapshot(model)
    other = {name: torch.zeros_like(value) for name, value in part.state_dict().items()}
    with (
        attach(model, method, 0.3, calibration=calibration),
        pytest.raises(UsageError, match="before loading"),
    ):
        part.load_state_dict(other)
    before.assert_untouched()
    part.load_state_dict(part.state_dict())


@pytest.mark.parametrize("ratio", [0.0, 0.3])
@pytest.mark.parametrize("method", ["dense", *METHODS])
@pytest.mark.parametrize("part", ["model", "decoder"])
@pytest.mark.parametrize("how", [copy.deepcopy, pickle.dumps])
def test_copies_are_refused_however_little_is_pruned(llama, method, ratio, part, how):
    model, calibration = llama
    whole = model if part == "model" else find_decoder(model)
    with (
        attach(model, method, ratio, calibration=calibration),
        pytest.raises(UsageError, match="before copying or pickling"),
    ):
        how(whole)
    how(whole)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama-bias", "phi3-gqa", "gpt-neox"])
def test_gradients_lie_as_their_weights_do_after_detaching(family, method):
    model, calibration = FAMILIES[family](), token_ids(6, 16, seed=9)
    inputs = padded("left")

    def loss():
        return model(*inputs).logits[inputs[1].bool()].square().mean()

    with attach(model, method, 0.3, calibration=calibration) as handle:
        loss().backward()
        choice = kept(handle)
        logits(model, token_ids(2, 9), torch.ones(2, 9, dtype=torch.long))  # may bring other units into view
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with masked(choice):
        loss().backward()
    for gradient, p in zip(got, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, p.grad, rtol=1e-4, atol=1e-5 * float(p.grad.abs().max()))


@pytest.mark.parametrize("family", ["llama-bias", "opt"])
def test_a_bias_that_a_compensation_adds_to_keeps_its_gradient(family):
    model, calibration = FAMILIES[family](), token_ids(6, 16, seed=9)
    biases = [b.consumer.bias for b in find_blocks(model)]
    with attach(model, "flap", 0.3, calibration=calibration) as handle:
        assert handle.pruned
        output = model(token_ids()).logits
        with torch.no_grad():
            assert output.equal(model(token_ids()).logits)
        got = torch.autograd.grad(output.square().mean(), biases)
        # By differences: the same step in every bias moves the loss as the gradients say.
        change = []
        for step in (1e-2, -1e-2):
            hooks = [
                b.consumer.register_forward_hook(lambda m, a, out, step=step: out + step)
                for b in handle.blocks
            ]
            with torch.no_grad():
                change.append(model(token_ids()).logits.double().square().mean())
            for hook in hooks:
                hook.remove()
    slope = sum(g.sum() for g in got).double()
    torch.testing.assert_close((change[0] - change[1]) / 2e-2, slope, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama-gqa", "gpt-neox", "opt"])
def test_a_forward_that_users_wrapped_before_attaching_may_take_anything(family, method):
    model, calibration = FAMILIES[family](), token_ids(6, 16, seed=9)
    decoder, inputs = find_decoder(model), padded("left")
    calls = []

    def wrapped(*args, _forward=decoder.forward, **kwargs):
        calls.append(len(args))
        return _forward(*args, **kwargs)

    decoder.forward = wrapped
    with attach(model, method, 0.3, calibration=calibration) as handle:
        got, choice = logits(model, *inputs), kept(handle)
    assert calls and decoder.forward is wrapped
    with masked(choice):
        close(got, logits(model, *inputs))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("change", ["wrap", "replace", "delete"])
def test_a_forward_that_users_put_in_place_while_attached_stays(llama, method, change):
    model, calibration = llama
    decoder, inputs, calls = find_decoder(model), padded("left"), []
    dense, before = logits(model, *inputs), snapshot(model)
    handle = attach(model, method, 0.3, calibration=calibration)
    inner = decoder.forward if change == "wrap" else type(decoder).forward.__get__(decoder)

    def wrapped(*args, **kwargs):
        calls.append(change)
        return inner(*args, **kwargs)

    if change == "delete":
        del decoder.forward
    else:
        decoder.forward = wrapped
    handle.detach()
    try:
        assert logits(model, *inputs).equal(dense)
        assert calls == [] if change == "delete" else decoder.forward is wrapped and calls == [change]
        copy.deepcopy(decoder)
    finally:
        decoder.__dict__.pop("forward", None)
    before.assert_untouched()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama-bias", "phi3-gqa"])
def test_a_linear_map_that_users_wrapped_while_attached_goes_on_after(family, method):
    model, calibration = FAMILIES[family](), token_ids(6, 16, seed=9)
    inputs, calls = padded("left"), []
    dense = logits(model, *inputs)
    with attach(model, method, 0.3, calibration=calibration) as handle:
        for member in (m for b in find_blocks(FAMILIES[family]()) for m in b.members):
            linear = model.get_submodule(member.name)

            def wrapped(x, _forward=linear.forward):
                calls.append(x.shape)
                return _forward(x)

            linear.forward = wrapped
        got, choice = logits(model, *inputs), kept(handle)
        assert calls
    assert logits(model, *inputs).equal(dense)
    with masked(choice):
        close(got, logits(model, *inputs))


def test_a_pass_without_input_is_the_models_own_error(llama):
    model, calibration = llama
    with pytest.raises(ValueError) as dense:
        model()
    with attach(model, PROBING, 0.3, calibration=calibration), pytest.raises(ValueError) as attached:
        model()
    assert str(attached.value) == str(dense.value)


@pytest.mark.parametrize("method", METHODS)
def test_a_change_of_weights_is_not_forgotten_when_the_model_is_moved(llama, method):
    model, calibration = llama
    weight = find_blocks(model)[-1].consumer.weight
    with attach(model, method, 0.3, calibration=calibration), torch.no_grad():
        weight.mul_(1)
        for _ in range(2):
            with pytest.raises(UsageError, match="were changed while a method is attached"):
                model(token_ids())
            model.to(torch.float64)
    model.to(torch.float32)


REPLACED = {
    "assigned": lambda m: setattr(
        m, "weight", torch.nn.Parameter(torch.zeros(m.out_features, m.in_features))
    ),
    "taken away": lambda m: delattr(m, "weight"),
    "registered": lambda m: m.register_parameter("extra", torch.nn.Parameter(torch.zeros(1))),
    "parametrized": lambda m: register_parametrization(m, "weight", torch.nn.Identity()),
}


@pytest.mark.parametrize("how", REPLACED)
@pytest.mark.parametrize("method", METHODS)
def test_other_parameters_in_place_of_a_view_are_refused(llama, method, how):
    model, calibration = llama
    before = snapshot(model)
    with attach(model, method, 0.3, calibration=calibration):
        for member in find_blocks(FAMILIES["llama-gqa"]())[-1].members:
            with pytest.raises(UsageError, match="a method is attached to this model; detach it before"):
                REPLACED[how](model.get_submodule(member.name))
    before.assert_untouched()
