"""Compiled decoder layers: the same results, no compilation when units swap, and all as before once detached.

Most tests let torch trace the layers and run what it traced as it is, without a compiler.
"""

from dataclasses import replace

import pytest
import tiny_experts
import tiny_families
import torch
from tiny import FAMILIES, PARALLEL, PROBING, close, padded, token_ids
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch._dynamo.utils import counters

from probeprune import Probe, ProbeEveryBatch, RefitEveryBatch, UsageError, attach, compose, detach
from probeprune.model.blocks import find_layers
from probeprune.runtime import compiled
from probeprune.runtime.attaching import attach_again

CPU = torch.device("cpu")
CALIBRATION = token_ids(12, 24, seed=9)
STATIC = compose("wanda-sp", name="static", skip_layers=0)
PROBE = replace(PROBING, skip_layers=0)
REFRESH = replace(PROBE, name="refresh", when=ProbeEveryBatch(refresh=1, own_positions=0))
REFIT = compose("best-dynamic", name="refit", when=RefitEveryBatch(Probe(pick="even")), skip_layers=0)


@pytest.fixture
def graphs(monkeypatch):
    """What is compiled, by a backend that only counts: `graphs.frame_count` is the number so far."""
    counter = CompileCounter()
    monkeypatch.setattr(compiled, "BACKEND", counter)
    monkeypatch.setattr(compiled, "missing_compiler", lambda device: None)
    counters.clear()
    return counter


def short(model, layers=1):
    """The first layers of a model: tracing takes a second for each."""
    del find_layers(model)[layers:]
    model.config.num_hidden_layers = layers
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:layers]
    return model


def passes(model, seed=1):
    """A batch that is padded, and another that goes on for three tokens; all logits."""
    ids, mask = padded("left", 3, 12)
    with torch.inference_mode():
        found = [model((ids * seed) % 128, attention_mask=mask).logits[mask.bool()]]
        out = model(token_ids(3, 12, seed=seed))
        found.append(out.logits)
        for step in range(3):
            out = model(token_ids(3, 1, seed=seed + step), past_key_values=out.past_key_values)
            found.append(out.logits)
        return found


CASES = {
    "static": ("llama-gqa", STATIC, 2),
    "probe": ("llama-gqa", PROBE, 1),
    "refresh": ("llama-gqa", REFRESH, 1),
    "refit": ("llama-gqa", REFIT, 1),
    "beside": ("gemma3", replace(PARALLEL, skip_layers=0), 2),
    "balanced": ("qwen2", replace(PROBE, unit_kind="balanced"), 1),
    "fused": ("phi3-gqa", PROBE, 1),
    "no module": ("opt", PROBE, 1),
}


@pytest.mark.parametrize("case", CASES)
def test_compiled_passes_are_the_eager_ones_and_swaps_compile_nothing(case, graphs):
    family, method, layers = CASES[case]
    model = short(FAMILIES[family](), layers)
    with attach(model, method, 0.3, calibration=CALIBRATION):
        wanted = passes(model)
        again = passes(model, 11)
    assert not graphs.frame_count
    with attach(model, method, 0.3, calibration=CALIBRATION, compile=True) as handle:
        got = passes(model)
        built, swapped = graphs.frame_count, handle.swapped
        got_again = passes(model, 11)
        assert graphs.frame_count == built > 0
        assert method.when.chooses == (handle.swapped > swapped)
    for a, b in zip([*got, *got_again], [*wanted, *again], strict=True):
        close(a, b)
    assert not counters["graph_break"], "compiled code is left in between, or waits for the device"


@pytest.mark.parametrize("method", [STATIC, PROBE], ids=lambda m: m.name)
@pytest.mark.parametrize("family", ["mixtral", "lfm2"])
def test_experts_and_other_mixers_stay_as_they_are_around_compiled_attention(family, method, graphs):
    model = (tiny_experts if family == "mixtral" else tiny_families).build(family)()
    with torch.no_grad(), attach(model, method, 0.1, calibration=CALIBRATION):
        wanted = model(token_ids(), use_cache=False).logits
    with torch.no_grad(), attach(model, method, 0.1, calibration=CALIBRATION, compile=True):
        close(model(token_ids(), use_cache=False).logits, wanted)
    assert graphs.frame_count and not counters["graph_break"]


def test_a_second_length_and_a_second_batch_are_compiled_once_more_and_no_third(graphs):
    model, built = short(FAMILIES["llama-gqa"]()), []
    with attach(model, STATIC, 0.5, calibration=CALIBRATION, compile=True), torch.no_grad():
        model(token_ids(1, 8), use_cache=False)  # torch must not take widths for what changes
    with attach(model, STATIC, 0.3, calibration=CALIBRATION, compile=True), torch.inference_mode():
        for shape in [(2, 12), (2, 14), (2, 9), (3, 9), (4, 16), (5, 7)]:
            before = graphs.frame_count
            model(token_ids(*shape), use_cache=False)
            built.append(graphs.frame_count - before)
    assert built == [1, 1, 0, 1, 0, 0]


