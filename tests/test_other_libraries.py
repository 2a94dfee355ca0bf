"""What other libraries do to a model: wrap it, add to it, save it, serve it. Right, or refused before the
work."""

import copy
import json

import pytest
import torch
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from tiny import FAMILIES, close, kept, masked, opened, padded, token_ids
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    ContinuousBatchingConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
)

from probeprune import (
    UsageError,
    attach,
    compose,
    detach,
    find_blocks,
    prepare,
    prune,
    save,
    with_equal_widths,
)
from probeprune.model.wrappers import unwrapped

IDS = token_ids(4, 16)
EVEN = with_equal_widths("magnitude")
UNEVEN = compose("random", skip_layers=2)


@torch.no_grad()
def logits(model, ids=IDS, mask=None):
    return model(input_ids=ids, attention_mask=mask).logits


def llama():
    return FAMILIES["llama-gqa"]()


def classifier():
    config = copy.deepcopy(llama().config)
    config.num_labels, config.pad_token_id = 3, 0
    torch.manual_seed(0)
    return LlamaForSequenceClassification(config).eval()


# -- wrappers --------------------------------------------------------------------------------------


def peft(model, targets):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    return get_peft_model(model, config).eval()


WRAPPERS = {
    "compiled": lambda m: torch.compile(m, backend="eager"),
    "parallel": nn.DataParallel,
    "adapter on the head": lambda m: peft(m, ["lm_head"]),
    "compiled adapter": lambda m: torch.compile(peft(m, ["lm_head"]), backend="eager"),
}


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("method", ["magnitude", "wanda-sp", "full-batch", "best-dynamic"])
def test_methods_attach_to_the_model_inside_a_wrapper(wrap, method):
    plain = llama()
    if "adapter" in wrap:
        plain = peft(plain, ["lm_head"])
    model = WRAPPERS[wrap](llama())
    with torch.no_grad():
        dense = model(input_ids=IDS).logits
        prepared = prepare(model, method, 0.3, IDS)
        with attach(plain, method, 0.3, calibration=IDS):
            expected = plain(input_ids=IDS).logits
        attach(model, method, 0.3, calibration=prepared)
        close(model(input_ids=IDS).logits, expected)
        assert (expected - dense).abs().max() > 1e-3
        detach(model)
        assert model(input_ids=IDS).logits.equal(dense)


@pytest.mark.parametrize("wrap", ["compiled", "parallel"])
def test_a_wrapped_model_is_pruned_and_saved(wrap, tmp_path):
    model, plain = WRAPPERS[wrap](llama()), llama()
    prune(model, EVEN, 0.3)
    prune(plain, EVEN, 0.3)
    save(model, tmp_path / "out")
    close(logits(opened(tmp_path / "out"), IDS), logits(plain))
    with torch.no_grad():
        close(model(input_ids=IDS).logits, logits(plain))


def calls(model):
    return {
        "attach": lambda: attach(model, "magnitude", 0.3),
        "prune": lambda: prune(model, "magnitude", 0.3),
        "prepare": lambda: prepare(model, "wanda-sp", 0.3, IDS),
        "find_blocks": lambda: find_blocks(model),
    }


@pytest.mark.parametrize("call", ["attach", "prune", "prepare", "find_blocks"])
@pytest.mark.parametrize("name", ["adapters", "no head", "another model"])
def test_models_that_cannot_be_pruned_are_one_sentence(name, call):
    model, wanted = {
        "adapters": (lambda: peft(llama(), ["q_proj"]), r"peft.*Linear.*merge adapters"),
        "no head": (lambda: LlamaModel(llama().config).eval(), r"LlamaModel has no model\.layers.*head"),
        "another model": (lambda: nn.Linear(2, 2).eval(), r"model type None \(Linear\) is not one of the"),
    }[name]
    with pytest.raises(UsageError, match=wanted):
        calls(model())[call]()


PROMPTS = {
    "prompt tuning": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "p-tuning": lambda: PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16
    ),
}
"""Learned tokens in front of the text: embeddings, with a mask that is longer by as many."""


