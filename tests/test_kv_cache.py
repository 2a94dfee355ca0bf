"""Generation with a KV cache: token by token what the dense model does with the same units masked."""

import copy

import pytest
import torch
from tiny import FAMILIES, PARALLEL, PROBING, close, kept, masked, padded, token_ids
from transformers import CompileConfig, DynamicCache, StaticCache

from probeprune import Probe, UsageError, attach, compose
from probeprune.model.passes import find_decoder
from probeprune.strategies.probe_every_batch import ProbeEveryBatch

OPTIONS = {
    "max_new_tokens": 7,
    "do_sample": False,
    "pad_token_id": 0,
    "eos_token_id": 127,
    "return_dict_in_generate": True,
    "output_logits": True,
}


def generate(model, ids, mask, **options):
    torch.manual_seed(0)  # for what samples
    return model.generate(ids, attention_mask=mask, **{**OPTIONS, **options})


def same(got, want) -> None:
    """The same tokens, and not by luck: the same logits at every step."""
    assert got.sequences.equal(want.sequences)
    for one, other in zip(got.logits, want.logits, strict=True):
        close(one, other)


class masked_by_pass:
    """Context: the dense model with other units masked at every pass of its decoder."""

    def __init__(self, model, choices) -> None:
        self.decoder, self.choices, self.now = find_decoder(model), iter(choices), None

    def __enter__(self) -> None:
        def begin(*_: object) -> None:
            self.leave()
            self.now = masked(next(self.choices))
            self.now.__enter__()

        self.hook = self.decoder.register_forward_pre_hook(begin)

    def leave(self) -> None:
        if self.now is not None:
            self.now.__exit__()

    def __exit__(self, *_: object) -> None:
        self.hook.remove()
        self.leave()


# -- the units of the prompt, kept ---------------------------------------------------------------


@pytest.mark.parametrize("method", ["probe", "full-batch", "best-dynamic"])
def test_a_cache_goes_on_behind_another_prompt_that_overflowed(method):
    """What was chosen for its own prompt was finite."""
    model = FAMILIES["llama-gqa"]()
    ids, more = token_ids(), token_ids(4, 3, seed=5)
    with torch.no_grad(), attach(model, method, 0.3, calibration=token_ids(6, 16, seed=9)):
        cache = model(ids, use_cache=True).past_key_values
        want = model(more, past_key_values=copy.deepcopy(cache)).logits
        with pytest.raises(FloatingPointError):
            model(inputs_embeds=torch.full((2, 6, model.config.hidden_size), float("nan")))
        assert model(more, past_key_values=cache).logits.equal(want)
        assert model(ids).logits.isfinite().all(), "and so does the next prompt"


@pytest.mark.parametrize(
    "method, side", [("wanda-sp", "left"), (PROBING, "left"), (PROBING, "none"), ("full-batch", "left")]
)
def test_generation_is_that_of_the_masked_model(calibrated, method, side):
    model, calibration = calibrated
    inputs = padded(side)
    dense = generate(model, *inputs)
    with attach(model, method, 0.3, calibration=calibration) as handle:
        got, choice = generate(model, *inputs), kept(handle)
    with masked(choice):
        same(got, generate(model, *inputs))
    assert not got.sequences.equal(dense.sequences), "pruning that changes no token shows nothing"


@pytest.mark.parametrize("family", ["llama-gqa", "mistral", "gemma3", "opt", "phi3-gqa", "gpt-neox"])
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "top_p": 0.9, "temperature": 1.5, "num_return_sequences": 3},
        {"cache_implementation": "static"},
        {"cache_implementation": "static", "num_beams": 2},
        {"prefill_chunk_size": 8},
        {"use_cache": True, "max_new_tokens": 1},
    ],
    ids=["beams", "best beams", "sampling", "static", "static beams", "prompt in chunks", "one token"],
)
def test_other_ways_to_generate(family, options):
    model = FAMILIES[family]()
    calibration = token_ids(6, 16, seed=9)
    inputs = padded("left")
    with attach(model, PROBING, 0.3, calibration=calibration) as handle:
        got, choice = generate(model, *inputs, **options), kept(handle)
    with masked(choice):
        want = generate(model, *inputs, **options)
    if "num_beams" in options:  # logits of beams that were dropped may come in another order
        assert got.sequences.equal(want.sequences)
    else:
        same(got, want)


