"""What every method promises while it is attached, over one list of all methods (`all_methods.py`)."""

import json

import pytest
import torch
from all_methods import (
    ALL,
    EVERYWHERE,
    KEEP_THE_PROMPT,
    PROBE_THE_WHOLE,
    RATIO,
    SOME_FAMILIES,
    SPREAD,
    STATIC,
    ByHand,
    check_passes,
    prepared,
)
from tiny import FAMILIES, close, logits, padded, snapshot

from probeprune import METHODS, attach, records
from probeprune.methods import TABLES, Method

FAMILY = pytest.mark.parametrize("family", SOME_FAMILIES)
ELSEWHERE = [f for f in FAMILIES if f not in SOME_FAMILIES]


def test_the_list_has_every_method_that_does_not_train():
    assert {n for n, m in METHODS.items() if not m.when.trains} <= ALL.keys()
    assert {"dense", "flap", "llm-pruner", "loraprune", "best-static", "best-dynamic"} <= ALL.keys()


@pytest.mark.parametrize(
    "family, name",
    [(f, n) for f in SOME_FAMILIES for n in ALL] + [(f, n) for f in ELSEWHERE for n in EVERYWHERE],
)
def test_a_pruned_pass_is_the_dense_one_masked_and_compensated(family, name):
    model, calibration = prepared(family)
    check_passes(model, ALL[name], calibration)


@FAMILY
def test_a_refit_at_every_batch_keeps_the_units_of_its_importance(family):
    model, calibration = prepared(family)
    kept = []
    for name in ("wanda-sp", "scored, refit every batch", "best-dynamic"):
        with attach(model, ALL[name], RATIO, calibration=calibration) as handle:
            logits(model, *padded("left"))
            kept.append(handle.kept_units())
    assert kept[0] == kept[1] != kept[2]


@pytest.mark.parametrize("family, name", SPREAD)
def test_an_exception_inside_a_pass_leaves_the_model_usable_and_restorable(family, name):
    model, calibration = prepared(family)
    ids, mask = padded("left")
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt), attach(model, ALL[name], RATIO, calibration=calibration) as handle:
        hook = handle.blocks[-1].producers[0].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            logits(model, ids, mask)
        hook.remove()
        got, by_hand = logits(model, ids, mask), ByHand(handle, mask)
        raise KeyboardInterrupt
    before.assert_untouched()
    with by_hand():
        close(got, logits(model, ids, mask))


@pytest.mark.parametrize("family, name", [(f, n) for f, n in SPREAD if n in KEEP_THE_PROMPT])
def test_generation_with_a_cache_is_that_without_under_the_prompts_units(family, name):
    model, calibration = prepared(family)
    ids, mask = padded("left")
    with attach(model, ALL[name], RATIO, calibration=calibration) as handle:
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=4,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=127,
            return_dict_in_generate=True,
            output_logits=True,
        )
        by_hand = ByHand(handle, mask)
    whole_mask = torch.cat([mask, torch.ones(4, 4, dtype=torch.long)], 1)
    positions = (whole_mask.cumsum(1) - 1).clamp_min(0)
    with by_hand(), torch.no_grad():
        model(ids, attention_mask=mask)  # the prompt, which consumers that follow are fitted to
        whole = model(
            out.sequences, attention_mask=whole_mask, position_ids=positions, use_cache=False
        ).logits
    assert len(out.logits) == 4
    for step, got in enumerate(out.logits):
        close(got, whole[:, ids.shape[1] - 1 + step])


@pytest.mark.parametrize("family, name", SPREAD)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_equals_its_sequences_alone_under_the_same_units(family, name, side):
    model, calibration = prepared(family)
    ids, mask = padded(side, batch=2)
    rows = [row[real.bool()][None] for row, real in zip(ids, mask, strict=True)]
    alone = []
    with attach(model, ALL[name], RATIO, calibration=calibration) as handle:
        got, by_hand = logits(model, ids, mask), ByHand(handle, mask)
        if name in STATIC:
            alone = [logits(model, row, torch.ones_like(row)) for row in rows]
    with by_hand():
        logits(model, ids, mask)  # what consumers that follow are fitted to
        close(got, torch.cat([logits(model, row, torch.ones_like(row)) for row in rows]))
    if alone:
        close(got, torch.cat(alone))


@FAMILY
@pytest.mark.parametrize("name", PROBE_THE_WHOLE)
@pytest.mark.parametrize("side", ["left", "right"])
def test_columns_of_padding_change_nothing_where_all_of_a_batch_is_its_probe(family, name, side):
    model, calibration = prepared(family)
    ids, mask = padded(side, length=24)
    none = torch.zeros(4, 8, dtype=torch.long)
    order = (lambda x: [none, x]) if side == "left" else (lambda x: [x, none])
    results = []
    for batch in ((ids, mask), (torch.cat(order(ids), 1), torch.cat(order(mask), 1))):
        with attach(model, ALL[name], RATIO, calibration=calibration) as handle:
            results.append((logits(model, *batch), handle.kept_units()))
    (got, units), (wider, same_units) = results
    assert units == same_units
    close(wider, got)


@pytest.mark.parametrize("name", {**METHODS, **ALL})
def test_a_methods_record_is_read_back_as_the_same_method(name):
    method = {**METHODS, **ALL}[name]
    assert records.from_json(Method, json.loads(json.dumps(method.record())), TABLES) == method
