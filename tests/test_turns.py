"""Several generations in turn on one attached model: each goes on under the units that its own prompt
chose."""

import copy
import pickle

import pytest
import torch
from all_methods import ALL, KEEP_THE_PROMPT, RATIO, SPREAD, prepared
from tiny import close, kept, padded, token_ids

from probeprune import UsageError, attach

PROMPTS = {1: token_ids(2, 20, seed=1), 2: token_ids(3, 12, seed=2), 3: token_ids(1, 30, seed=3)}
STEPS = 3


def chats(model, turns):
    """Logits of every pass of several chats, by (chat, step); `turns` lists the chats as their turns come."""
    caches, done, logits = {}, dict.fromkeys(PROMPTS, 0), {}
    for chat in turns:
        step = done[chat]
        done[chat] += 1
        ids = (
            PROMPTS[chat] if step == 0 else token_ids(len(PROMPTS[chat]), 1 + step % 2, seed=10 * chat + step)
        )
        with torch.no_grad():
            out = model(ids, past_key_values=caches.get(chat), use_cache=True)
        caches[chat], logits[chat, step] = out.past_key_values, out.logits
    return logits


@pytest.mark.parametrize("family, name", [(f, n) for f, n in SPREAD if n in KEEP_THE_PROMPT])
def test_chats_in_turn_equal_chats_one_after_the_other(family, name):
    model, calibration = prepared(family)
    # Prompts come in the same order, so that history is the same.
    one_by_one = [1, *[1] * STEPS, 2, *[2] * STEPS, 3, *[3] * STEPS]
    in_turn = [1, 2, 3, 3, 1, 2, 2, 1, 3, 1, 2, 3]
    with attach(model, ALL[name], RATIO, calibration=calibration):
        expected = chats(model, one_by_one)
    with attach(model, ALL[name], RATIO, calibration=calibration):
        got = chats(model, in_turn)
    assert got.keys() == expected.keys() and len(got) == 12
    for key, logits in got.items():
        close(logits, expected[key])


def test_the_chats_chose_different_heads():
    """Otherwise the test above would pass without bringing anything back."""
    model, calibration = prepared("llama-gqa")
    choices = []
    with attach(model, ALL["probe"], RATIO, calibration=calibration) as handle:
        for prompt in PROMPTS.values():
            with torch.no_grad():
                model(prompt)
            choices.append(kept(handle))
    assert choices[0] != choices[1] != choices[2]


@pytest.mark.parametrize("name", ["probe", "full-batch", "best-dynamic", "wanda-sp"])
def test_generations_with_several_caches(name):
    """Classifier-free guidance runs two prompts side by side, each with its cache."""
    model, calibration = prepared("llama-gqa")
    ids, mask = padded("none", 1)
    options = dict(max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=127)
    with attach(model, ALL[name], RATIO, calibration=calibration):
        guided = model.generate(ids, attention_mask=mask, guidance_scale=1.5, **options)
        # Without a cache, every pass is a prompt of its own: another choice, so only shapes compare.
        assert guided.shape == (1, ids.shape[1] + 4)


def test_a_cache_that_was_copied_goes_on_and_one_that_was_pickled_does_not():
    model, calibration = prepared("llama-gqa")
    more = token_ids(2, 1, seed=8)
    with attach(model, ALL["probe"], RATIO, calibration=calibration), torch.no_grad():
        cache = model(PROMPTS[1], use_cache=True).past_key_values
        copied, pickled = copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))
        expected = model(more, past_key_values=cache).logits
        model(PROMPTS[2], use_cache=True)  # another choice
        close(model(more, past_key_values=copied).logits, expected)
        with pytest.raises(UsageError, match="run its prompt again"):
            model(more, past_key_values=pickled)


def test_a_choice_is_forgotten_with_its_caches():
    """Nothing is put away for a prompt that nobody can continue."""
    model, calibration = prepared("llama-gqa")
    with attach(model, ALL["probe"], RATIO, calibration=calibration) as handle, torch.no_grad():
        cache = model(PROMPTS[1], use_cache=True).past_key_values
        first = cache._probeprune_choice
        model(PROMPTS[2], use_cache=False)
        assert len(first.snapshots) == len(handle.runtimes)
        assert handle._in_view is None
        model(PROMPTS[3], use_cache=False)
        close(first.snapshots[0].order.sort().values, torch.arange(len(first.snapshots[0].order)))
