"""Labels of settings that differ, through any depth of nested records, and what makes a method dense."""

import fake_results
import pytest

from probeprune import report
from probeprune.methods import METHODS
from probeprune.report.settings import differences, is_dense, without_seed

PROBE = {"tokens": 0.5, "samples": 0.05, "pick": {"kind": "even", "offset": 0}}
DYNAMIC = {
    "skip_layers": 3,
    "when": {"kind": "probe", "probe": PROBE, "fusion": "importance"},
    "gradients": None,
}


def changed(record: dict, path: str, value: object) -> dict:
    key, _, rest = path.partition(".")
    return record | {key: changed(record[key], rest, value) if rest else value}


@pytest.mark.parametrize(
    ("path", "value", "one", "other"),
    [
        ("skip_layers", 0, "skip_layers=3", "skip_layers=0"),
        ("when.fusion", "none", "when.fusion=importance", "when.fusion=none"),
        ("when.probe.tokens", 0.1, "when.probe.tokens=0.5", "when.probe.tokens=0.1"),
        ("when.probe.pick.offset", 2, "when.probe.pick.offset=0", "when.probe.pick.offset=2"),
        (
            "when.probe.pick",
            {"kind": "residual"},
            "when.probe.pick.kind=even",
            "when.probe.pick.kind=residual",
        ),
        ("when", {"kind": "once", "recovery": True}, "when.kind=probe", "when.kind=once"),
        ("gradients", {"windows": 10}, "gradients=none", "gradients=[windows=10]"),
        ("skip_layers", [1, 2], "skip_layers=3", "skip_layers=1+2"),
        ("skip_layers", True, "skip_layers=3", "skip_layers=yes"),
    ],
)
def test_a_label_names_the_innermost_setting_that_differs(path, value, one, other):
    named = [("a", DYNAMIC), ("a", changed(DYNAMIC, path, value)), ("b", DYNAMIC)]
    assert differences(named) == [f" ({one})", f" ({other})", ""]


def test_several_differences_are_listed_in_the_order_of_the_record():
    other = changed(changed(DYNAMIC, "when.probe.samples", 1.0), "skip_layers", 0)
    third = changed(DYNAMIC, "when", {"kind": "never"})
    assert differences([("a", DYNAMIC), ("a", other), ("a", third)]) == [
        " (skip_layers=3, when.kind=probe, when.probe.samples=0.05)",
        " (skip_layers=0, when.kind=probe, when.probe.samples=1.0)",
        " (skip_layers=3, when.kind=never)",
    ]


def test_records_never_share_a_label_by_lack_of_a_nested_key():
    more = changed(DYNAMIC, "when.probe", PROBE | {"reuse": 2})
    one, other = differences([("a", DYNAMIC), ("a", more)])
    assert one != other and one.startswith(" (when.probe=[") and "reuse=2" in other


def test_a_setting_that_is_not_recorded_is_no_difference():
    assert differences([("a", {"skip_layers": 3}), ("a", {"skip_layers": 3, "new": 1})]) == ["", ""]


@pytest.mark.parametrize(
    ("when", "dense"),
    [
        ({"kind": "never"}, True),
        ({"kind": "never", "recovery": False}, True),
        ({"kind": "never", "recovery": True}, False),
        ({"kind": "once", "recovery": False}, False),
        ({"kind": "probe", "probe": PROBE}, False),
    ],
)
def test_dense_is_what_neither_prunes_nor_trains(when, dense):
    assert is_dense({"name": "x", "when": when}) is dense


def test_of_the_methods_only_one_is_dense():
    assert [name for name, method in METHODS.items() if is_dense(method.record())] == ["dense"]


def test_groups_are_labelled_by_nested_settings_and_seeds_are_not():
    def row(seed: int, tokens: float) -> dict:
        line = fake_results.perplexity_row("probe", 0.2, seed, [1.0, 2.0])
        when = {"kind": "probe", "probe": PROBE | {"tokens": tokens}}
        return line | {"method": {"name": "probe", "seed": seed, "when": when}}

    (summary,) = report.summarise([row(0, 0.5), row(1, 0.5), row(0, 0.1)])
    assert {e.label: e.seeds for e in summary.entries} == {
        "probe (when.probe.tokens=0.5)": (0, 1),
        "probe (when.probe.tokens=0.1)": (0,),
    }
    assert "seed" not in without_seed(summary.entries[0].method)
