"""Methods that refit: attached, cut and saved alike; kept on disk; refused where they cannot be."""

from dataclasses import replace

import pytest
import torch
from all_methods import SOME_FAMILIES
from refitting import WINDOWS, consumers_of, following, logits, refitting
from tiny import FAMILIES, Given, cuts, opened, token_ids
from transformers import AutoModelForCausalLM

from probeprune import (
    Compensation,
    Refit,
    UsageError,
    attach,
    compose,
    find_blocks,
    prepare,
    prune,
    save,
    with_equal_widths,
)
from probeprune.calibration.collecting import calibrate
from probeprune.calibration.refit import RefitRequest, refit
from probeprune.calibration.statistics import Statistics
from probeprune.preparation import Preparation

ORDERS = [("group", "obs"), ("balanced", "random"), ("group", "random"), ("balanced", "obs")]
"""(units, importance): two pairs in which each is once, and the other two."""


@pytest.mark.parametrize(
    "family, units, importance",
    [(f, *order) for f in FAMILIES for order in ORDERS[: 4 if f in SOME_FAMILIES else 2]],
)
def test_window_and_cut_and_checkpoint_show_the_refit_and_detaching_leaves_no_trace(
    family, units, importance, tmp_path
):
    model = FAMILIES[family]()
    method = refitting(
        "random", importance=importance, unit_kind=units, how=Refit(damping=(1e-1,), sensitivity=2)
    )
    before, ids = {k: v.clone() for k, v in model.state_dict().items()}, token_ids()
    preparation = Preparation(model, WINDOWS, batch_size=8)
    consumers = preparation.statistics(method, 0.3).consumers
    plain = replace(method, importance="random", compensation=Compensation())
    with attach(model, plain, 0.3):
        without = logits(model, ids)
    with attach(model, method, 0.3, calibration=preparation) as handle:
        attached = logits(model, ids)
        kept = handle.kept_units()
    assert (attached - without).abs().max() > 1e-2
    after = model.state_dict()
    assert before.keys() == after.keys() and all(v.equal(after[k]) for k, v in before.items())
    done = prune(model, method, 0.3, calibration=WINDOWS, batch_size=8)
    assert [k.units for k in done.kept] == [k.units for k in kept]
    torch.testing.assert_close(logits(model, ids), attached, rtol=1e-4, atol=1e-4)
    assert done.record()["refits"].keys() == consumers.keys()
    save(model, tmp_path / "out")
    assert logits(opened(tmp_path / "out"), ids).equal(logits(model, ids))


def test_consumers_are_read_back_and_made_anew_for_anything_else(tmp_path):
    model, method = FAMILIES["opt"](), following()
    first = consumers_of(model, method, 0.4, cache=tmp_path)
    files = set(tmp_path.glob("*.safetensors"))
    again = consumers_of(model, method, 0.4, cache=tmp_path)
    assert set(tmp_path.glob("*.safetensors")) == files
    assert first.keys() == again.keys()
    for name, consumer in first.items():
        other = again[name]
        assert consumer.record() == other.record()
        assert consumer.weight.equal(other.weight) and consumer.bias.equal(other.bias)
        assert (consumer.inverse is None) == (other.inverse is None)
        if consumer.inverse is not None:
            assert consumer.inverse.equal(other.inverse) and consumer.mean.equal(other.mean)
    for changed in (
        (method, 0.3, WINDOWS),
        (method, 0.4, WINDOWS[:20]),
        (following(Refit(damping=(1e-1,), sensitivity=2)), 0.4, WINDOWS),
    ):
        before = len(list(tmp_path.glob("*.safetensors")))
        consumers_of(model, *changed, cache=tmp_path)
        assert len(list(tmp_path.glob("*.safetensors"))) > before
    broken = max(files, key=lambda f: f.stat().st_size)
    broken.write_bytes(broken.read_bytes()[:1000])
    assert consumers_of(model, method, 0.4, cache=tmp_path).keys() == first.keys()


def test_a_refit_takes_no_more_windows_than_it_may():
    # Units are ordered by their weights, so that only the refit reads the windows.
    model, few = FAMILIES["llama"](), refitting("magnitude", Refit(windows=9, damping=(1e-1,)))
    some = consumers_of(model, few, 0.3)
    same = consumers_of(model, few, 0.3, WINDOWS[:9])
    more = consumers_of(model, refitting("magnitude", Refit(damping=(1e-1,))), 0.3)
    assert all(c.weight.equal(same[n].weight) and not c.weight.equal(more[n].weight) for n, c in some.items())