@pytest.mark.parametrize("prompts", PROMPTS)
@pytest.mark.parametrize("name", ["wanda-sp", "probe", "full-batch"])
@pytest.mark.parametrize("family", ["llama-gqa", "opt", "phi3-gqa", "gpt-neox"])
def test_learned_prompts_around_an_attached_model_meet_the_units_it_keeps(family, name, prompts):
    model, ids = FAMILIES[family](), token_ids(2, 10)
    with attach(model, name, 0.3, calibration=token_ids(6, 16, seed=9)) as handle, torch.no_grad():
        tuned = get_peft_model(model, PROMPTS[prompts]()).eval()
        got, units = tuned(input_ids=ids).logits, kept(handle)
        made, own = tuned.generate(input_ids=ids, max_new_tokens=3, do_sample=False), kept(handle)
    assert got.shape[1] == 10 + 4
    with masked(units), torch.no_grad():
        close(got, tuned(input_ids=ids).logits)
    with masked(own), torch.no_grad():
        assert made.equal(tuned.generate(input_ids=ids, max_new_tokens=3, do_sample=False))


@pytest.mark.parametrize("name", ["wanda-sp", "probe"])
def test_a_learned_prefix_is_a_cache_from_elsewhere_and_refused(name):
    """Prefix tuning brings keys and values of all heads, and some heads are gone."""
    model = FAMILIES["llama-gqa"]()
    tuned = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    with torch.no_grad():
        dense = tuned(input_ids=token_ids(2, 10)).logits
        with attach(model, name, 0.3, calibration=token_ids(6, 16, seed=9)):
            with pytest.raises(UsageError, match="KV cache was not filled under the method"):
                tuned(input_ids=token_ids(2, 10))
            with pytest.raises(UsageError, match="KV cache was not filled under the method"):
                tuned.generate(input_ids=token_ids(2, 10), max_new_tokens=3)
        assert tuned(input_ids=token_ids(2, 10)).logits.equal(dense)


def test_adapters_put_around_an_attached_model_are_refused_at_the_next_pass():
    model = llama()
    with attach(model, "magnitude", 0.3):
        tuned = peft(model, ["q_proj"])
        with pytest.raises(UsageError, match="was replaced by"):
            tuned(input_ids=IDS)


# -- added and missing modules ---------------------------------------------------------------------


def with_value_head():
    model = llama()
    model.value_head = nn.Linear(48, 1)
    return model


def with_buffer():
    model = llama()
    model.model.register_buffer("mine", torch.zeros(3))
    return model


def with_a_layer_dropped():
    model = llama()
    model.model.layers = model.model.layers[:4]
    return model


@pytest.mark.parametrize(
    "made, named",
    [(with_value_head, "value_head"), (with_buffer, "mine"), (with_a_layer_dropped, r"layers\.4")],
)
def test_a_model_that_its_config_does_not_describe_is_refused_before_it_is_pruned(made, named):
    model = made()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UsageError, match=rf"{named}.*no checkpoint could hold it"):
        prune(model, EVEN, 0.3)
    for name, tensor in model.state_dict().items():
        assert tensor.equal(before[name])
    with attach(model, EVEN, 0.3):  # nothing is saved here
        assert logits(model).isfinite().all()


def test_a_dropped_layer_is_pruned_once_the_config_says_so(tmp_path):
    model = with_a_layer_dropped()
    model.config.num_hidden_layers = 4
    prune(model, UNEVEN, 0.2)
    save(model, tmp_path / "out")
    assert logits(opened(tmp_path / "out"), IDS).equal(logits(model))


@pytest.mark.parametrize("method", [EVEN, UNEVEN], ids=["uniform", "per-layer"])
def test_classifiers_and_models_without_a_head_open_from_checkpoints(method, tmp_path):
    model = classifier()
    prune(model, method, 0.2)
    save(model, tmp_path / "out")
    again = opened(tmp_path / "out", AutoModelForSequenceClassification)
    assert type(again).__name__ == type(model).__name__
    assert logits(again).equal(logits(model))
    causal = llama()
    prune(causal, method, 0.2)
    save(causal, tmp_path / "causal")
    bare = opened(tmp_path / "causal", AutoModel)
    with torch.no_grad():
        assert bare(IDS)[0].equal(causal.model(IDS)[0])
    head = opened(tmp_path / "causal", AutoModelForSequenceClassification)
    with torch.no_grad():
        assert head.model(IDS)[0].equal(causal.model(IDS)[0])


