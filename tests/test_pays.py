"""Batches are probed where that pays, by costs that are given or measured; the others use what there is."""

import json
from dataclasses import replace

import pytest
import torch
from test_cli import call
from test_offloaded import on_disk
from tiny import FAMILIES, SIDES, close, kept, logits, masked, padded, snapshot, token_ids
from transformers import DynamicCache

from probeprune import (
    METHODS,
    Costs,
    Probe,
    ProbeEveryBatch,
    RefitEveryBatch,
    UsageError,
    attach,
    compose,
    load_model,
    save,
)
from probeprune.algebra.moments import Tokens
from probeprune.evaluation.perplexity import perplexity
from probeprune.runtime import attaching, measuring
from probeprune.runtime.attaching import attach_again
from probeprune.strategies.account import MARGIN, Account

THIRD = Costs((1,), (2.0,), (1.0,), (1,), (2.9 / MARGIN,))
"""A batch of n tokens saves n seconds, and a probe of n tokens costs 2.9 n: the third pays."""
NEVER = Costs((1,), (2.0,), (1.0,), (1,), (1e9,))
ALL = Probe(tokens=1.0, samples=1.0, pays="auto")
METHOD = compose("probe", when=ProbeEveryBatch(ALL))
REFITTED = compose("best-dynamic", when=RefitEveryBatch(replace(ALL, pick="even")))


def decisions(account: Account, *sizes: int) -> list[bool]:
    return [account.pays(Tokens(1, size)) for size in sizes]


def test_batches_earn_and_probes_are_paid():
    assert decisions(Account(THIRD, ALL), *[10] * 7) == [False, False, True] * 2 + [False]
    assert decisions(Account(NEVER, ALL), *[10] * 9) == [False] * 9
    assert decisions(Account(replace(THIRD, pruned=(3.0,)), ALL), *[10] * 9) == [False] * 9


def test_a_large_batch_does_not_pay_for_a_run_of_small_ones():
    account = Account(replace(THIRD, probe_tokens=(1, 1000), probe=(2.5 / MARGIN, 100.0 / MARGIN)), ALL)
    assert decisions(account, 1000) == [True] and account.balance == pytest.approx(100)
    assert decisions(account, *[1] * 6) == [True, True, False, True, False, True]


def test_costs_between_and_beyond_what_was_measured():
    costs = Costs((10, 20), (1.0, 3.0), (1.0, 1.0), (5, 6), (2.0, 1.0))
    assert [costs.earned(n) for n in (1, 10, 15, 20, 40)] == [0, 0, 1, 2, 6]
    assert [costs.probing(n) for n in (1, 5, 6, 7, 9)] == [2, 2, 1, 0, 0]
    assert Costs(**json.loads(json.dumps(costs.record()))) == costs


@pytest.mark.parametrize(
    "wrong",
    [
        {"tokens": ()},
        {"tokens": (2, 1)},
        {"dense": (1.0,)},
        {"tokens": (0, 1)},
        {"probe": (float("nan"),)},
        {"pruned": (-1.0, 1.0)},
        {"probe": ("x",)},
    ],
)
def test_costs_that_are_none_are_one_sentence(wrong):
    with pytest.raises(UsageError, match="costs are lists of seconds"):
        replace(Costs((1, 2), (1.0, 2.0), (1.0, 1.0), (1,), (1.0,)), **wrong)


def test_what_does_not_go_together(llama):
    model, calibration = llama
    with pytest.raises(UsageError, match="two rules for which batches are probed"):
        Probe(reuse=8, pays="auto")
    with pytest.raises(UsageError, match="unknown pays 'sometimes'"):
        Probe(pays="sometimes")
    for method in ("probe", "wanda-sp"):
        with pytest.raises(UsageError, match=f"leave them out for method '{method}'"):
            attach(model, method, 0.3, calibration=calibration, costs=THIRD)
    assert METHODS["best-dynamic"].when.probe.pays == "auto" and METHODS["probe"].when.probe.pays == "always"


@pytest.mark.parametrize(("method", "static"), [(METHOD, "ppsp"), (REFITTED, "best-static")])
@pytest.mark.parametrize("side", SIDES)
def test_without_a_choice_batches_run_as_calibration_says(method, static, side, llama):
    model, calibration = llama
    with attach(model, static, 0.3, calibration=calibration):
        wanted = logits(model, *padded(side))
    before = snapshot(model)
    with attach(model, method, 0.3, calibration=calibration, costs=NEVER) as handle:
        close(logits(model, *padded(side)), wanted)
        assert (handle.batches, handle.probed_batches, handle.costs) == (1, 0, NEVER)
    before.assert_untouched()


def test_every_third_batch_chooses_and_the_two_behind_use_its_choice(llama):
    model, calibration = llama
    seen = []
    with attach(model, METHOD, 0.3, calibration=calibration, costs=THIRD) as handle:
        for seed in range(7):
            ids = token_ids(2, 12, seed=60 + seed)
            probed, before = handle.probed_batches, kept(handle)
            got = logits(model, ids, torch.ones_like(ids))
            seen.append((ids, got, kept(handle)))
            assert (handle.probed_batches > probed) == (seed % 3 == 2)
            if seed % 3 != 2:
                assert [list(u) for _, u in kept(handle)] == [list(u) for _, u in before]
        assert handle.probed_share == 2 / 7
    for ids, got, choice in seen:
        with masked(choice):
            close(got, logits(model, ids, torch.ones_like(ids)))


