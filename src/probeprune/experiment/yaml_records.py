"""Read YAML into frozen dataclasses, driven by their type hints.

`open_yaml` parses a file into an `Entry`: a YAML node with its file, line and field name. `read` converts an
entry to a type: a dataclass (nested ones too), `Literal`, `tuple`, `X | None`, `str`, `int`, `float` or
`bool`. Every error names the file, the line and the field. Knows no record in particular.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from probeprune.errors import BadValue, UsageError, first_line, quoted, unknown

Tables = Mapping[Any, Mapping[str, Any]]
"""For a type whose values have names: the default record of each name.

A field of such a type is written as a name (`once`), as a name with changes (`{kind: refit, share: 0.5}`), or
as changes to the record that is being changed (`{share: 0.5}`). The key is the declared type, a union too.
"""

NO_TABLES: Tables = MappingProxyType({})

KIND = "kind"
"""The key that picks a record from a table."""

T = TypeVar("T")

DEPTH = 32
"""Levels of lists and mappings inside each other that a file may have."""

_TAGS = {
    f"tag:yaml.org,2002:{kind}"
    for kind in ("map", "seq", "str", "int", "float", "bool", "null", "timestamp", "merge", "value")
}

_WORDS: dict[type, str] = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


@dataclass(frozen=True)
class Entry:
    """A value of a YAML file and its place.

    Attributes:
        node: the parsed value.
        file: where it was read.
        field: the keys that lead to it, joined by dots; empty for the whole file.
    """

    node: yaml.Node
    file: Path
    field: str = ""

    @property
    def name(self) -> str:
        """The last key of `field`."""
        return self.field.rpartition(".")[2]

    @property
    def place(self) -> str:
        """The line and the file."""
        return f"line {self.node.start_mark.line + 1} of {self.file}"

    def fail(self, problem: str) -> NoReturn:
        """Raise the `UsageError` of `error`."""
        raise self.error(problem)

    def error(self, problem: str) -> UsageError:
        """A `UsageError` with the line, the file, the field and the problem."""
        field = f"{self.field}: " if self.field else ""
        return UsageError(f"{self.place}: {field}{problem.rstrip('.')}.")

    def mapping(self, known: Collection[str]) -> dict[str, "Entry"]:
        """The entries of a mapping by key. Fails for anything else, and for an unknown or repeated key."""
        entries: dict[str, Entry] = {}
        for key, value in self._pairs():
            place = dataclasses.replace(self, node=key)
            if not isinstance(key, yaml.ScalarNode):
                place.fail("a key must be a single word")
            if key.value not in known:
                place.fail(unknown("key", key.value, known))
            if key.value in entries:
                place.fail(f"key {quoted(key.value)} comes twice")
            entries[key.value] = self._below(key, value)
        return entries

    def get(self, key: str) -> "Entry | None":
        """The entry of that key, whatever the other keys are; None where it is missing."""
        return next((self._below(k, value) for k, value in self._pairs() if k.value == key), None)

    def _pairs(self) -> list[tuple[yaml.Node, yaml.Node]]:
        if not isinstance(self.node, yaml.MappingNode):
            self.fail("expected 'key: value' pairs")
        return list(self.node.value)

    def _below(self, key: yaml.Node, value: yaml.Node) -> "Entry":
        return Entry(value, self.file, f"{self.field}.{key.value}" if self.field else str(key.value))

    def items(self) -> list["Entry"]:
        """The entries of a list. Fails for anything else and for an empty list."""
        if not isinstance(self.node, yaml.SequenceNode) or not self.node.value:
            self.fail("expected a list with at least one entry")
        return [dataclasses.replace(self, node=n) for n in self.node.value]

    def different(self, values: Sequence[Any]) -> None:
        """Fail at the first entry of this list whose value, from `values`, came before."""
        for i, (entry, value) in enumerate(zip(self.items(), values, strict=True)):
            if value in values[:i]:
                entry.fail(f"{quoted(value)} comes twice")

    def scalar(self) -> Any:
        """The value of a single word or number, as YAML resolves it. Fails for a list or a mapping."""
        if not isinstance(self.node, yaml.ScalarNode):
            self.fail("expected a single value")
        loader = yaml.SafeLoader("")
        try:
            return loader.construct_object(self.node)
        except (yaml.YAMLError, ValueError) as error:
            self.fail(f"{quoted(self.node.value)} cannot be read ({getattr(error, 'problem', error)})")
        finally:
            loader.dispose()

    def checked(self, make: Callable[[], T]) -> T:
        """The result of `make`, whose `UsageError` is raised again with this place."""
        try:
            return make()
        except UsageError as error:
            raise self.error(str(error)) from error


def open_yaml(path: Path) -> Entry | None:
    """The whole file as one entry; None for an empty file.

    Raises `UsageError` where it is not YAML, or uses what no preset needs: tags, an alias for what it stands
    in, nesting deeper than `DEPTH`, half of a surrogate pair.
    """
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1} of " if mark else ""
        problem = getattr(error, "problem", None) or first_line(error)
        raise UsageError(f"{line}{path} is not YAML: {problem}.") from error
    except RecursionError:
        raise UsageError(f"{path} is nested too deeply; use at most {DEPTH} levels.") from None
    if root is None:
        return None
    entry = Entry(root, path)
    _check_nodes(entry, (), set())
    return entry


def _check_nodes(entry: Entry, above: tuple[int, ...], seen: set[int]) -> None:
    """Fail at the first node, at `entry` or below, that `open_yaml` refuses.

    Args:
        entry: where to start.
        above: ids of the nodes that it stands in.
        seen: ids of the nodes checked so far: an alias is checked once, however often it is used.
    """
    node = entry.node
    if id(node) in above:
        entry.fail("this alias stands for what it stands in; write the value out")
    if id(node) in seen:
        return
    seen.add(id(node))
    if len(above) >= DEPTH:
        entry.fail(f"this is nested too deeply; use at most {DEPTH} levels")
    if node.tag not in _TAGS:
        entry.fail(f"tag {quoted(node.tag)} is not known here; write plain values without tags")
    if isinstance(node, yaml.ScalarNode):
        if any("\ud800" <= character <= "\udfff" for character in node.value):
            entry.fail("half of a surrogate pair is no text; write the whole character")
        return
    if isinstance(node, yaml.SequenceNode):
        inside = [dataclasses.replace(entry, node=below) for below in node.value]
    else:
        keys = [dataclasses.replace(entry, node=key) for key, _ in node.value]
        inside = keys + [entry._below(key, value) for key, value in node.value]
    for below in inside:
        _check_nodes(below, (*above, id(node)), seen)


def read(entry: Entry, declared: Any, tables: Tables = NO_TABLES, base: Any = None) -> Any:
    """The entry as a value of the declared type.

    Args:
        entry: the value and its place.
        declared: a type, as in the annotation of a dataclass field.
        tables: types whose values have names.
        base: the record that a mapping changes, where the field has one already; else a mapping makes a new
            record from the defaults of the dataclass.

    Raises:
        UsageError: a value that the type does not hold, or that its dataclass refuses.
        TypeError: a declared type that no file can hold.
    """
    if declared in tables:
        return _read_named(entry, tables[declared], tables, base)
    origin, arguments = get_origin(declared), get_args(declared)
    if origin in (Union, UnionType):
        return _read_union(entry, arguments, tables, base)
    if origin is Literal:
        value = entry.scalar()
        if not any(value == choice and type(value) is type(choice) for choice in arguments):
            entry.fail(unknown(entry.name, value, arguments))
        return value
    if origin is tuple:
        return _read_tuple(entry, arguments, tables)
    if isinstance(declared, type) and dataclasses.is_dataclass(declared):
        return read_record(entry, entry.mapping(field_names(declared)), declared, tables, base)
    if declared not in _WORDS:
        raise TypeError(f"{entry.field}: a value of type {declared} cannot be read from YAML")
    value = entry.scalar()
    if declared in (int, float):
        value = _number(entry.node, value, declared)
    if type(value) is not declared:
        entry.fail(f"expected {_WORDS[declared]}, not {quoted(value)}")
    return value


def read_record(
    entry: Entry,
    entries: Mapping[str, Entry],
    kind: type[T],
    tables: Tables = NO_TABLES,
    base: T | None = None,
) -> T:
    """A dataclass from its entries; what it refuses as a whole is an error at `entry`.

    Args:
        entry: the mapping that the record is written as.
        entries: the entries to read, by field name.
        kind: the dataclass.
        tables: as in `read`.
        base: the record to change; None: start from the defaults of `kind`.
    """
    values = read_fields(entries, kind, tables, base)
    if base is not None:
        return _made(entry, entries, lambda: dataclasses.replace(base, **values))  # type: ignore[type-var]
    missing = [repr(n) for n in _required(kind) if n not in values]
    if missing:
        entry.fail(f"{' and '.join(missing)} must be given")
    return _made(entry, entries, lambda: kind(**values))


def _made(entry: Entry, entries: Mapping[str, Entry], make: Callable[[], T]) -> T:
    """The record; a value that a field cannot have fails there, anything else refused at `entry`."""
    try:
        return entry.checked(make)
    except UsageError as error:
        cause = error.__cause__
        if isinstance(cause, BadValue) and cause.name in entries:
            entries[cause.name].fail(str(cause))
        raise


def _number(node: yaml.Node, value: Any, declared: type) -> Any:
    """A number in the declared type where the meaning is plain (1 for 1.0, 1e-4 without a dot)."""
    if declared is int:
        return int(value) if type(value) is float and value.is_integer() else value
    if type(value) is str and getattr(node, "style", None) is None:
        try:
            return float(value)
        except ValueError:
            return value
    try:
        return float(value) if type(value) is int else value
    except OverflowError:
        return math.inf


def read_fields(
    entries: Mapping[str, Entry], kind: type, tables: Tables = NO_TABLES, base: Any = None
) -> dict[str, Any]:
    """The values of some fields of a dataclass by name; arguments as in `read_record`."""
    hints = get_type_hints(kind)
    return {n: read(e, hints[n], tables, getattr(base, n, None)) for n, e in entries.items()}


def field_names(kind: Any) -> list[str]:
    """Names of the fields of a dataclass that can be given."""
    return [f.name for f in dataclasses.fields(kind) if f.init]


def _required(kind: Any) -> list[str]:
    fields = dataclasses.fields(kind)
    return [f.name for f in fields if f.init and f.default is MISSING and f.default_factory is MISSING]


def _read_named(entry: Entry, table: Mapping[str, Any], tables: Tables, base: Any) -> Any:
    """A record of a table: by name, by name with changes, or as changes to `base`."""
    if isinstance(entry.node, yaml.ScalarNode):
        return _look_up(entry, entry.name, table)
    kind = entry.get(KIND)
    record = base if kind is None else _look_up(kind, entry.name, table)
    if record is None:
        entry.fail(f"'{KIND}' must be given. Known: {', '.join(table)}")
    entries = entry.mapping({KIND, *field_names(record)})
    entries.pop(KIND, None)
    return read_record(entry, entries, type(record), tables, record)


def _look_up(entry: Entry, what: str, table: Mapping[str, Any]) -> Any:
    """The record that the entry names; `what` says in an error what it is a name of."""
    # The text as written: `off` is a name here, not a truth value.
    name = entry.node.value if isinstance(entry.node, yaml.ScalarNode) else entry.scalar()
    if name not in table:
        entry.fail(unknown(what, name, table))
    return table[name]


def _read_union(entry: Entry, members: tuple[Any, ...], tables: Tables, base: Any) -> Any:
    """`X | None`, where X may be a union with a table."""
    rest = [m for m in members if m is not NoneType]
    if len(rest) < len(members) and isinstance(entry.node, yaml.ScalarNode) and entry.scalar() is None:
        return None
    declared = functools.reduce(operator.or_, rest)
    if len(rest) > 1 and declared not in tables:
        raise TypeError(f"{entry.field}: a value of type {declared} can be read with a table only")
    return read(entry, declared, tables, base)


def _read_tuple(entry: Entry, members: tuple[Any, ...], tables: Tables) -> tuple[Any, ...]:
    """`tuple[X, ...]`, or a tuple of fixed length."""
    items = entry.items()
    if len(members) == 2 and members[1] is Ellipsis:
        return tuple(read(item, members[0], tables) for item in items)
    if len(items) != len(members):
        entry.fail(f"expected {len(members)} entries, not {len(items)}")
    return tuple(read(item, member, tables) for item, member in zip(items, members, strict=True))
