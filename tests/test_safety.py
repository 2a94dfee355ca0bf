"""What goes wrong under an attached method stays small: the model comes back, and no pass meets another."""

import threading

import pytest
import torch
from tiny import FAMILIES, PROBING, close, kept, masked, padded, snapshot, token_ids

from probeprune import Probe, UsageError, attach, compose
from probeprune.model.blocks import find_blocks
from probeprune.model.passes import find_decoder
from probeprune.preparation import Preparation
from probeprune.strategies.probe_every_batch import ProbeEveryBatch

REFRESHING = compose("probe", when=ProbeEveryBatch(Probe(reuse=0), refresh=1))


@pytest.fixture(scope="module", params=["llama-gqa", "opt", "phi3-gqa"])
def calibrated(request):
    model = FAMILIES[request.param]()
    return model, Preparation(model, token_ids(6, 16, seed=9))


PLACES = {
    "embedding": lambda m: m.get_input_embeddings(),
    "first layer": lambda m: find_decoder(m).layers[0],
    "attention's producer": lambda m: find_blocks(m)[6].producers[0],
    "attention's consumer": lambda m: find_blocks(m)[6].consumer,
    "norm before the mlp": lambda m: find_blocks(m)[7].norm,
    "mlp's producer": lambda m: find_blocks(m)[7].producers[-1],
    "mlp's consumer": lambda m: find_blocks(m)[7].consumer,
    "head": lambda m: m.get_output_embeddings(),
}


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("when", ["prompt", "refresh"])
@pytest.mark.parametrize("place", PLACES)
def test_an_exception_anywhere_leaves_the_model_restorable(calibrated, place, when, error):
    model, calibration = calibrated
    inputs = padded("left")
    before = snapshot(model)

    def fail(*_: object) -> None:
        raise error

    module = PLACES[place](model)
    with attach(model, REFRESHING, 0.3, calibration=calibration) as handle, torch.no_grad():
        cache = None
        if when == "refresh":
            cache = model(token_ids(), use_cache=True).past_key_values
        # In front of our own hooks.
        hook = module.register_forward_pre_hook(fail, prepend=True)
        with pytest.raises(error):
            model(*inputs) if cache is None else model(token_ids(4, 1), past_key_values=cache)
        hook.remove()
        got, choice = model(*inputs).logits[inputs[1].bool()], kept(handle)
    before.assert_untouched()
    with masked(choice), torch.no_grad():
        close(got, model(*inputs).logits[inputs[1].bool()])


def test_two_models_at_once_generate_as_each_alone(llama):
    model, calibration = llama
    other = FAMILIES["qwen3"]()
    theirs = token_ids(6, 16, seed=9)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": 127}
    ids, mask = padded("left")

    def tokens(which):
        return which.generate(ids, attention_mask=mask, **options)

    with attach(model, PROBING, 0.3, calibration=calibration):
        one = tokens(model)
    with attach(other, PROBING, 0.2, calibration=theirs):
        two = tokens(other)
    with (
        attach(model, PROBING, 0.3, calibration=calibration),
        attach(other, PROBING, 0.2, calibration=theirs),
    ):
        assert tokens(other).equal(two) and tokens(model).equal(one)
        with torch.no_grad():  # step by step in turn
            caches = [m(ids, attention_mask=mask, use_cache=True).past_key_values for m in (model, other)]
            for m, cache in zip((model, other), caches, strict=True):
                assert m(token_ids(4, 1), past_key_values=cache).logits.isfinite().all()


@pytest.mark.parametrize("method", ["wanda-sp", PROBING])
def test_attaching_twice_is_refused_and_changes_nothing(llama, method):
    model, calibration = llama
    inputs = padded("left")
    with attach(model, method, 0.3, calibration=calibration) as handle, torch.no_grad():
        want, choice = model(*inputs).logits, handle.kept_units()
        for again in ("probe", "wanda-sp", "dense"):
            with pytest.raises(UsageError, match="already"):
                attach(model, again, 0.3, calibration=calibration)
        assert handle.kept_units() == choice
        assert method is PROBING or model(*inputs).logits.equal(want)


# -- threads -------------------------------------------------------------------------------------


def together(*work) -> list:
    """Run functions at the same time in a thread each; their results or exceptions."""
    results: list = [None] * len(work)
    start = threading.Barrier(len(work))

    def run(i: int) -> None:
        try:
            start.wait()
            results[i] = work[i]()
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(work))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return results


