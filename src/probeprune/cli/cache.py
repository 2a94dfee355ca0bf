"""`probeprune cache`: what the cache folder holds, and how to empty it."""

import json
import time
from dataclasses import asdict, dataclass
from typing import Annotated

import typer
from rich.table import Table

from probeprune.cli.groups import Json
from probeprune.cli.terminal import out, print_line
from probeprune.cli.values import one_of
from probeprune.errors import UsageError
from probeprune.model.machine import cache_dir
from probeprune.places import discard

KINDS = {
    "models": "models converted from GGUF, once each",
    "statistics": "what was computed on calibration text, by content",
    "costs": "what batches cost a model on this machine, measured",
    "fastest-dtype.json": "the dtype that is fastest on this machine",
}
"""What the package puts into the cache; all of it is made again when it is needed."""


@dataclass(frozen=True)
class Entry:
    """One file or folder of the cache.

    Attributes:
        kind: a key of `KINDS`.
        name: of the entry.
        bytes: on disk.
        days: since it was written last.
    """

    kind: str
    name: str
    bytes: int
    days: float


def entries() -> list[Entry]:
    """All that the package has put into the cache, the largest first."""
    found = []
    for kind in KINDS:
        place = cache_dir() / kind
        members = [place] if place.is_file() else sorted(place.iterdir()) if place.is_dir() else []
        for member in (m for m in members if not m.name.startswith(".")):
            files = [f for f in member.rglob("*") if f.is_file()] if member.is_dir() else [member]
            stats = [file.stat() for file in files]
            written = max((s.st_mtime for s in stats), default=0.0)
            days = max(time.time() - written, 0.0) / 86400
            found.append(Entry(kind, member.name, sum(s.st_size for s in stats), days))
    return sorted(found, key=lambda entry: -entry.bytes)


def cache(
    action: Annotated[
        str, typer.Argument(help="What to do: list all entries, show the size of each kind, or clear.")
    ] = "size",
    kind: Annotated[
        str | None,
        typer.Option(
            help="One kind alone: models, statistics, costs or fastest-dtype.json.", show_default="all"
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Delete without being asked again.")] = False,
    as_json: Json = False,
) -> None:
    """Show what the cache holds, or empty it. All of it is made again when it is needed.

    The cache is $PROBEPRUNE_CACHE, or probeprune/ in the user's cache folder.

    Example: [bold]probeprune cache clear --kind statistics --yes[/bold]
    """
    one_of("action", action, ("list", "size", "clear"))
    if kind is not None:
        one_of("kind", kind, KINDS)
    chosen = [entry for entry in entries() if kind in (None, entry.kind)]
    total = sum(entry.bytes for entry in chosen)
    if action == "clear":
        if chosen and not yes:
            raise UsageError(
                f"this would delete {len(chosen)} entries, {_size(total)}, from {cache_dir()}; add --yes."
            )
        for entry in chosen:
            _delete(entry)
        print_line(f"{len(chosen)} entries, {_size(total)}, from {cache_dir()}", "green", mark="deleted")
    elif as_json:
        for entry in chosen:
            print(json.dumps(asdict(entry)))
    else:
        out().print(_listed(chosen) if action == "list" else _sizes(chosen))


def _delete(entry: Entry) -> None:
    place = cache_dir() / entry.kind
    place = place if entry.kind == entry.name else place / entry.name
    if place.is_dir():
        discard(place)
    else:
        place.unlink(missing_ok=True)


def _listed(chosen: list[Entry]) -> Table:
    table = Table("kind", "entry", "size", "days", title=str(cache_dir()), title_justify="left")
    for entry in chosen:
        table.add_row(entry.kind, entry.name, _size(entry.bytes), f"{entry.days:.1f}")
    return table


def _sizes(chosen: list[Entry]) -> Table:
    table = Table("kind", "entries", "size", "what", title=str(cache_dir()), title_justify="left")
    for kind, what in KINDS.items():
        own = [entry for entry in chosen if entry.kind == kind]
        table.add_row(kind, str(len(own)), _size(sum(entry.bytes for entry in own)), what)
    return table


def _size(count: int) -> str:
    """Bytes as people read them, such as `12.3 MB`."""
    power = min((len(str(count)) - 1) // 3, 3)
    return f"{count / 1000**power:.{int(power > 0)}f} {('B', 'kB', 'MB', 'GB')[power]}"
