"""The range of every number that can be set: stated once, by name, and checked alike by all.

The library's records and functions, presets and the command line refuse what lies outside. Every range ends
on both sides, so NaN, infinity and integers that no tensor holds are outside of all of them.
"""

import operator
from dataclasses import dataclass, fields
from typing import Any

from probeprune.errors import BadValue, quoted


@dataclass(frozen=True)
class Range:
    """The values that a number may have.

    Attributes:
        least, most: the ends.
        unit: what is counted, in the plural; empty for a number without a unit.
        whole: whether it is a whole number.
        open_least, open_most: whether that end itself is outside.
        hint: what to do about a value outside, for the end of the sentence.
    """

    least: float
    most: float
    unit: str = ""
    whole: bool = True
    open_least: bool = False
    open_most: bool = False
    hint: str = ""

    @property
    def ends(self) -> str:
        """Both ends, such as `from 1 to 100` or `in (0, 1]`."""
        if self.whole:
            return f"from {self.least} to {self.most}"
        first, last = "(" if self.open_least else "[", ")" if self.open_most else "]"
        return f"in {first}{self.least:g}, {self.most:g}{last}"

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        return f"{kind}{f' of {self.unit}' if self.unit else ''} {self.ends}"

    def __contains__(self, value: float) -> bool:
        above = value > self.least if self.open_least else value >= self.least
        return above and (value < self.most if self.open_most else value <= self.most)


def _count(unit: str, least: int = 1, most: int = 1_000_000) -> Range:
    return Range(least, most, unit)


def _share(brackets: str, hint: str = "") -> Range:
    """A share between 0 and 1; `brackets` as in `(]`, a round one where the end is outside."""
    return Range(0, 1, whole=False, open_least=brackets[0] == "(", open_most=brackets[1] == ")", hint=hint)


_TOKENS = 1 << 30
_LENGTH = 1 << 24
_STEPS = 10_000_000

RANGES: dict[str, Range] = {
    # what is pruned
    "ratio": _share("[)", "0.4 prunes 40 % of the model's blocks"),
    "skip_layers": _count("layers", 0),
    "round_to": _count("channels"),
    "prune.steps": _count("steps", 1, 1000),
    "seed": Range(0, 2**32 - 1),
    # texts
    "windows": _count("windows"),
    "count": _count("windows"),
    "Text.windows": _count("windows", 0),
    "length": _count("tokens", 2, _LENGTH),
    "batch_size": _count("sequences"),
    "training_windows.held_out": _share("[)"),
    "limit": _count("items", 1, _TOKENS),
    # probes
    "tokens": _share("(]"),
    "samples": _share("(]"),
    "min_tokens": _count("tokens", 0, _TOKENS),
    "min_size": _count("tokens", 0, _TOKENS),
    "keep_first_below": _count("positions", 0, _TOKENS),
    "reuse": _count("tokens", 0, _TOKENS),
    "history_share": _share("[]"),
    "decay": _share("[]"),
    "own_positions": _count("positions", 0),
    "refresh": _count("tokens", 0, _TOKENS),
    # refits
    "damping": Range(0, 1e6, whole=False, open_least=True),
    "held_out": _share("()"),
    "share": _share("[]"),
    "RefitEveryBatch.share": _share("()"),
    "sensitivity": _count("windows", 0),
    # gradients and adapters
    "draws": _count("draws"),
    "rank": Range(1, 8192),
    "alpha": Range(1, 1_000_000),
    "dropout": _share("[)"),
    # training
    "steps": _count("steps", 1, _STEPS),
    "micro_batch": _count("sequences"),
    "learning_rate": Range(0, 1, whole=False, open_least=True),
    "warmup_steps": _count("steps", 0, _STEPS),
    "weight_decay": _share("[]"),
    "clip": Range(0, 1e12, whole=False, open_least=True),
    "evaluate_every": _count("steps", 1, _STEPS),
    "evaluate_windows": _count("windows"),
    "patience": _count("evaluations"),
    "Distillation.temperature": Range(0, 1000, whole=False, open_least=True),
    "top_k": _count("tokens", 1, _LENGTH),
    "train_tokens": _count("tokens", 1, 1 << 50),
    # generation and speed
    "max_new_tokens": _count("tokens", 1, _LENGTH),
    "new_tokens": _count("tokens", 0, _LENGTH),
    "temperature": Range(0, 1000, whole=False, hint="0 takes the most likely token"),
    "top_p": _share("(]", "1 draws from all tokens"),
    "GridPoint.length": _count("tokens", 1, _LENGTH),
    "CostMeasure.length": _count("tokens", 1, _LENGTH),
    "rounds": _count("rounds", 1, 10_000),
    "speed_rounds": _count("rounds", 0, 10_000),
    "recover": _count("steps", 0, 10_000_000),
    "layers": _count("layers", 1, 10_000),
    "threads": _count("threads", 0, 4096),
    "workers": _count("processes", 1, 4096),
    "gpus": Range(0, 4096, "GPUs", whole=False),
}
"""By the name of the parameter or field; where one name means two things, with its record or function in
front (`Text.windows`)."""


def plain(name: str, value: Any, label: str | None = None, allowed: Range | None = None) -> Any:
    """The value as a plain int or float. Raises `BadValue` for anything that is no number in its range.

    NumPy numbers, tensors without dimensions and whole floats are numbers too; truth values are not.

    Args:
        name: the parameter or field, a key of `RANGES`.
        value: what was given.
        label: what the error calls it; None for `name` without its record.
        allowed: its range; None for the one in `RANGES`.
    """
    allowed = RANGES[name] if allowed is None else allowed
    name = name.rpartition(".")[2]
    try:
        number = _number(value, allowed.whole)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = float("nan")
    if number not in allowed:
        hint = f"; {allowed.hint}" if allowed.hint else ""
        raise BadValue(name, f"{label or name} must be {allowed}, not {quoted(value)}{hint}.")
    return number


def check(owner: str = "", /, **values: Any) -> None:
    """Raise `BadValue` for the first argument outside its range, by its name; None is not checked.

    Args:
        owner: the record or function, which may have ranges of its own.
        values: numbers by their names in `RANGES`.
    """
    for name, value in values.items():
        if value is not None:
            plain(_key(owner, name), value)


def check_fields(record: Any) -> None:
    """Check all fields of a frozen dataclass that have a range, and make them plain; for `__post_init__`.

    A field for a tuple is checked entry by entry, and None is left as it is. Raises `BadValue` with the
    field's name.
    """
    for field in fields(record):
        key = _key(type(record).__name__, field.name)
        value = getattr(record, field.name)
        if key not in RANGES or value is None:
            continue
        if str(field.type).startswith("tuple") and isinstance(value, tuple | list):
            made = tuple(plain(key, v) for v in value)
        else:
            made = plain(key, value)
        object.__setattr__(record, field.name, made)


def _key(owner: str, name: str) -> str:
    own = f"{owner}.{name}"
    return own if own in RANGES else name


def _number(value: Any, whole: bool) -> float:
    """The number that is meant; raises one of several errors where none is."""
    kind = str(getattr(value, "dtype", type(value).__name__))
    if kind.endswith("bool") or isinstance(value, str | bytes) or getattr(value, "ndim", 0) > 0:
        raise TypeError
    if not whole:
        return float(value)
    try:
        return operator.index(value)
    except TypeError:
        number = float(value)
    if not number.is_integer():
        raise ValueError
    return int(number)
