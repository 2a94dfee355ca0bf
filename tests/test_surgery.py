"""Pruned for good: the function of the window and of the masked dense model, and an ordinary model after."""

import pytest
import torch
from tiny import FAMILIES, Given, masked, padded, token_ids
from transformers.integrations.heterogeneity.configuration_utils import AmbiguousGlobalPerLayerAttributeError

from probeprune import METHODS, Gradients, attach, compose, find_blocks, prepare, prune, with_equal_widths
from probeprune.calibration.collecting import calibrate
from probeprune.calibration.statistics import Statistics
from probeprune.errors import UsageError

WINDOWS = token_ids(8, 24, seed=3)


def logits(model, ids, mask=None):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits


def originals(model, pruning, units="group"):
    """(block of the dense model, kept ids), for blocks that lost units."""
    kept = {k.name: k for k in pruning.kept}
    return [(b, kept[b.name].units) for b in find_blocks(model, units) if len(kept[b.name].units) < b.units]


@pytest.mark.parametrize("units", ["group", "balanced"])
@pytest.mark.parametrize("family", FAMILIES)
def test_cut_is_the_window_and_the_masked_dense_model(family, units):
    model, dense = FAMILIES[family](), FAMILIES[family]()
    method = compose("random", unit_kind=units, skip_layers=2)
    done = prune(model, method, 0.4)
    ids, mask = padded("left")
    real = mask.bool()
    got = logits(model, ids, mask)[real]
    with attach(dense, method, 0.4) as handle:
        assert [k.units for k in handle.kept_units()] == [k.units for k in done.kept]
        assert handle.removed_share == pytest.approx(done.removed_share)
        torch.testing.assert_close(got, logits(dense, ids, mask)[real], rtol=1e-4, atol=1e-4)
    with masked(originals(dense, done, units)):
        torch.testing.assert_close(got, logits(dense, ids, mask)[real], rtol=1e-4, atol=1e-4)
    assert len(originals(dense, done, units)) == 2 * (len(find_blocks(dense)) // 2 - 2)


@pytest.mark.parametrize("family", ["llama", "llama-bias", "opt", "phi3-gqa"])
def test_a_bias_is_folded_into_the_consumer(family):
    model, dense = FAMILIES[family](), FAMILIES[family]()
    moments = calibrate(dense, WINDOWS)
    method = compose("flap", skip_layers=1)
    prune(model, method, 0.3, calibration=WINDOWS)
    ids = token_ids()
    with attach(dense, method, 0.3, calibration=WINDOWS):
        torch.testing.assert_close(logits(model, ids), logits(dense, ids), rtol=1e-4, atol=1e-4)
    # By hand, for one block: what the mean of the lost channels adds.
    block, cut = find_blocks(dense)[-1], find_blocks(model)[-1]
    lost = set(range(block.units)) - set(
        next(k for k in prune(FAMILIES[family](), method, 0.3, calibration=WINDOWS).kept[::-1]).units
    )
    own = 0 if block.consumer.bias is None else block.consumer.bias
    mean = moments[block.name].mean
    expected = own + sum(block.consumer.weight[:, j] * mean[j] for j in lost)
    torch.testing.assert_close(cut.consumer.bias, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama-gqa", "opt", "phi3", "gpt-neox", "gemma3"])
def test_what_is_left_is_an_ordinary_model(family):
    model, dense = FAMILIES[family](), FAMILIES[family]()
    before = sum(p.numel() for p in model.parameters())
    done = prune(model, compose("magnitude", skip_layers=1), 0.2)
    assert done.parameters == (before, sum(p.numel() for p in model.parameters()))
    for p in model.parameters():
        assert p.is_leaf and p.requires_grad and p.is_contiguous()
        assert p.untyped_storage().nbytes() == p.numel() * p.element_size(), (
            "a view keeps the dense weight alive"
        )
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)
            assert "forward" not in vars(module)
    # It can be generated with, with and without a cache, and trained.
    ids = token_ids(2, 6)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(ids, use_cache=True, **options)
    assert cached.equal(model.generate(ids, use_cache=False, **options))
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert all(p.grad is not None for b in find_blocks(model) for p in b.consumer.parameters())
    # It can be pruned again, for good and by a probe, still as the masked dense model.
    first = {k.name: torch.tensor(k.units) for k in done.kept}
    again = prune(model, compose("random", skip_layers=2), 0.1)
    kept = [(b, first[b.name][list(k.units)]) for b, k in zip(find_blocks(dense), again.kept, strict=True)]
    with masked(kept):
        torch.testing.assert_close(logits(model, ids), logits(dense, ids), rtol=1e-4, atol=1e-4)
    with attach(model, compose("probe", skip_layers=2), 0.1, calibration=WINDOWS) as handle:
        logits(model, ids)
        assert handle.removed_share == pytest.approx(0.1, abs=0.01)
        shares = [len(k.units) / k.of for k in handle.kept_units() if ".mlp" in k.name][2:]
        assert max(shares) - min(shares) < 0.06, "narrow blocks lose the same share, not the same number"


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_steps_end_at_the_ratio_and_calibrate_anew(allocation):
    model, dense = FAMILIES["llama"](), FAMILIES["llama"]()
    method = compose("wanda-sp", skip_layers=1)
    if allocation == "global":  # scores that are comparable between blocks
        method = compose("flap", skip_layers=1, compensation="none")
    done = prune(model, method, 0.4, calibration=WINDOWS, steps=3)
    assert done.steps == 3 and done.removed_share == pytest.approx(0.4, abs=0.01)
    with masked(originals(dense, done)):
        torch.testing.assert_close(
            logits(model, token_ids()), logits(dense, token_ids()), rtol=1e-4, atol=1e-4
        )
    at_once = prune(FAMILIES["llama"](), method, 0.4, calibration=WINDOWS)
    assert at_once.kept != done.kept, "later steps see what earlier ones left"


def test_evenly_gives_one_width_to_all_layers():
    model = FAMILIES["llama"]()
    prune(model, with_equal_widths("magnitude"), 0.4)
    assert len({b.units for b in find_blocks(model)}) == 2


def test_the_configs_of_other_modules_stay_as_they_were():
    # Phi-3 reads a head count in its config, which all layers share.
    model = FAMILIES["phi3"]()
    prune(model, compose("random", skip_layers=3), 0.2)
    counts = [layer.self_attn.config.num_attention_heads for layer in model.model.layers]
    assert counts[:3] == [6, 6, 6] and max(counts[3:]) < 6
    # The config of the whole model has one for each layer now, and refuses to name a single head count.
    assert [own.num_attention_heads for own in model.config.per_layer_config] == counts
    with pytest.raises(AmbiguousGlobalPerLayerAttributeError):
        _ = model.config.num_attention_heads


@pytest.mark.parametrize(
    ("method", "ratio", "options", "says"),
    [
        ("probe", 0.2, {}, "at every batch"),
        ("dense", 0.2, {}, "does not prune"),
        ("wanda-sp", 0.2, {}, "needs calibration="),
        ("magnitude", 1.0, {}, r"ratio must be a number in \[0, 1\), not 1.0"),
        ("magnitude", 1e-6, {}, "too small to remove a single unit"),
        ("magnitude", 0.0, {}, "too small to remove a single unit"),
        (compose("random", unit_kind="query"), 0.2, {}, "unit_kind='group' or 'balanced'"),
        ("llm-pruner", 0.2, {"calibration": WINDOWS}, "10 windows of 64 tokens"),
        ("magnitude", 0.2, {"steps": 0}, "steps"),
        ("random", 0.95, {}, "at most"),
    ],
)
def test_what_cannot_be_done_changes_nothing(method, ratio, options, says):
    model = FAMILIES["llama-gqa"]()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(UsageError, match=says):
        prune(model, method, ratio, **options)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(v.equal(after[k]) for k, v in before.items())


def test_statistics_of_another_model_and_training_mode_are_refused():
    model = FAMILIES["llama"]()
    with pytest.raises(UsageError, match="another model"):
        prune(model, "flap", 0.2, calibration=prepare(FAMILIES["opt"](), "flap", 0.2, WINDOWS))
    with pytest.raises(UsageError, match="another model"):
        prune(model, "flap", 0.2, calibration=Given(model, Statistics(calibrate(FAMILIES["opt"](), WINDOWS))))
    with pytest.raises(UsageError, match=r"model.eval\(\)"):
        prune(model.train(), "magnitude", 0.2)
    with attach(model.eval(), "magnitude", 0.2), pytest.raises(UsageError, match="detach it first"):
        prune(model, "magnitude", 0.2)
    with attach(model, "magnitude", 0.2), pytest.raises(UsageError, match="detach it first"):
        calibrate(model, WINDOWS)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"gradients": Gradients()}, "takes no gradients"),
        ({"blocks": ()}, "some of attention, mlp"),
        ({"blocks": ("mlps",)}, "some of attention, mlp"),
        ({"when": METHODS["probe"].when}, "cannot be scored from a probe"),
        ({"when": METHODS["probe"].when.probe}, "a schedule is a record"),
        ({"when": "onec"}, "did you mean 'once'"),
    ],
)
def test_methods_that_cannot_be_composed_are_refused(changes, says):
    with pytest.raises(UsageError, match=says):
        compose("magnitude", **changes)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"windows": 0}, "windows must be a whole number of windows from 1 to 1000000, not 0"),
        ({"length": 1}, "length must be a whole number of tokens from 2 to 16777216, not 1"),
        ({"draws": 0}, "draws must be a whole number of draws from 1 to 1000000, not 0"),
        ({"rank": 0}, "rank must be a whole number from 1 to 8192, not 0"),
        ({"reduction": "median"}, "unknown reduction 'median'"),
    ],
)
def test_gradients_that_cannot_be_taken_are_refused(settings, says):
    with pytest.raises(UsageError, match=says):
        Gradients(**settings)


def test_an_importance_by_gradients_takes_the_published_ones_unless_told_otherwise():
    assert compose("magnitude", importance="param_first").gradient_settings == Gradients(10, 64)
    assert METHODS["loraprune"].gradient_settings == Gradients(10, 512)
