"""Convert frozen dataclasses to JSON values and back.

A record with a class attribute `kind` is one of a table of alternatives; its JSON contains that name.
"""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from probeprune.errors import UsageError, unknown


def to_json(value: Any) -> Any:
    """Convert a dataclass, and those nested in it, to a dict of JSON values; tuples become lists."""
    if is_dataclass(value) and not isinstance(value, type):
        record = {f.name: to_json(getattr(value, f.name)) for f in fields(value)}
        kind = getattr(type(value), "kind", None)
        return record if kind is None else {"kind": kind, **record}
    if isinstance(value, tuple | list):
        return [to_json(v) for v in value]
    if isinstance(value, Mapping):
        return {str(k): to_json(v) for k, v in value.items()}
    return value


def from_json(kind: Any, value: Any, tables: Mapping[type, Mapping[str, Any]]) -> Any:
    """The inverse of `to_json`.

    Args:
        kind: type of the result: a dataclass, a key of `tables`, a tuple, an optional or a plain type.
        value: JSON values.
        tables: for each type with alternatives, one record of each alternative by its `kind`.

    Raises `UsageError` for unknown fields or kinds.
    """
    if kind in tables:
        rest = dict(value)
        name = rest.pop("kind", None)
        if name not in tables[kind]:
            raise UsageError(unknown("kind", str(name), tables[kind]))
        return from_json(type(tables[kind][name]), rest, {})
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        known = {f.name for f in fields(kind)}
        for name in value:
            if name not in known:
                raise UsageError(unknown("field", name, known))
        read = {name: from_json(hints[name], v, tables) for name, v in value.items()}
        return kind(**read)  # type: ignore[operator]
    origin = get_origin(kind)
    if origin in (Union, UnionType):
        if value is None:
            return None
        (kind,) = (k for k in get_args(kind) if k is not NoneType)
        return from_json(kind, value, tables)
    if origin is tuple:
        return tuple(from_json(get_args(kind)[0], v, tables) for v in value)
    if origin is Literal or not isinstance(kind, type):
        return value
    return kind(value) if kind in (int, float, str) and not isinstance(value, bool) else value


def label(value: object) -> str:
    """The text for a value in the name of a composed method: the kind of a record, `str` of anything else."""
    return str(getattr(value, "kind", value))