@pytest.mark.parametrize("family", ["llama-gqa", "gemma3", "opt"])
def test_candidates_from_the_prompt(family):
    # Assisted decoding: several tokens a pass, and those that were guessed wrong are cropped again.
    model = FAMILIES[family]()
    calibration = token_ids(6, 16, seed=9)
    ids = token_ids(1, 6).repeat(1, 4)
    options = {"prompt_lookup_num_tokens": 3, "max_new_tokens": 12}
    with attach(model, PROBING, 0.3, calibration=calibration) as handle:
        got, choice = generate(model, ids, torch.ones_like(ids), **options), kept(handle)
    with masked(choice):
        same(got, generate(model, ids, torch.ones_like(ids), **options))


ASSISTED = pytest.mark.parametrize(
    "family, method",
    [("llama-gqa", m) for m in ("wanda-sp", "flap", PROBING, PARALLEL, "full-batch", "best-dynamic")]
    + [(f, m) for f in ("mistral", "opt", "phi3-gqa", "gpt-neox") for m in ("wanda-sp", PROBING)],
)


@ASSISTED
@pytest.mark.parametrize("how", ["early exit", "itself", "another"])
def test_assisted_generation_gives_the_text_of_the_models_own_units(family, method, how):
    # A draft has a cache, and so a choice, of its own; greedy text does not depend on what was drafted.
    model, helper = FAMILIES[family](), FAMILIES[family]()
    calibration = token_ids(6, 16, seed=9)
    ids = token_ids(1, 12)
    layers = model.config.num_hidden_layers
    if how == "early exit" and family in ("opt", "gpt-neox"):
        with pytest.raises(IndexError):  # transformers itself runs all layers there, dense models too
            generate(model, ids, torch.ones_like(ids), assistant_early_exit=2)
        return
    options = {"early exit": {"assistant_early_exit": 2}, "itself": {"assistant_model": model}}
    more = options.get(how, {"assistant_model": helper})
    with attach(model, method, 0.3, calibration=calibration) as handle:
        got, choice = generate(model, ids, torch.ones_like(ids), **more), kept(handle)
        again = model.generate(ids, **OPTIONS).sequences  # nothing of the drafts is left
        own = kept(handle)
    assert model.config.num_hidden_layers == layers
    if handle.method.compensation.kind != "none":
        return  # masking is not all that it does
    for text, units in ((got.sequences, choice), (again, own)):
        with masked(units):
            assert text.equal(generate(model, ids, torch.ones_like(ids)).sequences)


@ASSISTED
def test_a_draft_by_an_attached_model_leaves_the_text_alone(family, method):
    model, helper = FAMILIES[family](), FAMILIES[family]()
    ids = token_ids(1, 12)
    want = generate(model, ids, torch.ones_like(ids))
    with attach(helper, method, 0.3, calibration=token_ids(6, 16, seed=9)):
        got = generate(model, ids, torch.ones_like(ids), assistant_model=helper)
    assert got.sequences.equal(want.sequences)


@pytest.mark.parametrize("units", ["balanced", "query"])
@pytest.mark.parametrize("family", ["llama-gqa", "qwen3", "gemma3"])
def test_generation_with_query_heads(family, units):
    model = FAMILIES[family]()
    calibration = token_ids(6, 16, seed=9)
    inputs = padded("left")
    with attach(model, compose(PROBING, unit_kind=units), 0.3, calibration=calibration) as handle:
        got, choice = generate(model, *inputs), kept(handle)
    with masked(choice):
        same(got, generate(model, *inputs))


def test_every_prompt_chooses_anew(llama):
    model, calibration = llama
    seen = []
    with attach(model, PROBING, 0.3, calibration=calibration) as handle:
        for seed in range(4):
            ids = token_ids(2, 12, seed=20 + seed)
            got, choice = generate(model, ids, torch.ones_like(ids)), kept(handle)
            seen.append((ids, got, choice))
    for ids, got, choice in seen:
        with masked(choice):
            same(got, generate(model, ids, torch.ones_like(ids)))
    assert len({choice[-1][1] for _, _, choice in seen}) > 1