# -- transformers' own save ------------------------------------------------------------------------


@pytest.mark.parametrize("method", [EVEN, UNEVEN], ids=["one width", "many widths"])
@pytest.mark.parametrize("family", FAMILIES)
def test_save_pretrained_of_a_model_pruned_in_place_opens(family, method, tmp_path):
    model = FAMILIES[family]()
    other = type(model)(model.config).eval()  # shares the config object
    fields = model.config.to_dict()
    prune(model, method, 0.2)
    assert other.config.to_dict() == fields
    expected = logits(model)
    model.save_pretrained(tmp_path / "out")
    assert logits(opened(tmp_path / "out")).equal(expected)
    assert logits(other).isfinite().all()
    # Pruned once more, to other widths, it is described anew.
    prune(model, method, 0.2)
    model.save_pretrained(tmp_path / "again")
    assert logits(opened(tmp_path / "again"), IDS).equal(logits(model))


def test_a_class_of_the_users_own_stays_and_says_how_to_save(tmp_path):
    class Mine(LlamaForCausalLM):
        pass

    model = Mine(llama().config).eval()
    prune(model, UNEVEN, 0.2)
    assert type(model) is Mine
    with pytest.raises(UsageError, match=r"probeprune\.save"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    save(model, tmp_path / "ours")
    assert logits(opened(tmp_path / "ours"), IDS).equal(logits(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_save_pretrained_of_an_attached_model_writes_the_dense_one(family, tmp_path):
    model = FAMILIES[family]()
    dense = logits(model)
    with attach(model, "magnitude", 0.3):
        model.save_pretrained(tmp_path / "out")
    assert logits(opened(tmp_path / "out"), IDS).equal(dense)


def test_a_generation_config_that_transformers_refuses_to_write_is_kept(tmp_path):
    model = llama()
    model.generation_config.temperature = 0.5
    prune(model, EVEN, 0.3)
    save(model, tmp_path / "out")
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["temperature"] == 0.5
    assert model.generation_config.temperature == 0.5


# -- attention implementations and serving ---------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("state", ["in place", "checkpoint"])
def test_the_attention_implementation_of_a_pruned_model_can_be_switched(family, state, tmp_path):
    model = FAMILIES[family]()
    prune(model, UNEVEN, 0.2)
    if state == "checkpoint":
        save(model, tmp_path / "out")
        model = opened(tmp_path / "out")
    ids, mask = padded("left")
    first = logits(model, ids, mask)
    model.set_attn_implementation("eager")
    switched = logits(model, ids, mask)
    assert {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")} == {"eager"}
    real = mask.bool()
    torch.testing.assert_close(switched[real], first[real], rtol=1e-4, atol=1e-4)


def served(model):
    """Tokens that continuous batching makes."""
    out = model.generate_batch(
        inputs=[IDS[0].tolist()],
        generation_config=GenerationConfig(
            max_new_tokens=5, do_sample=False, eos_token_id=-1, pad_token_id=0
        ),
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=64),
    )
    return [list(o.generated_tokens) for o in out.values()]


def test_continuous_batching_serves_models_whose_layers_have_the_same_heads(tmp_path):
    for name, method in {"one width": EVEN, "MLPs alone": compose(UNEVEN, blocks=("mlp",))}.items():
        model = llama()
        prune(model, method, 0.2)
        plain = model.generate(IDS[:1], max_new_tokens=5, do_sample=False, eos_token_id=-1, pad_token_id=0)
        assert served(model) == [plain[0, IDS.shape[1] :].tolist()], name


def test_continuous_batching_is_refused_where_layers_differ_and_where_a_method_is_attached():
    model = llama()
    with attach(model, "magnitude", 0.3), pytest.raises(UsageError, match="continuous batching"):
        served(model)
    assert "init_continuous_batching" not in vars(model)
    prune(model, UNEVEN, 0.3)
    with pytest.raises(ValueError, match="same number of key-value heads"):
        served(model)


def test_unwrapped_leaves_a_plain_model_alone():
    model = llama()
    assert unwrapped(model) is model
    assert unwrapped(torch.compile(nn.DataParallel(model), backend="eager")) is model
    assert isinstance(model.config, LlamaConfig)
