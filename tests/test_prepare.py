"""prepare(): each piece is made once and shared, serves as the text itself does, and knows what it is for."""

from collections import Counter

import pytest
import torch
from all_methods import ALL, RATIO, STATIC, WINDOWS
from tiny import FAMILIES, Given, logits, padded, token_ids

from probeprune import METHODS, Gradients, Refit, UsageError, attach, compose, prepare, prune
from probeprune import preparation as preparation_module
from probeprune.calibration.statistics import Statistics
from probeprune.plan import needs
from probeprune.preparation import Preparation

FAMILY = "llama-gqa"
QUICK = Refit(sensitivity=2)


# -- what a method needs -------------------------------------------------------------------------

NEEDS = {
    "dense": set(),
    "wanda-sp": {"moments"},
    "flap": {"moments"},
    "probe": {"moments"},
    "full-batch": set(),
    "llm-pruner": {"saliences"},
    "loraprune": {"saliences"},
    "probe-reuse": {"moments"},
    "best-static": {"consumers"},
    "best-dynamic": {"consumers"},
    "gates": {"gates", "consumers"},
    "ppsp": {"moments"},
    "magnitude": set(),
    "random": set(),
    "dense+lora": set(),
    "wanda-sp+lora": {"moments"},
    "flap+lora": {"moments"},
    "llm-pruner+lora": {"saliences"},
    "loraprune+lora": set(),  # its scores come from training
    "best-static+lora": {"consumers"},
    "gates+lora": {"gates", "consumers"},
    "ppsp+lora": {"moments"},
    "magnitude+lora": set(),
    "random+lora": set(),
    "wanda-sp+distill": {"moments"},
    "flap+distill": {"moments"},
    "llm-pruner+distill": {"saliences"},
    "loraprune+distill": {"saliences"},
    "best-static+distill": {"consumers"},
    "gates+distill": {"gates", "consumers"},
    "ppsp+distill": {"moments"},
    "magnitude+distill": set(),
    "random+distill": set(),
}


def test_needs_of_all_methods():
    assert {name: set(needs(method)) for name, method in METHODS.items()} == NEEDS


@pytest.mark.parametrize(
    ("base", "changes", "parts"),
    [
        ("random", {"allocation": "damage"}, {"damages"}),
        ("ppsp", {"allocation": "damage", "compensation": "bias"}, {"moments", "damages"}),
        ("best-static", {"allocation": "damage"}, {"damages", "consumers"}),
        ("wanda-sp", {"compensation": Refit()}, {"moments", "consumers"}),
        ("best-dynamic", {"importance": "wanda-sp"}, {"moments", "consumers"}),
        ("llm-pruner", {"compensation": "bias"}, {"saliences", "moments"}),
        ("full-batch", {"compensation": "bias"}, {"moments"}),
        ("full-batch", {"allocation": "global"}, {"moments"}),  # scores of all blocks, before any batch
        ("loraprune+lora", {"allocation": "damage"}, {"damages"}),
    ],
)
def test_needs_are_those_of_all_strategies_together(base, changes, parts):
    assert needs(compose(base, **changes)) == parts


# -- each piece once -----------------------------------------------------------------------------


@pytest.fixture
def made(monkeypatch):
    """How often each piece was made."""
    count = Counter()

    def counting(name):
        original = getattr(preparation_module, name)

        def make(*args, **options):
            count[name] += 1
            return original(*args, **options)

        return make

    for name in ("calibrate", "saliences", "sensitivities", "damages", "refit"):
        monkeypatch.setattr(preparation_module, name, counting(name))
    return count


def test_methods_and_ratios_share_what_they_can(made):
    model = FAMILIES[FAMILY]()
    prepare(model, ["probe", "wanda-sp", "best-static", "best-dynamic"], [0.2, 0.3], WINDOWS)
    assert made == {"calibrate": 1, "sensitivities": 1, "refit": 2}, "one refit per ratio, for both methods"


def test_a_preparation_shares_as_prepare_does(made):
    model = FAMILIES[FAMILY]()
    preparation = Preparation(model, WINDOWS, following=True)
    for name in ("best-static", "best-dynamic", "probe", "best-static"):
        preparation.statistics(METHODS[name], 0.2)
    assert made == {"calibrate": 1, "sensitivities": 1, "refit": 1}


def test_methods_by_gradients_and_by_damage_share_what_they_can(made):
    by_gradients = compose("llm-pruner", gradients=Gradients(2, 12))
    others = [
        compose(by_gradients, gradients=Gradients(2, 12, reduction="max")),
        compose("random", allocation="damage"),
        compose("best-static", allocation="damage", budget="flops"),
        compose("best-static", allocation="damage"),
    ]
    prepare(FAMILIES[FAMILY](), [by_gradients, *others], [0.1, 0.2], WINDOWS)
    # Curves of another budget are the same, but their savings are not; the refit at 0.1 and 0.2, for both.
    assert made == {"saliences": 1, "sensitivities": 1, "damages": 2, "refit": 4}