def test_without_a_cache_every_step_is_a_prompt(llama):
    # Nothing ties the steps together, so each may keep what it likes best.
    model, calibration = llama
    ids = token_ids(2, 10)
    choices = []
    with attach(model, PROBING, 0.3, calibration=calibration) as handle:
        hook = find_decoder(model).register_forward_hook(lambda *_: choices.append(kept(handle)))
        got = generate(model, ids, torch.ones_like(ids), use_cache=False)
        hook.remove()
    assert len({c[-1][1] for c in choices}) > 1
    with masked_by_pass(model, choices):
        same(got, generate(model, ids, torch.ones_like(ids), use_cache=False))


@pytest.mark.parametrize("method", ["wanda-sp", PROBING])
def test_a_compiled_decoder_gives_the_same(llama, method):
    # generate() compiles by itself where there is a GPU and a static cache.
    model, calibration = llama
    inputs = padded("left")
    config = CompileConfig(backend="eager", mode=None)
    config._compile_all_devices = True
    with attach(model, method, 0.3, calibration=calibration) as handle:
        got = generate(model, *inputs, cache_implementation="static", compile_config=config)
        choice = kept(handle)
    with masked(choice):
        same(got, generate(model, *inputs, cache_implementation="static"))


# -- refresh -------------------------------------------------------------------------------------


def by_pass(handle, every):
    """The masks that a generation has at each pass: a refresh runs MLPs whole. A list that a hook fills."""
    choices: list = []

    def note(*_: object) -> None:
        now = kept(handle)
        if choices and every and len(choices) % every == 0:
            now = [(b, range(b.units) if b.kind == "mlp" else units) for b, units in now]
        choices.append(now)

    return choices, find_decoder(handle.model).register_forward_hook(note)


@pytest.mark.parametrize("every, side", [(1, "left"), (3, "left"), (3, "none")])
def test_a_refresh_runs_dense_once_and_moves_mlps_alone(calibrated, every, side):
    model, calibration = calibrated
    inputs = padded(side)
    method = compose("probe", when=ProbeEveryBatch(Probe(reuse=0), refresh=every))
    with attach(model, method, 0.3, calibration=calibration) as handle:
        choices, hook = by_pass(handle, every)
        got, last = generate(model, *inputs), kept(handle)
        hook.remove()
    with masked_by_pass(model, choices):
        same(got, generate(model, *inputs))
    moved = {b.kind for (b, then), (_, now) in zip(choices[0], last, strict=True) if then != now}
    assert moved == {"mlp"}


@pytest.mark.parametrize("options", [{"cache_implementation": "static"}, {"num_beams": 2}])
def test_refresh_with_other_caches(llama, options):
    model, calibration = llama
    inputs = padded("left")
    method = compose("probe", when=ProbeEveryBatch(Probe(reuse=0), refresh=2))
    with attach(model, method, 0.3, calibration=calibration) as handle:
        choices, hook = by_pass(handle, 2)
        got = generate(model, *inputs, **options)
        hook.remove()
    with masked_by_pass(model, choices):
        assert got.sequences.equal(generate(model, *inputs, **options).sequences)
    assert len({c[-1][1] for c in choices}) > 2, "nothing was chosen anew"


def test_a_refresh_against_a_slow_version(llama):
    # One MLP alone is pruned, the last. Its history and its choice at the refresh, in float64.
    model, calibration = llama
    method = compose(
        "probe",
        allocation="nominal",
        skip_layers=4,
        blocks=("mlp",),
        when=ProbeEveryBatch(Probe(reuse=0), refresh=2),
    )
    prompt, steps = token_ids(3, 10), [token_ids(3, 1, seed=s) for s in (7, 8)]
    with attach(model, method, 0.05, calibration=calibration) as handle, torch.no_grad():
        (runtime,) = handle.runtimes
        block = runtime.block
        cache = model(prompt, use_cache=True).past_key_values
        units = runtime.pruned.partition.kept_units
        history = torch.empty(block.width, dtype=torch.float64)
        history[runtime.pruned.partition.channels] = runtime.follower.history.energy[0].double()
        for step in steps:
            model(step, past_key_values=cache)
        chosen = runtime.pruned.partition.kept_units
        after = torch.empty(block.width, dtype=torch.float64)
        after[runtime.pruned.partition.channels] = runtime.follower.history.energy[0].double()
    z = []
    hook = block.consumer.register_forward_pre_hook(lambda _, a: z.append(a[0].double()))
    with torch.no_grad():  # the last MLP: what it leaves out changes no other activation
        model(torch.cat([prompt, *steps], 1))
    hook.remove()
    first, second = (z[0][:, s].square().mean(0) for s in (10, 11))
    history[units] += 0.01 * (first[units] - history[units])
    energy = (second**2 + history**2) / (second + history)
    score = energy * (block.consumer.weight.detach().double() ** 4).sum(0).sqrt()
    assert chosen.tolist() == score.argsort(descending=True)[: len(chosen)].sort().values.tolist()
    assert not chosen.equal(units)
    torch.testing.assert_close(after, history + 0.01 * (second - history), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["llama-gqa", "llama-bias", "opt"])
