"""YAML into dataclasses by their type hints: every type of field, and the place of each mistake."""

import math
from dataclasses import dataclass, replace
from typing import Literal

import pytest

from probeprune.errors import UsageError
from probeprune.experiment.yaml_records import open_yaml, read


@dataclass(frozen=True)
class Wheel:
    size: int = 20
    weight: float = 1.5

    def __post_init__(self):
        if self.size < 1:
            raise UsageError("size must be at least 1.")


@dataclass(frozen=True)
class Pedals:
    """Power from the rider."""

    gears: int = 1


@dataclass(frozen=True)
class Motor:
    """Power from a battery."""

    watts: float = 250.0
    wheel: Wheel = Wheel(size=10)


Drive = Pedals | Motor


@dataclass(frozen=True)
class Bicycle:
    name: str
    colour: Literal["red", "green"] = "red"
    fast: bool = False
    wheel: Wheel | None = None
    load: float | None = None
    gears: tuple[int, ...] = ()
    place: tuple[float, str] = (0.0, "here")
    drive: Drive = Pedals()
    wheels: tuple[Wheel, ...] = ()
    spare: Drive | None = None


TABLES = {Drive: {"feet": Pedals(), "gears": Pedals(gears=7), "motor": Motor(), "off": Pedals(gears=0)}}


def bicycle(tmp_path, text, base=None):
    file = tmp_path / "bicycle.yaml"
    file.write_text(text)
    return read(open_yaml(file), Bicycle, TABLES, base)


def test_every_type_is_read_and_missing_fields_have_their_defaults(tmp_path):
    assert bicycle(tmp_path, "name: plain") == Bicycle("plain")
    text = """\
name: full
colour: green
fast: true
wheel: {weight: 2}
load: 12
gears: [1, 2]
place: [2, there]
wheels: [{size: 3}, {}]
"""
    whole = Bicycle("full", "green", True, Wheel(weight=2.0), 12.0, (1, 2), (2.0, "there"))
    made = bicycle(tmp_path, text)
    assert made == replace(whole, wheels=(Wheel(3), Wheel()))
    assert type(made.load) is float and type(made.wheel.weight) is float
    assert math.isinf(bicycle(tmp_path, "{name: far, load: .inf}").load)


def test_a_base_keeps_what_is_not_given_also_in_records_inside(tmp_path):
    base = Bicycle("base", "green", wheel=Wheel(7, 3.0), load=2.0)
    assert bicycle(tmp_path, "wheel: {size: 8}", base) == replace(base, wheel=Wheel(8, 3.0))
    assert bicycle(tmp_path, "{wheel: null, load: ~}", base) == replace(base, wheel=None, load=None)
    fresh = bicycle(tmp_path, "wheel: {size: 8}", replace(base, wheel=None))
    assert fresh.wheel == Wheel(8), "where the base has no record, it is made of the defaults"


@pytest.mark.parametrize(
    ("text", "drive"),
    [
        ("drive: motor", Motor()),
        ("drive: gears", Pedals(7)),
        ("drive: off", Pedals(0)),
        ("drive: {kind: motor, watts: 100}", Motor(100.0)),
        ("drive: {watts: 100, kind: motor}", Motor(100.0)),
        ("drive: {kind: gears}", Pedals(7)),
        ("drive: {kind: motor, wheel: {weight: 9}}", Motor(wheel=Wheel(10, 9.0))),
        ("drive: {watts: 100}", Motor(100.0, Wheel(5))),
        ("drive: {wheel: {weight: 9}}", Motor(30.0, Wheel(5, 9.0))),
    ],
)
@pytest.mark.parametrize("field", ["drive", "spare"])
def test_a_table_gives_records_by_name_and_changes_to_them(field, text, drive, tmp_path):
    mine = Motor(30.0, Wheel(5))
    base = Bicycle("base", drive=mine, spare=mine)
    assert bicycle(tmp_path, text.replace("drive", field), base) == replace(base, **{field: drive})


def test_a_single_class_may_have_a_table_too(tmp_path):
    (tmp_path / "wheel.yaml").write_text("{kind: small, weight: 9}")
    wheel = read(open_yaml(tmp_path / "wheel.yaml"), Wheel, {Wheel: {"small": Wheel(1), "big": Wheel(30)}})
    assert wheel == Wheel(1, 9.0)