def test_gradients_are_the_eager_ones(graphs, monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", CompileCounterWithBackend("aot_eager"))
    model = short(FAMILIES["llama-gqa"]())
    embedded = model.get_input_embeddings()(token_ids(2, 8)).detach()
    found = []
    for compile in (False, True):
        x = embedded.clone().requires_grad_()
        weight = model.model.layers[0].mlp.up_proj.weight
        with attach(model, PROBE, 0.3, calibration=CALIBRATION, compile=compile):
            model(inputs_embeds=x, use_cache=False).logits.square().mean().backward()
        found.append((x.grad, weight.grad))
        weight.grad = None
    for a, b in zip(*found, strict=True):
        close(b, a)


@pytest.mark.parametrize("method", [STATIC, PROBE], ids=lambda m: m.name)
def test_detaching_puts_back_what_was_there(method, graphs):
    model = short(FAMILIES["llama-gqa"]())
    layer, own = find_layers(model)[0], find_layers(model)[0].forward
    layer.forward = lambda *args, **kwargs: own(*args, **kwargs)  # users may have wrapped it
    before = {name: dict(m.__dict__) for name, m in model.named_modules()}
    weights = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        dense = model(token_ids()).logits
        attach(model, method, 0.3, calibration=CALIBRATION, compile=True)
        assert not model(token_ids()).logits.equal(dense)
        detach(model)
        assert model(token_ids()).logits.equal(dense)
    assert {name: dict(m.__dict__) for name, m in model.named_modules()} == before
    assert all(p.equal(weights[name]) for name, p in model.named_parameters())


def test_a_forward_put_around_a_compiled_one_stays_and_runs_it_as_it_is(graphs):
    model = short(FAMILIES["llama-gqa"]())
    layer, calls = find_layers(model)[0], []
    with torch.no_grad():
        dense = model(token_ids()).logits
        attach(model, STATIC, 0.3, calibration=CALIBRATION, compile=True)
        ours = layer.forward
        layer.forward = lambda *args, **kwargs: (calls.append(1), ours(*args, **kwargs))[1]
        model(token_ids())
        detach(model)
        built = graphs.frame_count
        assert model(token_ids()).logits.equal(dense) and len(calls) == 2
    assert built == graphs.frame_count > 0


def test_hooks_and_forwards_that_others_put_inside_compiled_code_run_from_the_next_pass_on(graphs):
    model, calls = short(FAMILIES["llama-gqa"]()), []
    mlp = find_layers(model)[0].mlp
    with torch.no_grad(), attach(model, STATIC, 0.3, calibration=CALIBRATION, compile=True):
        wanted = model(token_ids(), use_cache=False).logits
        hook = mlp.down_proj.register_forward_hook(lambda *_: calls.append("hook"))
        model(token_ids(), use_cache=False)
        hook.remove()
        own = mlp.forward
        mlp.forward = lambda x: (calls.append("forward"), own(x))[1]
        model(token_ids(), use_cache=False)
        del mlp.forward
        close(model(token_ids(), use_cache=False).logits, wanted)
    assert calls == ["hook", "forward"]


def test_what_was_attached_before_is_compiled_too(graphs):
    model = short(FAMILIES["llama-gqa"]())
    with torch.no_grad(), attach(model, STATIC, 0.3, calibration=CALIBRATION) as handle:
        kept, wanted = handle.kept, model(token_ids(), use_cache=False).logits
    with torch.no_grad(), attach_again(model, kept, compile=True):
        close(model(token_ids(), use_cache=False).logits, wanted)
    assert graphs.frame_count


# -- refusals ------------------------------------------------------------------------------------


def wrapped(model):
    return torch.compile(model, backend="eager")


def in_part(model):
    find_layers(model)[0].compile(backend="eager")
    return model


def offloaded(model):
    from accelerate import cpu_offload

    cpu_offload(model, CPU)
    return model


def on_two(model):
    return find_layers(model)[0].to("meta") and model


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (wrapped, "compiled already"),
        (in_part, "compiled already"),
        (offloaded, "layers of this model are offloaded"),
        (on_two, "on one device, and this one is on cpu and meta"),
        (lambda model: model.to("meta"), "works on the CPU and on CUDA, not on meta"),
    ],
    ids=["wrapped", "in part", "offloaded", "two devices", "meta"],
)
def test_what_cannot_be_compiled_is_one_sentence_before_any_work(changed, says):
    with pytest.raises(UsageError, match=says):  # not that the calibration is missing
        attach(changed(short(FAMILIES["llama-gqa"]())), "wanda-sp", 0.3, compile=True)


def test_a_machine_without_a_compiler_is_one_sentence():
    model = short(FAMILIES["llama-gqa"]())
    with (
        torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(UsageError, match=r"^compile needs a C\+\+ compiler, and PyTorch finds none"),
    ):
        attach(model, "wanda-sp", 0.3, compile=True)


def test_with_the_compiler_of_this_machine_or_without_one():
    model = short(FAMILIES["llama-gqa"]())
    with torch.no_grad(), attach(model, PROBE, 0.3, calibration=CALIBRATION):
        wanted = [model(token_ids(3, 12, seed=i), use_cache=False).logits for i in range(2)]
    if compiled.missing_compiler(CPU):
        with pytest.raises(UsageError, match="compile needs"):
            attach(model, PROBE, 0.3, calibration=CALIBRATION, compile=True)
        return
    with torch.no_grad(), attach(model, PROBE, 0.3, calibration=CALIBRATION, compile=True):
        for i, logits in enumerate(wanted):
            close(model(token_ids(3, 12, seed=i), use_cache=False).logits, logits)