def test_one_width_for_all_layers_stays_a_plain_checkpoint(tmp_path):
    model = FAMILIES["mistral"]()
    prune(model, replace(with_equal_widths("wanda-sp"), compensation=Refit()), 0.3, calibration=WINDOWS)
    save(model, tmp_path / "out", layout="uniform")
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out")).__name__ == "MistralForCausalLM"


# -- refusals ----------------------------------------------------------------------------------


def test_too_few_windows_are_refused():
    method = refitting(how=Refit(damping=(0.1, 1.0)))
    with pytest.raises(UsageError, match="leaves none to fit"):
        prune(FAMILIES["llama"](), method, 0.3, calibration=WINDOWS[:1])


@pytest.mark.parametrize("made_for", [None, 0.5])
def test_consumers_that_are_missing_or_made_for_other_units_are_refused(made_for):
    model = FAMILIES["llama"]()
    consumers = {} if made_for is None else consumers_of(model, refitting(), made_for)
    given = Given(model, Statistics(calibrate(model, WINDOWS), consumers=consumers))
    for apply in (attach, prune):
        with pytest.raises(UsageError, match="no consumer of"):
            apply(model, refitting(), 0.3, calibration=given)


def test_a_name_that_is_no_block_is_refused():
    with pytest.raises(UsageError, match="lm_head is not a block"):
        refit(FAMILIES["llama"](), RefitRequest(cuts({"lm_head": torch.arange(3)})), WINDOWS)


@pytest.mark.parametrize(
    ("base", "changes", "says"),
    [
        ("wanda-sp", {"importance": "obs"}, r"give compensation=Refit\(\)"),
        ("wanda-sp", {"importance": "obs", "allocation": "global", "compensation": Refit()}, "no scores"),
        ("wanda-sp", {"compensation": None}, "a compensation is a record"),
        ("wanda-sp", {"compensation": Refit}, "a compensation is a record"),
        ("wanda-sp", {"compensation": "least-square"}, "did you mean 'least-squares'"),
        ("probe", {"compensation": Refit()}, "a probe chooses others at every batch"),
        ("best-dynamic", {"compensation": "none", "importance": "ppsp"}, r"give compensation=Refit\(\)"),
        ("best-dynamic", {"blocks": ("attention",)}, "prune MLPs"),
        ("dense", {"compensation": Refit()}, "leave the refit out"),
    ],
)
def test_combinations_that_cannot_work_are_refused(base, changes, says):
    with pytest.raises(UsageError, match=says):
        compose(base, **changes)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"damping": ()}, "damping"),
        ({"damping": (0.0,)}, "damping"),
        ({"held_out": 1.0}, "held_out must be .*not 1.0"),
        ({"share": 2.0}, "share must be .*not 2.0"),
        ({"windows": 0}, "windows must be .*from 1 to .*not 0"),
        ({"sensitivity": -1}, "sensitivity"),
        ({"sequential": False}, "share=0"),
    ],
)
def test_settings_that_make_no_refit_are_refused(settings, says):
    with pytest.raises(UsageError, match=says):
        Refit(**settings)


@pytest.mark.parametrize("name", ["best-static", "best-dynamic"])
@pytest.mark.parametrize("dead", [0.6, 0.95, 1.0])
@pytest.mark.parametrize("family", ["opt", "gpt-neox"])
def test_layers_with_more_than_half_of_their_channels_dead_are_refitted(name, dead, family):
    model = FAMILIES[family]()
    for block in find_blocks(model):
        count = round(dead * block.units) if block.kind == "mlp" else 0
        with torch.no_grad():
            for producer in block.producers if count else ():
                producer.weight[:count] = 0
                producer.bias[:count] = -1e4  # ReLU and GELU give nothing
    with torch.no_grad():
        assert model(token_ids()).logits.isfinite().all()
    calibration = prepare(model, name, 0.3, token_ids(8, 16))
    with torch.no_grad(), attach(model, name, 0.3, calibration=calibration):
        assert model(token_ids()).logits.isfinite().all()