def test_an_optional_field_with_a_table_can_be_null(tmp_path):
    base = Bicycle("base", spare=Motor())
    assert bicycle(tmp_path, "spare: null", base).spare is None


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("nam: x", 1, "unknown key 'nam'; did you mean 'name'? Known: colour, drive,"),
        ("fast: true", 1, "'name' must be given"),
        ("name: x\nname: y", 2, "key 'name' comes twice"),
        ("name: 3", 1, "name: expected text, not 3"),
        ("name:", 1, "name: expected text, not None"),
        ("name: [x]", 1, "name: expected a single value"),
        ("name: x\nfast: 1", 2, "fast: expected true or false, not 1"),
        ("name: x\nload: heavy", 2, "load: expected a number, not 'heavy'"),
        ("name: x\nload: true", 2, "load: expected a number, not True"),
        ("name: x\ngears: 3", 2, "gears: expected a list with at least one entry"),
        ("name: x\ngears: []", 2, "gears: expected a list with at least one entry"),
        ("name: x\ngears:\n- 1\n- 2.5", 4, "gears: expected a whole number, not 2.5"),
        ("name: x\ngears: [true]", 2, "gears: expected a whole number, not True"),
        ("name: x\nplace: [1.0]", 2, "place: expected 2 entries, not 1"),
        ("name: x\ncolour: gren", 2, "colour: unknown colour 'gren'; did you mean 'green'?"),
        ("name: x\nwheel: big", 2, "wheel: expected 'key: value' pairs"),
        ("name: x\nwheel:\n  siz: 3", 3, "wheel: unknown key 'siz'; did you mean 'size'?"),
        ("name: x\nwheel:\n  size: 0", 3, "wheel: size must be at least 1."),
        ("name: x\nwheel: {size: a}", 2, "wheel.size: expected a whole number, not 'a'"),
        ("name: x\ndrive: moter", 2, "drive: unknown drive 'moter'; did you mean 'motor'?"),
        ("name: x\ndrive: {kind: moter}", 2, "drive.kind: unknown drive 'moter'; did you mean 'motor'?"),
        ("name: x\ndrive: {kind: [motor]}", 2, "drive.kind: expected a single value"),
        ("name: x\ndrive: {gears: 3}", 2, "drive: 'kind' must be given. Known: feet, gears, motor, off."),
        ("name: x\ndrive: {kind: motor, wats: 3}", 2, "drive: unknown key 'wats'; did you mean 'watts'?"),
        (
            "name: x\ndrive: {kind: motor, gears: 3}",
            2,
            "drive: unknown key 'gears'; known: kind, watts, wheel",
        ),
        ("name: x\ndrive: [motor]", 2, "drive: expected 'key: value' pairs"),
        ("name: x\nload: 2001-13-45", 2, "load: '2001-13-45' cannot be read"),
        ("name: x\nload: !gram 3", 2, "load: tag '!gram' is not known here"),
        ("name: !!python/name:os.system x", 1, "tag 'tag:yaml.org,2002:python/name:os.system' is not known"),
        ("name: x\ngears: !!python/tuple [1]", 2, "gears: tag 'tag:yaml.org,2002:python/tuple' is not known"),
        ("name: x\n!!python/none k: 3", 2, "tag 'tag:yaml.org,2002:python/none' is not known"),
        ("name: x\nwheel: &w {size: *w}", 2, "wheel.size: this alias stands for what it stands in"),
        ("&a [*a]", 1, "this alias stands for what it stands in"),
        ("&a {name: x, ? *a : 3}", 1, "this alias stands for what it stands in"),
        ("name: x\ngears:\n  " + "[" * 40 + "]" * 40, 3, "gears: this is nested too deeply"),
        ('name: "\\ud83d"', 1, "name: half of a surrogate pair is no text"),
        ("name: x\nwheel: {? {a: b} : 3}", 2, "a key must be a single word"),
        ("name: x\nload: " + "9" * 5000, 2, "load"),
        ("name: x\n<<: {fast: true}", 2, "unknown key '<<'"),
        ("name: x\n--- \nname: y", 2, "is not YAML"),
        ("? [a]\n: b", 1, "a key must be a single word"),
        ("- a", 1, "expected 'key: value' pairs"),
        ("name: [x", 1, "is not YAML"),
    ],
)
def test_a_mistake_is_named_with_file_line_and_field(text, line, says, tmp_path):
    with pytest.raises(UsageError) as error:
        bicycle(tmp_path, text)
    message = str(error.value)
    assert message.startswith(f"line {line} of {tmp_path / 'bicycle.yaml'}") and says in message
    assert message.endswith(".") and not message.endswith("..")


def test_numbers_are_read_where_the_meaning_is_plain(tmp_path):
    assert bicycle(tmp_path, "{name: x, load: 1e-4}").load == 1e-4, "YAML 1.1 takes it for text without a dot"
    made = bicycle(tmp_path, "{name: x, wheel: {size: 3.0}}")
    assert made.wheel.size == 3 and type(made.wheel.size) is int
    with pytest.raises(UsageError, match=r"load: expected a number, not '1'"):
        bicycle(tmp_path, '{name: x, load: "1"}')
    shared = "{name: x, wheels: [&w {size: 3}, *w, *w]}"
    assert bicycle(tmp_path, shared).wheels == (Wheel(3),) * 3, "an alias for something else is fine"


@pytest.mark.parametrize("text", ["[" * 5000 + "]" * 5000, "{a: " * 5000 + "1" + "}" * 5000])
def test_a_file_nested_beyond_the_parser_is_refused(text, tmp_path):
    with pytest.raises(UsageError, match=r"bicycle\.yaml is nested too deeply; use at most 32 levels"):
        bicycle(tmp_path, text)


def test_aliases_of_aliases_are_checked_in_no_time(tmp_path):
    lines = ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30))]
    with pytest.raises(UsageError, match="unknown key 'a0'"):
        bicycle(tmp_path, "\n".join(lines))


def test_an_empty_file_has_no_entry(tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert open_yaml(tmp_path / "empty.yaml") is None


def test_a_type_that_no_file_holds_is_the_programs_mistake(tmp_path):
    (tmp_path / "x.yaml").write_text("3")
    entry = open_yaml(tmp_path / "x.yaml")
    for declared in (object, int | str, Drive, list[int]):
        with pytest.raises(TypeError, match=r"cannot be read from YAML|with a table only"):
            read(entry, declared)
