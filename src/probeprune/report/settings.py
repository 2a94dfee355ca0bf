"""The settings kept in result lines: reading a method's record, and labels for settings that differ.

A method's record is nested JSON: a part with alternatives is a record whose `kind` names one, such as
`{"when": {"kind": "probe", "probe": {"tokens": 0.5}}}`. All reading of method records goes through this file.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from probeprune.result_lines import MethodRecord

Settings = Mapping[str, Any]
Path = tuple[str, ...]
"""Keys from the outermost record inwards."""


def is_dense(method: MethodRecord) -> bool:
    """Whether the method neither prunes nor trains."""
    when = method["when"]
    return when["kind"] == "never" and not when.get("recovery", False)


def without_seed(method: MethodRecord) -> Settings:
    """All settings but the seed, over which results are averaged."""
    return {key: value for key, value in method.items() if key != "seed"}


def differences(named: Sequence[tuple[str, Settings]]) -> list[str]:
    """A label for each record that sets it apart from others of its name.

    The label lists the settings in which the records differ, by dotted names: `" (when.probe.tokens=0.5)"`.
    It is empty where the name is enough. A top-level setting that one of two records lacks is unknown there,
    and counts as equal.
    """
    labels = []
    namesakes: dict[str, list[Settings]] = {}
    for name, settings in named:
        namesakes.setdefault(name, []).append(settings)
    for name, settings in named:
        differing = {path for other in namesakes[name] for path in _differing(settings, other)}
        parts = [f"{'.'.join(p)}={_words(value)}" for p, value in _walk(settings) if p in differing]
        labels.append(f" ({', '.join(parts)})" if parts else "")
    return labels


def _differing(one: Settings, other: Settings, outer: Path = ()) -> list[Path]:
    """Paths of the settings in which two records differ, as deep as both have the same shape."""
    found: list[Path] = []
    for key, value in one.items():
        if key not in other or other[key] == value:
            continue
        path, theirs = (*outer, key), other[key]
        inner: list[Path] = []
        if isinstance(value, Mapping) and isinstance(theirs, Mapping):
            if value.get("kind") == theirs.get("kind"):
                inner = _differing(value, theirs, path)
            elif "kind" in value:
                inner = [(*path, "kind")]
        found += inner or [path]
    return found


def _walk(settings: Settings, outer: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every setting with its path, records before the settings in them."""
    for key, value in settings.items():
        yield (*outer, key), value
        if isinstance(value, Mapping):
            yield from _walk(value, (*outer, key))


def _words(value: Any) -> str:
    """A setting's value in a label."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return f"[{', '.join(f'{key}={_words(inner)}' for key, inner in value.items())}]"
    return "+".join(map(_words, value)) if isinstance(value, list | tuple) else str(value)
