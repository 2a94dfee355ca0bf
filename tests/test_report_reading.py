"""Reading result lines: corrupt ones are named, of lines with one key the last counts."""

import json
import math
import re
from typing import get_type_hints

import fake_results
import pytest
from fake_results import ROWS

from probeprune import report
from probeprune.errors import UsageError
from probeprune.report.grouping import MEASUREMENT_SETTINGS, TRAINING_SETTINGS
from probeprune.result_lines import REQUIRED, Line, TrainingRecord


def test_a_corrupt_line_is_named_and_the_rest_kept(tmp_path):
    good = [json.dumps(r) for r in fake_results.rows(seeds=(0,), items=5, layers=1)[:4]]
    bad = ['{"kind": "result", "name"', "[1]", '{"kind": "rumour"}', json.dumps({**ROWS[0], "value": "high"})]
    missing = json.dumps({k: v for k, v in ROWS[0].items() if k != "task"})
    shape = json.dumps({**ROWS[0], "losses": 3.0})
    infinite = json.dumps({**ROWS[0], "value": math.inf})
    content = [good[0], bad[0], good[1], *bad[1:], missing, shape, infinite, "", *good[2:], good[0][:70]]
    file = tmp_path / "results.jsonl"
    file.write_bytes("\n".join(content).encode() + b"\n\xff\xfe\n")
    rows, problems = report.read_results(tmp_path)
    assert [json.dumps(r) for r in rows] == good
    assert [int(re.search(r"line (\d+)", p)[1]) for p in problems] == [2, 4, 5, 6, 7, 8, 9, 13, 14]
    assert [p.partition("left out: ")[2] for p in problems] == [
        "not JSON.",
        "its kind is None, neither 'result' nor 'failure'.",
        "its kind is 'rumour', neither 'result' nor 'failure'.",
        "'value' is not a finite number.",
        "'task' is missing.",
        "'losses' is not a list.",
        "'value' is not a finite number.",
        "not JSON.",
        "not JSON.",
    ]


def test_the_last_line_of_a_cell_counts(tmp_path):
    row = fake_results.perplexity_row("probe", 0.2, 0, [1.0, 2.0]) | {"key": "a"}
    failed = {**row, "kind": "failure", "error": "no memory"}
    again = {**row, "value": 5.0}
    file = fake_results.write(tmp_path / "results.jsonl", [failed, row, row | {"key": "b"}, again])
    rows, problems = report.read_results(file)
    assert [(r["kind"], r["key"], r["value"]) for r in rows] == [
        ("result", "b", row["value"]),
        ("result", "a", 5.0),
    ]
    assert problems == []


def test_nothing_to_read_is_one_sentence(tmp_path):
    with pytest.raises(UsageError, match=r"nowhere does not exist; give the folder of a run"):
        report.read_results(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"results\.jsonl does not exist"):
        report.read_results(tmp_path)
    fake_results.write(tmp_path / "results.jsonl", [ROWS[-1]])
    with pytest.raises(UsageError, match=r"holds no results \(only 1 failures\)"):
        report.read_results(tmp_path)


def test_keys_that_are_named_by_strings_are_keys_of_a_line():
    keys = get_type_hints(Line).keys()
    assert {key for own in REQUIRED.values() for key in own} <= keys
    assert {key for own in MEASUREMENT_SETTINGS.values() for key in own} <= keys
    assert set(TRAINING_SETTINGS) <= get_type_hints(TrainingRecord).keys()
    assert {key for row in ROWS for key in row} <= keys, "a fake result has a key that no real one has"
