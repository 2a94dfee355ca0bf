"""Small batches that share a choice: for how long, and when they may not."""

import pytest
import torch
from tiny import PROBING, close, kept, logits, masked, padded, token_ids
from transformers import DynamicCache

from probeprune import Probe, attach, compose
from probeprune.strategies.probe_every_batch import ProbeEveryBatch


def test_small_batches_share_a_choice_until_enough_tokens_went_by(llama):
    model, calibration = llama
    method = compose("probe", when=ProbeEveryBatch(Probe(reuse=60)))
    batches = [token_ids(2, 12, seed=50 + i) for i in range(8)]  # 24 tokens each
    with attach(model, method, 0.3, calibration=calibration) as handle:
        history = handle.runtimes[-1].follower.history.energy
        swapped, before, seen = [], history.clone(), []
        for ids in batches:
            got = logits(model, ids, torch.ones_like(ids))
            seen.append((ids, got, kept(handle)))
            swapped.append(handle.swapped)
            assert not history.equal(before), "history moves all the same"
            before = history.clone()
    # Tokens since the choice: - 24 48 (72) 24 48 (72) 24
    chosen = [i for i in range(8) if swapped[i] != (swapped[i - 1] if i else -1)]
    assert set(chosen) <= {0, 3, 6} and 3 in chosen
    for ids, got, choice in seen:
        with masked(choice):
            close(got, logits(model, ids, torch.ones_like(ids)))


def test_large_batches_and_prompts_of_a_cache_are_always_probed(llama):
    model, calibration = llama
    with_default, published = [], []
    for method, found in (
        (compose("probe", when=ProbeEveryBatch(Probe(reuse=24))), with_default),
        (PROBING, published),
    ):
        with attach(model, method, 0.3, calibration=calibration) as handle, torch.no_grad():
            for seed in range(4):
                model(token_ids(2, 12, seed=seed))
                found.append(handle.kept_units())
                model(token_ids(1, 5, seed=seed), past_key_values=DynamicCache(config=model.config))
                found.append(handle.kept_units())
    assert with_default == published


def test_what_a_failed_batch_chose_is_not_reused(llama):
    model, calibration = llama
    with attach(
        model, compose("probe", when=ProbeEveryBatch(Probe(reuse=10**6))), 0.3, calibration=calibration
    ) as handle:
        embedded = model.get_input_embeddings()(token_ids())
        with pytest.raises(FloatingPointError), torch.no_grad():
            model(inputs_embeds=torch.full_like(embedded, float("nan")))
        logits(model, *padded("none"))
        first = handle.kept_units()
    with attach(model, PROBING, 0.3, calibration=calibration) as handle:
        logits(model, *padded("none"))
        assert handle.kept_units() == first