def test_a_refresh_runs_dense_without_the_bias_for_lost_units(family):
    # The last MLP alone is pruned: its prompt leaves the cache as the dense model's.
    model = FAMILIES[family]()
    calibration = token_ids(6, 16, seed=9)
    method = compose(
        "probe",
        allocation="nominal",
        skip_layers=4,
        blocks=("mlp",),
        compensation="bias",
        when=ProbeEveryBatch(refresh=1),
    )
    ids, step = token_ids(3, 10), token_ids(3, 1, seed=7)
    with torch.no_grad():
        want = model(torch.cat([ids, step], 1)).logits[:, -1]
        with attach(model, method, 0.05, calibration=calibration) as handle:
            assert len(handle.runtimes) == 1
            cache = model(ids, use_cache=True).past_key_values
            close(model(step, past_key_values=cache).logits[:, -1], want)


def test_history_moves_with_every_prompt_but_not_while_decoding(llama):
    model, calibration = llama
    ids = token_ids(2, 10)
    with attach(model, PROBING, 0.3, calibration=calibration) as handle, torch.no_grad():
        history = handle.runtimes[-1].follower.history.energy
        first = history.clone()
        cache = DynamicCache(config=model.config)
        model(ids, past_key_values=cache)
        second, units = history.clone(), handle.kept_units()
        assert not second.equal(first)
        for step in range(3):
            model(token_ids(2, 1, seed=step), past_key_values=cache)
        assert history.equal(second) and handle.kept_units() == units
        model(ids)
        assert not history.equal(second)


def test_refresh_that_cannot_be_is_refused():
    with pytest.raises(
        UsageError, match="refresh must be a whole number of tokens from 0 to 1073741824, not -1"
    ):
        ProbeEveryBatch(refresh=-1)
    with pytest.raises(UsageError, match="own_positions=0"):
        ProbeEveryBatch(refresh=4, own_positions=4)


# -- caches --------------------------------------------------------------------------------------


def test_the_cache_holds_kept_key_value_heads_only(llama):
    model, calibration = llama
    with attach(model, PROBING, 0.3, calibration=calibration) as handle, torch.no_grad():
        cache = model(token_ids(), use_cache=True).past_key_values
        kept_heads = [k for b, k in zip(handle.blocks, handle.widths, strict=True) if b.kind == "attention"]
    assert min(kept_heads) == 1
    assert [layer.keys.shape[1] for layer in cache.layers] == kept_heads


def test_a_cache_from_elsewhere_is_refused(llama):
    model, calibration = llama
    with torch.no_grad():
        cache = model(token_ids(), use_cache=True).past_key_values
        with (
            attach(model, PROBING, 0.3, calibration=calibration),
            pytest.raises(UsageError, match="KV cache was not filled"),
        ):
            model(token_ids(4, 1), past_key_values=cache)


def test_the_cache_of_another_attach_is_refused(llama):
    model, calibration = llama
    later = DynamicCache(config=model.config)
    with attach(model, PROBING, 0.3, calibration=calibration), torch.no_grad():
        model(token_ids(seed=4), past_key_values=later)
    with attach(model, PROBING, 0.3, calibration=calibration), torch.no_grad():
        model(token_ids(seed=4))
        with pytest.raises(UsageError, match="KV cache was not filled"):
            model(token_ids(4, 1), past_key_values=later)  # the same heads, but of another attach