def test_other_settings_are_other_pieces(made):
    methods = [compose("random", name=f"{seed}", allocation="damage", seed=seed) for seed in range(2)]
    prepare(FAMILIES[FAMILY](), methods, 0.2, WINDOWS)
    assert made == {"sensitivities": 2, "damages": 2}


def test_nothing_is_made_for_methods_that_need_nothing(made):
    prepare(FAMILIES[FAMILY](), ["dense", "magnitude", "full-batch"], 0.2, WINDOWS)
    assert not made


def test_pieces_on_disk_are_read_back(made, tmp_path):
    model = FAMILIES[FAMILY]()
    for _ in range(2):
        passes = []
        hook = model.model.register_forward_pre_hook(lambda *_, passes=passes: passes.append(1))
        prepare(model, ["probe", compose("best-dynamic", compensation=QUICK)], 0.2, WINDOWS, cache=tmp_path)
        hook.remove()
    assert made["refit"] == 1 and not passes


# -- prepared or not, the same -------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared():
    """A model and the calibration of all methods for it."""
    model = FAMILIES[FAMILY]()
    return model, prepare(model, list(ALL.values()), RATIO, WINDOWS)


@pytest.mark.parametrize("name", ALL)
def test_a_method_attached_is_the_same_whatever_it_is_calibrated_with(prepared, name):
    model, known = prepared
    outputs, units = [], []
    for calibration in (WINDOWS, known, Preparation(model, WINDOWS)):
        with attach(model, ALL[name], RATIO, calibration=calibration) as handle:
            outputs.append(logits(model, *padded("left")))
            units.append(handle.kept_units())
    assert outputs[0].equal(outputs[1]) and outputs[0].equal(outputs[2])
    assert units[0] == units[1] == units[2]


@pytest.mark.parametrize("name", STATIC)
def test_a_method_cut_is_the_same_whatever_it_is_calibrated_with(prepared, name):
    outputs, prunings = [], []
    for how in ("windows", "prepared", "preparation"):
        model = FAMILIES[FAMILY]()
        ways = {"windows": WINDOWS, "prepared": prepared[1], "preparation": Preparation(model, WINDOWS)}
        prunings.append(prune(model, ALL[name], RATIO, calibration=ways[how]))
        outputs.append(logits(model, *padded("left")))
    assert outputs[0].equal(outputs[1]) and outputs[0].equal(outputs[2])
    assert prunings[0] == prunings[1] == prunings[2]


def test_one_preparation_serves_a_static_refit_and_then_a_dynamic_one():
    model = FAMILIES[FAMILY]()
    static, dynamic = (compose(name, compensation=QUICK) for name in ("best-static", "best-dynamic"))
    preparation = Preparation(model, WINDOWS)
    for method in (static, dynamic, static):
        outputs = []
        for calibration in (preparation, WINDOWS):
            with attach(model, method, RATIO, calibration=calibration):
                outputs.append(logits(model, *padded("none")))
        assert outputs[0].equal(outputs[1])


def test_a_dynamic_refit_serves_the_static_method_but_not_the_other_way_round():
    model = FAMILIES[FAMILY]()
    static, dynamic = (compose(n, name=n, compensation=QUICK) for n in ("best-static", "best-dynamic"))
    known = prepare(model, dynamic, RATIO, WINDOWS)
    outputs = []
    for calibration in (known, WINDOWS):
        with attach(model, static, RATIO, calibration=calibration):
            outputs.append(logits(model, *padded("none")))
    assert outputs[0].equal(outputs[1])
    known = prepare(model, static, RATIO, WINDOWS)
    with pytest.raises(UsageError, match=r"not prepared for method 'best-dynamic' \(only for best-static at"):
        attach(model, dynamic, RATIO, calibration=known)
    consumers = known.statistics(model, static, RATIO).consumers
    with pytest.raises(UsageError, match="was made for a method that prunes once"):
        attach(model, dynamic, RATIO, calibration=Given(model, Statistics(consumers=consumers)))


def test_a_dynamic_refit_that_loses_no_mlp_unit_is_served():
    # Nothing follows the batch then: no moments are kept for it, and none may be missed.
    model = FAMILIES[FAMILY]()
    method = compose("best-dynamic", compensation=QUICK, round_to=100)
    known = prepare(model, method, 0.01, WINDOWS)
    with attach(model, method, 0.01, calibration=known) as handle:
        assert not any(k.of > len(k.units) for k in handle.kept_units() if ".mlp" in k.name)
        assert not handle.runtimes


