"""Libraries that only an extra of the package installs, and the sentence for one that is missing.

The core computes with torch and transformers alone. What one command or another needs beside them stands in
`EXTRAS`; the same names are the optional dependencies in `pyproject.toml`. Imports of such a library stand in
`with extra(...)`, at the end of a file's imports or in the function that needs it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec

from probeprune.errors import UsageError, unknown


@dataclass(frozen=True)
class Extra:
    """One extra.

    Attributes:
        name: as in `pip install "probeprune[NAME]"`.
        modules: what it installs, by the names of imports.
        purpose: what they are needed for; the subject of a sentence.
    """

    name: str
    modules: tuple[str, ...]
    purpose: str


EXTRAS = {
    extra.name: extra
    for extra in (
        Extra("eval", ("lm_eval", "datasets"), "scoring tasks"),
        Extra("train", ("peft", "tensorboard"), "training"),
        Extra("report", ("matplotlib",), "drawing figures"),
        Extra("hub", ("datasets", "pyarrow"), "reading Parquet files and data sets of the hub"),
        Extra("ray", ("ray",), "measuring on a Ray cluster"),
    )
}
"""All extras of users, by name."""


class MissingExtra(UsageError):
    """A library that an extra would have installed is not there."""


def missing(name: str) -> list[str]:
    """The modules of an extra that are not installed. Imports nothing."""
    return [module for module in _extra(name).modules if find_spec(module) is None]


def need(name: str) -> None:
    """Raise `MissingExtra` unless all modules of an extra are installed: before the work, not amid it."""
    for module in missing(name):
        raise MissingExtra(_sentence(_extra(name), module))


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Import modules of an extra inside. Raises `MissingExtra` where one is not installed."""
    wanted = _extra(name)
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").split(".")[0]
        if module not in wanted.modules:
            raise
        raise MissingExtra(_sentence(wanted, module)) from error


def _extra(name: str) -> Extra:
    if name not in EXTRAS:
        raise ValueError(unknown("extra", name, EXTRAS))
    return EXTRAS[name]


def _sentence(wanted: Extra, module: str) -> str:
    return (
        f"{wanted.purpose} needs {module}, which is not installed; run "
        f'`pip install "probeprune[{wanted.name}]"`.'
    )
