"""Records as JSON values and back: every method survives, every mistake is named."""

import json

import pytest

from probeprune import (
    METHODS,
    Gradients,
    Method,
    Probe,
    ProbeEveryBatch,
    Refit,
    RefitEveryBatch,
    UsageError,
    compose,
)
from probeprune.methods import TABLES
from probeprune.records import from_json, label, to_json
from probeprune.strategies.compensation import COMPENSATIONS, Compensation
from probeprune.strategies.schedule import When

COMPOSED = (
    compose("probe", when=ProbeEveryBatch(Probe(tokens=0.25, samples=1.0, pick="even"), own_positions=4)),
    compose("best-dynamic", when=RefitEveryBatch(Probe(min_size=64), share=0.5), blocks=("mlp",)),
    compose("best-static", compensation=Refit(damping=(0.1, 0.3), sequential=False, share=0.0, bias=True)),
    compose("llm-pruner", gradients=Gradients(3, 12, reduction="max"), seed=7),
    compose("ppsp", allocation="damage", budget="flops", unit_kind="balanced", round_to=64, skip_layers=0),
)


@pytest.mark.parametrize("method", [*METHODS.values(), *COMPOSED], ids=lambda m: m.name)
def test_every_method_survives(method):
    written = json.loads(json.dumps(to_json(method)))
    read = from_json(Method, written, TABLES)
    assert read == method and hash(read) == hash(method)
    assert written == method.record(), "as in result lines and checkpoints"


@pytest.mark.parametrize("kind", [When, Compensation])
def test_every_alternative_says_which_it_is(kind):
    for name, record in TABLES[kind].items():
        assert to_json(record)["kind"] == name == record.kind
        assert from_json(kind, {"kind": name}, TABLES) == record, "without fields, the defaults"


def test_a_field_that_is_missing_has_its_default():
    assert from_json(Method, {"name": "mine"}, TABLES) == Method("mine")
    given = {"name": "mine", "gradients": {"windows": 3}, "importance": "param_first", "blocks": ["mlp"]}
    assert from_json(Method, given, TABLES) == Method(
        "mine", "param_first", gradients=Gradients(windows=3), blocks=("mlp",)
    )


def test_whole_numbers_stand_for_numbers():
    refit = from_json(Compensation, {"kind": "least-squares", "share": 1, "damping": [1, 2]}, TABLES)
    assert refit == Refit(share=1.0, damping=(1.0, 2.0))
    assert isinstance(refit.share, float) and all(isinstance(d, float) for d in refit.damping)


@pytest.mark.parametrize(
    ("kind", "value", "says"),
    [
        (
            Method,
            {"name": "a", "importnace": "ppsp"},
            "unknown field 'importnace'; did you mean 'importance'?",
        ),
        (Method, {"name": "a", "refit": None}, "unknown field 'refit'; known: allocation, blocks"),
        (Method, {"name": "a", "importance": "psp"}, "unknown importance 'psp'; did you mean 'ppsp'?"),
        (
            Method,
            {"name": "a", "gradients": {"window": 3}},
            "unknown field 'window'; did you mean 'windows'?",
        ),
        (Method, {"name": "a", "when": {"kind": "onec"}}, "unknown kind 'onec'; did you mean 'once'?"),
        (Method, {"name": "a", "when": {}}, "unknown kind 'None'; did you mean"),
        (When, {"kind": "once", "recover": True}, "unknown field 'recover'; did you mean 'recovery'?"),
        (
            When,
            {"kind": "refit", "fusion": "none"},
            "unknown field 'fusion'; known: probe, share",
        ),  # of another schedule
        (When, {"kind": "probe", "probe": {"token": 0.5}}, "unknown field 'token'; did you mean 'tokens'?"),
        (When, {"kind": "probe", "probe": {"pick": "evn"}}, "unknown pick 'evn'; did you mean 'even'?"),
        (Compensation, {"kind": "biass"}, "unknown kind 'biass'; did you mean 'bias'?"),
        (Compensation, {"kind": "bias", "share": 1.0}, "unknown field 'share'; there is none to give here"),
    ],
)
def test_unknown_kinds_and_fields_are_refused(kind, value, says):
    with pytest.raises(UsageError) as error:
        from_json(kind, value, TABLES)
    sentence = str(error.value)
    assert sentence.startswith(says) and sentence.endswith(".") and "known: ." not in sentence


def test_labels_in_names_of_composed_methods():
    assert [label(c) for c in COMPENSATIONS.values()] == ["none", "bias", "least-squares"]
    assert compose("wanda-sp", compensation="bias", seed=3).name == "wanda-sp+compensation=bias+seed=3"
    assert compose("wanda-sp", compensation=Refit()).name == "wanda-sp+compensation=least-squares"
