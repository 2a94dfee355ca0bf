"""Attaching: what a pruned pass computes, and what is left after errors and a detach."""

import pytest
import torch
from tiny import (
    DYNAMIC,
    FAMILIES,
    PROBING,
    close,
    kept,
    logits,
    lost_means_added,
    masked,
    moments_of,
    padded,
    token_ids,
)

from probeprune import UsageError, attach, compose
from probeprune.model.blocks import find_blocks
from probeprune.model.passes import find_decoder


def test_keeping_everything_is_dense(calibrated):
    model, calibration = calibrated
    inputs = padded("left")
    dense = logits(model, *inputs)
    for method in ("dense", "flap", *DYNAMIC):
        with attach(model, method, 0.0, calibration=calibration):
            assert logits(model, *inputs).equal(dense)


def test_flap_bias_is_what_the_formula_says(calibrated):
    model, calibration = calibrated
    inputs = padded("right")
    with attach(model, "flap", 0.3, calibration=calibration) as handle:
        choice, got = kept(handle), logits(model, *inputs)
    moments = moments_of(model, calibration)
    with masked(choice), lost_means_added(choice, moments):
        close(got, logits(model, *inputs))


def test_two_models_at_once_do_not_meet(llama):
    model, calibration = llama
    other = FAMILIES["qwen3"]()
    inputs = padded("none")
    with attach(model, PROBING, 0.3, calibration=calibration):
        alone = logits(model, *inputs)
    with attach(model, PROBING, 0.3, calibration=calibration), attach(other, "random", 0.2):
        logits(other, *inputs)
        assert logits(model, *inputs).equal(alone)


@pytest.mark.parametrize(
    "changes", [{"allocation": "global"}, {"compensation": "bias"}, {"unit_kind": "balanced"}]
)
def test_compositions_run_and_equal_the_masked_model(llama, changes):
    model, calibration = llama
    inputs = padded("left")
    with attach(model, compose(PROBING, **changes), 0.3, calibration=calibration) as handle:
        got, choice = logits(model, *inputs), kept(handle)
    if "compensation" not in changes:
        with masked(choice):
            close(got, logits(model, *inputs))
    else:
        with masked(choice):
            assert (got - logits(model, *inputs)).abs().max() > 1e-3, "the bias is missing"


def test_an_exception_in_a_pass_leaves_the_model_restorable(llama):
    model, calibration = llama
    before = {n: p.clone() for n, p in model.named_parameters()}
    inputs = padded("left")
    dense = logits(model, *inputs)
    norm = find_decoder(model).layers[4].post_attention_layernorm
    with pytest.raises(ZeroDivisionError), attach(model, PROBING, 0.3, calibration=calibration):
        hook = norm.register_forward_hook(lambda *_: 1 / 0)
        logits(model, *inputs)
    hook.remove()
    assert all(p.equal(before[n]) for n, p in model.named_parameters())
    assert logits(model, *inputs).equal(dense)


@pytest.mark.parametrize("family", ["llama-gqa", "opt"])
@pytest.mark.parametrize("where", ["producer", "consumer"])
def test_a_pass_after_an_exception_is_like_any_other(family, where):
    # In a block, a probe may be running: a consumer left in tap mode, or a block left wide, would show.
    model = FAMILIES[family]()
    calibration = token_ids(6, 16, seed=9)
    inputs = padded("left")
    for block in find_blocks(model)[-2:]:
        with attach(model, PROBING, 0.3, calibration=calibration) as handle:
            linear = block.producers[0] if where == "producer" else block.consumer
            hook = linear.register_forward_pre_hook(lambda *_: 1 / 0, prepend=True)
            with pytest.raises(ZeroDivisionError):
                logits(model, *inputs)
            hook.remove()
            got, choice = logits(model, *inputs), kept(handle)
        with masked(choice):
            close(got, logits(model, *inputs))


def test_attaching_again_gives_the_same_and_a_failed_attach_leaves_nothing(llama):
    model, calibration = llama
    inputs = padded("left")
    hooks = {id(m): len(m._forward_pre_hooks) for m in model.modules()}
    results = []
    for _ in range(2):
        with attach(model, PROBING, 0.3, calibration=calibration):
            results.append(logits(model, *inputs))
        assert {id(m): len(m._forward_pre_hooks) for m in model.modules()} == hooks
        with pytest.raises(UsageError):
            attach(model, PROBING, 0.99, calibration=calibration)
    assert results[0].equal(results[1])


def test_overflow_is_an_error_that_names_the_block(llama):
    model, calibration = llama
    layer = find_decoder(model).layers[3].mlp.up_proj
    with torch.no_grad():
        layer.weight[5] *= 1e30
    with (
        pytest.raises(FloatingPointError, match=r"layers\.3\.mlp"),
        attach(model, PROBING, 0.3, calibration=calibration),
    ):
        logits(model, *padded("none"))
    with torch.no_grad():
        layer.weight[5] /= 1e30


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", DYNAMIC)
def test_nan_activations_name_the_first_block_and_the_next_batch_works(llama, method, bad):
    model, calibration = llama
    ids, mask = padded("none")
    with attach(model, method, 0.3, calibration=calibration) as handle, torch.no_grad():
        embedded = model.get_input_embeddings()(ids)
        with pytest.raises(FloatingPointError, match=r"layers\.3\.self_attn"):
            model(inputs_embeds=torch.full_like(embedded, bad))
        got, choice = logits(model, ids, mask), kept(handle)
    with masked(choice):
        close(got, logits(model, ids, mask))