def test_passes_from_several_threads_run_one_after_the_other(llama):
    # No history: then what a batch gives does not depend on the batches before it.
    model, calibration = llama
    method = compose("probe", when=ProbeEveryBatch(Probe(reuse=0), fusion="none"))
    batches = [token_ids(2, 12, seed=s) for s in range(4)]

    def passes(ids):
        with torch.no_grad():
            return [model.model(ids).last_hidden_state for _ in range(12)]

    with attach(model, method, 0.3, calibration=calibration):
        alone = [passes(ids)[0] for ids in batches]
        found = together(*(lambda ids=ids: passes(ids) for ids in batches))
    for want, got in zip(alone, found, strict=True):
        for out in got:
            close(out, want)


def test_a_pass_waits_for_the_one_that_runs(llama):
    model, calibration = llama
    inside, go_on, order = threading.Event(), threading.Event(), []
    first = threading.Thread(target=lambda: model.model(token_ids(seed=1)))
    second = threading.Thread(target=lambda: (model.model(token_ids(seed=2)), order.append("second")))

    def hold(*_: object) -> None:
        if threading.current_thread() is first:
            inside.set()
            go_on.wait(10)
            order.append("first")

    with attach(model, PROBING, 0.3, calibration=calibration), torch.no_grad():
        hook = find_decoder(model).layers[4].register_forward_pre_hook(hold)
        first.start()
        assert inside.wait(10)
        second.start()
        second.join(0.2)
        assert order == [], "the second ran while the first was under way"
        go_on.set()
        first.join(10)
        second.join(10)
        hook.remove()
    assert order == ["first", "second"]


def test_generations_that_take_turns_each_keep_their_own_choice(llama):
    # Each prompt chooses its heads; a pass that continues one brings back the heads that its cache holds.
    model, calibration = llama
    prompted = threading.Event(), threading.Event()

    def generation(own, others):
        with torch.no_grad():
            cache = model(token_ids(2, 9, seed=own), use_cache=True).past_key_values
            prompted[own].set()
            prompted[others].wait(10)
            return model(token_ids(2, 1), past_key_values=cache).logits

    own = compose("probe", when=ProbeEveryBatch(Probe(reuse=0), fusion="none"))
    with attach(model, own, 0.3, calibration=calibration):
        found = together(lambda: generation(0, 1), lambda: generation(1, 0))
        for event in prompted:
            event.set()
        alone = [generation(0, 1), generation(1, 0)]
    for logits, expected in zip(found, alone, strict=True):
        torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("where", ["layer", "consumer", "probe"])
def test_detaching_inside_a_pass_is_refused_and_the_pass_ends_well(llama, where):
    model, calibration = llama
    inputs = padded("left")
    module = {
        "layer": find_decoder(model).layers[3],
        "consumer": find_blocks(model)[7].consumer,
        "probe": find_blocks(model)[7].producers[0],
    }[where]
    refused = []

    def leave(*_: object) -> None:
        with pytest.raises(UsageError, match="detach when it is over"):
            handle.detach()
        refused.append(True)

    with attach(model, PROBING, 0.3, calibration=calibration) as handle, torch.no_grad():
        hook = module.register_forward_pre_hook(leave, prepend=True)
        got, choice = model(*inputs).logits[inputs[1].bool()], kept(handle)
        hook.remove()
    assert refused
    with masked(choice), torch.no_grad():
        close(got, model(*inputs).logits[inputs[1].bool()])


def test_a_pass_inside_a_pass_is_refused(llama):
    model, calibration = llama
    with attach(model, PROBING, 0.3, calibration=calibration), torch.no_grad():
        hook = find_decoder(model).layers[3].register_forward_pre_hook(lambda *_: model(token_ids()))
        with pytest.raises(UsageError, match="inside another"):
            model(token_ids())
        hook.remove()
        assert model(token_ids()).logits.isfinite().all()


def test_detaching_from_another_thread_waits_for_the_pass(llama):
    model, calibration = llama
    before = snapshot(model)
    handle = attach(model, PROBING, 0.3, calibration=calibration)
    other, order = threading.Thread(target=lambda: (handle.detach(), order.append("detached"))), []

    def start(*_: object) -> None:
        other.start()
        other.join(0.2)
        order.append("pass")

    with torch.no_grad():
        hook = find_decoder(model).layers[3].register_forward_pre_hook(start)
        model(token_ids())
        hook.remove()
    other.join(10)
    assert order == ["pass", "detached"]
    before.assert_untouched()