def test_the_cache_of_a_pass_that_failed_is_refused(llama):
    # Some layers hold the token, others do not.
    model, calibration = llama
    with attach(model, PROBING, 0.3, calibration=calibration), torch.no_grad():
        cache = model(token_ids(), use_cache=True).past_key_values
        hook = find_decoder(model).layers[4].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(token_ids(4, 1), past_key_values=cache)
        hook.remove()
        with pytest.raises(UsageError, match="run its prompt again"):
            model(token_ids(4, 1), past_key_values=cache)


def test_a_cache_that_the_model_made_itself_can_be_continued_and_copied(llama):
    # The usual loop by hand, and one prompt with two ways to go on.
    model, calibration = llama
    prompt, steps = token_ids(2, 10), [token_ids(2, 1, seed=s) for s in (5, 6)]
    with attach(model, PROBING, 0.3, calibration=calibration) as handle, torch.no_grad():
        cache = model(prompt, use_cache=True).past_key_values
        caches = [cache, copy.deepcopy(cache)]
        got = [model(s, past_key_values=c).logits[:, -1] for s, c in zip(steps, caches, strict=True)]
        choice = kept(handle)
    with masked(choice), torch.no_grad():
        for step, out in zip(steps, got, strict=True):
            close(out, model(torch.cat([prompt, step], 1)).logits[:, -1])


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_a_cache_that_was_emptied_can_be_filled_again(llama, kind):
    model, calibration = llama
    cache = kind(config=model.config, **({"max_cache_len": 24} if kind is StaticCache else {}))
    with attach(model, PROBING, 0.3, calibration=calibration) as handle, torch.no_grad():
        for seed in (1, 2):
            cache.reset()
            prompt, step = token_ids(2, 10, seed=seed), token_ids(2, 1, seed=5)
            model(prompt, past_key_values=cache)
            got, choice = model(step, past_key_values=cache).logits[:, -1], kept(handle)
    with masked(choice), torch.no_grad():
        close(got, model(torch.cat([prompt, step], 1)).logits[:, -1])


def test_a_cache_laid_out_for_all_heads_is_refused(llama):
    model, calibration = llama
    with attach(model, PROBING, 0.3, calibration=calibration):
        with pytest.raises(UsageError, match="laid out for 2 key-value heads"):
            generate(model, *padded("left"), cache_implementation="static", prefill_chunk_size=8)
        generate(model, *padded("left"), cache_implementation="static")


@pytest.mark.parametrize("method", ["probe", "best-dynamic"])
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_one_token_on_a_cache_that_was_reset_is_a_prompt(kind, method):
    model, ids = FAMILIES["llama-gqa"](), token_ids(2, 10, seed=4)
    cache = kind(config=model.config, **({"max_cache_len": 24} if kind is StaticCache else {}))
    stages = []
    with attach(model, method, 0.3, calibration=token_ids(6, 16, seed=9)) as handle, torch.no_grad():
        entry = handle.runtimes[0].block.entry
        entry.register_forward_pre_hook(lambda *_: stages.append(handle.current.stage))
        model(ids, past_key_values=cache)
        model(ids[:, :1], past_key_values=cache)
        cache.reset()
        model(ids[:, :1], past_key_values=cache)
        model(ids[:, :1], past_key_values=cache)
    assert stages == ["choose", "keep", "choose", "keep"]


@pytest.mark.parametrize(
    "method", ["dense", compose("wanda-sp", blocks=["mlp"])], ids=["dense", "MLPs alone"]
)
def test_a_method_that_cuts_no_heads_refuses_the_cache_of_one_that_does(method):
    model, ids, windows = FAMILIES["llama-gqa"](), token_ids(2, 10, seed=4), token_ids(6, 16, seed=9)
    cache = DynamicCache(config=model.config)
    with attach(model, "wanda-sp", 0.3, calibration=windows), torch.no_grad():
        model(ids, past_key_values=cache)
    with attach(model, method, 0.2, calibration=windows), torch.no_grad():
        with pytest.raises(UsageError, match="filled under another method"):
            model(ids[:, :1], past_key_values=cache)
        model(ids[:, :1], past_key_values=model(ids, use_cache=True).past_key_values)