def test_a_method_without_a_ratio_needs_no_refit(made):
    model = FAMILIES[FAMILY]()
    dense = logits(model, *padded("left"))
    with attach(model, "best-dynamic", 0.0, calibration=WINDOWS):
        assert logits(model, *padded("left")).equal(dense)
    assert not made["refit"]


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "ratio", "says"),
    [
        ("probee", 0.2, "did you mean 'probe'"),
        ("flap+lora", 0.2, "trains the model"),
        ("probe", 1.0, r"ratio must be a number in \[0, 1\), not 1.0"),
        ("probe", [0.2, -0.1], r"ratio must be a number in \[0, 1\), not -0.1"),
        ("best-static", 0.97, "would remove everything"),
    ],
)
def test_what_cannot_be_prepared_is_refused_before_any_work(made, method, ratio, says):
    with pytest.raises(UsageError, match=says):
        prepare(FAMILIES[FAMILY](), method, ratio, WINDOWS)
    assert not made


@pytest.mark.parametrize("windows", [token_ids(9, 64), token_ids(10, 63)], ids=["few", "short"])
@pytest.mark.parametrize("call", ["prepare", "attach", "prune"])
def test_gradients_need_windows_enough_and_long_enough(call, windows):
    model = FAMILIES[FAMILY]()
    calls = {
        "prepare": lambda: prepare(model, "llm-pruner", 0.2, windows),
        "attach": lambda: attach(model, "llm-pruner", 0.2, calibration=windows),
        "prune": lambda: prune(model, "llm-pruner", 0.2, calibration=windows),
    }
    count, length = windows.shape
    with pytest.raises(
        UsageError, match=rf"10 windows of 64 tokens, and calibration has {count} of {length}; give more"
    ):
        calls[call]()


def test_a_preparation_of_another_model_is_refused():
    with pytest.raises(UsageError, match="preparation is of another model"):
        attach(FAMILIES[FAMILY](), "ppsp", 0.2, calibration=Preparation(FAMILIES[FAMILY](), WINDOWS))


def test_steps_need_text(prepared):
    for calibration in (prepared[1], Preparation(FAMILIES[FAMILY](), WINDOWS)):
        with pytest.raises(UsageError, match="each step calibrates the model anew"):
            prune(FAMILIES[FAMILY](), "wanda-sp", 0.2, calibration=calibration, steps=2)


def refusal(model, method, ratio, calibration) -> str:
    """The sentence of a refused attach, which leaves the model alone."""
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(UsageError) as error:
        attach(model, method, ratio, calibration=calibration)
    assert all(p.equal(before[n]) for n, p in model.named_parameters())
    sentence = str(error.value)
    assert sentence.endswith(".") and "\n" not in sentence
    return sentence


@pytest.fixture(scope="module")
def little():
    """A model, prepared for few methods."""
    model = FAMILIES[FAMILY]()
    static = compose("best-static", name="best-static", compensation=QUICK)
    return model, prepare(model, ["wanda-sp", static, compose("random", allocation="damage")], 0.2, WINDOWS)


def scaled():
    model = FAMILIES[FAMILY]()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.01)
    return model


def changed_weight():
    model = FAMILIES[FAMILY]()
    with torch.no_grad():
        model.lm_head.weight[-1, -1] += 1e-6
    return model


@pytest.mark.parametrize("build", [FAMILIES["opt"], FAMILIES["llama"], scaled, changed_weight])
def test_another_model_is_refused(little, build):
    assert "was prepared for another model, or the model's weights have changed" in refusal(
        build(), "wanda-sp", 0.2, little[1]
    )


def test_the_same_model_loaded_again_is_not_another_one(little):
    with attach(FAMILIES[FAMILY](), "wanda-sp", 0.2, calibration=little[1]):
        pass


ANOTHER_REFIT = compose("best-static", name="best-static", compensation=Refit(damping=(0.1,)))
ANOTHER_SEED = compose("random", allocation="damage", seed=1)
ANOTHER_BUDGET = compose("random", name="random+allocation=damage", allocation="damage", budget="flops")


@pytest.mark.parametrize(
    ("method", "ratio", "says"),
    [
        (compose("best-static", name="best-static", compensation=QUICK), 0.3, "ratio 0.3 of 'best-static'"),
        (ANOTHER_REFIT, 0.2, "these settings of 'best-static' (their consumers differ)"),
        (ANOTHER_BUDGET, 0.2, "these settings of 'random+allocation=damage' (their damages differ)"),
        (ANOTHER_SEED, 0.2, "method 'random+allocation=damage+seed=1'"),
        ("flap", 0.2, None),  # its moments are those of wanda-sp
        ("wanda-sp", 0.3, None),  # moments serve all ratios
        ("llm-pruner", 0.2, "method 'llm-pruner' (only for wanda-sp at 0.2, best-static at 0.2, random+"),
        ("best-static", 0.2, "these settings of 'best-static'"),
        ("best-dynamic", 0.2, "method 'best-dynamic'"),
    ],
)
def test_what_was_not_prepared_is_named(little, method, ratio, says):
    model, known = little
    if says is None:
        with attach(model, method, ratio, calibration=known):
            return
    assert f"was not prepared for {says}" in refusal(model, method, ratio, known)