@pytest.mark.parametrize("method", [METHOD, REFITTED])
def test_the_same_costs_repeat_a_run(method, llama):
    model, calibration = llama
    runs = []
    for _ in range(2):
        with attach(model, method, 0.3, calibration=calibration, costs=THIRD):
            runs.append([logits(model, *padded("none", seed + 1)) for seed in range(5)])
    assert all(one.equal(other) for one, other in zip(*runs, strict=True))


def test_prompts_of_a_cache_are_probed_and_kept(llama):
    model, calibration = llama
    with attach(model, METHOD, 0.3, calibration=calibration, costs=NEVER) as handle, torch.no_grad():
        model(token_ids(2, 12))
        cache = model(token_ids(1, 6), past_key_values=DynamicCache(config=model.config)).past_key_values
        choice = kept(handle)
        assert handle.probed_batches == 1
        got = model(token_ids(1, 1, seed=4), past_key_values=cache).logits
    with masked(choice), torch.no_grad():
        ids = torch.cat([token_ids(1, 6), token_ids(1, 1, seed=4)], 1)
        close(got, model(ids).logits[:, -1:])


def test_a_batch_behind_a_failed_one_is_probed(llama):
    model, calibration = llama
    with attach(model, METHOD, 0.3, calibration=calibration, costs=THIRD) as handle, torch.no_grad():
        embedded = torch.full_like(model.get_input_embeddings()(token_ids()), float("nan"))
        for _ in range(2):
            model(inputs_embeds=embedded)  # not probed: nobody looks at it
        with pytest.raises(FloatingPointError):
            model(inputs_embeds=embedded)
        model(token_ids())
        assert handle.probed_batches == 2


@pytest.mark.parametrize("method", [METHOD, REFITTED])
def test_a_layer_at_a_time_decides_the_same(method, tmp_path):
    model, text = FAMILIES["llama-gqa"](), token_ids(10, 40, seed=9)
    figures = []
    for m in (model, on_disk(model, tmp_path)):
        with attach(m, method, 0.3, calibration=text, costs=THIRD) as handle:
            figures.append(perplexity(m, token_ids(10, 64, seed=3), batch_size=2).losses)
            assert (handle.batches, handle.probed_batches) == (5, 1)
    assert figures[0] == pytest.approx(figures[1], rel=1e-4)


@pytest.mark.parametrize("name", ["probe", "best-dynamic"])
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_costs_are_measured_once_and_leave_the_model_as_it_was(name, where, tmp_path, monkeypatch):
    model = FAMILIES["llama-gqa"]()
    model = model if where == "memory" else on_disk(model, tmp_path)
    before = snapshot(model) if where == "memory" else None
    monkeypatch.setattr(attaching, "costs_for", measuring.costs_for)
    monkeypatch.setattr(measuring, "_known", {})
    monkeypatch.setattr(measuring, "SIZES", (8, 16))
    monkeypatch.setenv("PROBEPRUNE_CACHE", str(tmp_path / "cache"))
    when = METHODS[name].when
    method = compose(name, when=replace(when, probe=replace(when.probe, pays="auto")))
    with attach(model, method, 0.3, calibration=token_ids(10, 40, seed=9)) as handle:
        first, again = handle.costs, handle.kept
    assert again.costs is None and first.tokens == (8, 16) and min(first.dense + first.pruned) > 0
    if before is not None:
        before.assert_untouched()
    (file,) = (tmp_path / "cache" / "costs").iterdir()
    monkeypatch.setattr(measuring, "_known", {})
    monkeypatch.setattr(measuring, "measured", lambda *_: pytest.fail("measured twice"))
    with attach_again(model, again) as handle:
        assert handle.costs == first
    file.write_text('{"tokens": [1]}')
    monkeypatch.setattr(measuring, "_known", {})
    monkeypatch.setattr(measuring, "measured", lambda *_: THIRD)
    with attach_again(model, again) as handle:
        assert handle.costs == THIRD


def test_given_costs_are_saved_with_the_model(tmp_path, number_tokenizer):
    model = FAMILIES["llama-gqa"]()
    model.resize_token_embeddings(1002)
    with attach(model, METHOD, 0.3, calibration=token_ids(6, 16, seed=9), costs=THIRD):
        save(model, tmp_path / "kept", tokenizer=number_tokenizer)
    loaded = load_model(str(tmp_path / "kept"), dtype="float32")
    assert loaded.handle.kept.costs == loaded.handle.costs == THIRD
    file = tmp_path / "kept" / "attached.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps(record | {"costs": {"tokens": [1]}}))
    with pytest.raises(UsageError, match=r"attached\.json"):
        load_model(str(tmp_path / "kept"), dtype="float32")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--method", "probe", "--ratio", "0.2", "--pays", "often"), "unknown rule for --pays 'often'"),
        (("--method", "wanda-sp", "--ratio", "0.2", "--pays", "auto"), "'wanda-sp' probes none"),
        (("--pays", "auto"), "--pays goes with --method"),
    ],
)
def test_a_rule_that_cannot_be_is_one_sentence(arguments, says, capsys):
    assert call("eval", *arguments) == 2
    assert says in capsys.readouterr().err
