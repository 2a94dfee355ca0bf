"""A good preset, each field set to each of many bad values: refused with line and field, or meaningful."""

import copy
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from probeprune.errors import UsageError
from probeprune.experiment.presets import Preset, load_preset

GOOD = {
    "description": "all fields there are",
    "models": ["smollm2-135m", "other"],
    "methods": [
        "dense",
        {
            "base": "probe",
            "name": "own",
            "skip_layers": 1,
            "round_to": 2,
            "unit_kind": "group",
            "blocks": ["mlp"],
            "seed": 1,
            "when": {
                "decay": 0.5,
                "fusion": "importance",
                "probe": {"tokens": 0.5, "reuse": 4, "pick": "even"},
            },
        },
        {
            "base": "best-static",
            "name": "refit",
            "budget": "parameters",
            "compensation": {"damping": [0.1], "windows": 4, "held_out": 0.5, "sensitivity": 1},
        },
        {"base": "llm-pruner", "name": "taylor", "gradients": {"windows": 2, "reduction": "sum"}},
        "flap+lora",
    ],
    "ratios": [0.2, 0.4],
    "seeds": [0, 1],
    "calibration": {"corpus": "c4", "windows": 8, "length": 64},
    "training": {
        "steps": 5,
        "batch_size": 2,
        "length": 32,
        "learning_rate": 0.001,
        "corpus": "c4",
        "packing": False,
        "seeds": [0],
    },
    "texts": [
        {
            "corpus": "wikitext2",
            "windows": 4,
            "length": 64,
            "batch_size": 2,
            "sampling": "published",
            "averaging": "published",
            "seed": 3,
            "seeds": [1],
        }
    ],
    "tasks": {
        "names": ["boolq", "piqa"],
        "limit": 3,
        "batch_size": 4,
        "order": "length",
        "protocol": "harness",
        "source": "local",
        "seeds": [0],
    },
    "cost": {"batch_size": 2, "length": 8, "new_tokens": 0, "rounds": 1, "seeds": [1]},
}

EVIL = "../../../escaped/evil"
BAD = {
    "a word": "abc",
    "nothing": "null",
    "a truth value": "true",
    "zero": "0",
    "minus one": "-1",
    "a fraction": "1.7",
    "huge": "999999999999",
    "beyond 64 bits": "99999999999999999999999",
    "too long for Python": "9" * 5000,
    "not a number": ".nan",
    "infinite": ".inf",
    "a date": "2001-01-01",
    "an empty text": '""',
    "an empty list": "[]",
    "an empty mapping": "{}",
    "a list": "[abc, 3]",
    "a mapping": "{abc: 3}",
    "the same twice": "[0, 0]",
    "a tag": "!!python/object/apply:os.system ['touch evil']",
    "a tagged word": "!!python/name:os.system abc",
    "itself": "&it [*it]",
    "a complex key": "{[a]: 3}",
    "deep": "[" * 40 + "]" * 40,
    "a path": f'"{EVIL}"',
    "half a character": '"\\ud83d"',
}

MEANINGS = {
    "description": {"a word", "an empty text", "a path"},
    "models.*": {"a word", "a path"},
    "methods.*.name": {"a word"},
    "*.seed": {"zero"},
    "seeds.0": {"zero"},
    "*.seeds.0": {"zero"},
    "*.skip_layers": {"zero"},
    "*.decay": {"zero"},
    "*.reuse": {"zero"},
    "*.sensitivity": {"zero"},
    "*.damping.0": {"a fraction"},
    "*.gradients": {"nothing", "an empty mapping"},
    "*.compensation": {"an empty mapping"},
    "*.when": {"an empty mapping"},
    "*.probe": {"an empty mapping"},
    "calibration": {"an empty mapping"},
    "training": {"an empty mapping"},
    "*.packing": {"a truth value"},
    "*.corpus": {"a path"},
    "texts.0": {"an empty mapping"},
    "texts.0.windows": {"nothing"},
    "tasks.limit": {"nothing"},
    "tasks.batch_size": {"nothing"},
    "tasks.order": {"nothing"},
    "cost": {"an empty mapping"},
    "cost.new_tokens": {"zero"},
}
"""The values of `BAD` that fields do take, by patterns of the place."""


def fields(value: object, path: tuple = ()) -> list[tuple]:
    """The places of all values inside `value`, itself left out."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, below in inside for found in ((*path, key), *fields(below, (*path, key)))]


def without(path: tuple) -> tuple[str, int]:
    """The preset with the word PLACE at the place, and the line on which it stands."""
    whole = copy.deepcopy(GOOD)
    inside = whole
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = "PLACE"
    text = yaml.safe_dump(whole, sort_keys=False, width=1000)
    line = next(i for i, row in enumerate(text.splitlines(), 1) if "PLACE" in row)
    return text, line


@pytest.fixture
def opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def read(text: str) -> Preset:
        Path("own.yaml").write_text(text, encoding="utf-8")
        return load_preset("own.yaml")

    return read


def test_the_good_preset_is_good(opened):
    preset = opened(yaml.safe_dump(GOOD, sort_keys=False))
    assert len(preset.cells("float32", "cpu")) > 20 and len(fields(GOOD)) > 60


@pytest.mark.parametrize("path", fields(GOOD), ids=lambda path: ".".join(map(str, path)))
def test_a_field_takes_what_it_means_and_nothing_else(path, opened):
    taken = set()
    text, line = without(path)
    for name, written in BAD.items():
        try:
            preset = opened(text.replace("PLACE", written))
        except UsageError as error:
            sentence = str(error)
            assert sentence.startswith(f"line {line} of own.yaml: "), (name, sentence)
            assert sentence.endswith(".") and sentence.count("\n") == 0 and len(sentence) < 1000
            key = next(k for k in reversed(path) if isinstance(k, str))
            assert key in sentence.partition("own.yaml: ")[2], (name, sentence)
        else:
            taken.add(name)
            assert preset.cells("float32", "cpu"), "what is taken can be measured"
    place = ".".join(map(str, path))
    means = [values for pattern, values in MEANINGS.items() if fnmatch(place, pattern)]
    assert taken == set().union(*means)
    assert not list(Path.cwd().glob("evil*"))
