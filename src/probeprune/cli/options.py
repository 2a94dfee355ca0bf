"""Option groups: a command takes frozen dataclasses, and Typer sees their fields as options.

Typer makes one option of each parameter, so a command with many options has as many parameters. Here a
parameter whose type is a dataclass stands for one option per field:

    @dataclass(frozen=True)
    class LoadOptions:
        panel: ClassVar[str] = "Model loading"
        device: Annotated[str, typer.Option(help="Device to run on.")] = "auto"

    @grouped
    def prune(*, ratio: Annotated[float, typer.Option()], load: LoadOptions) -> None: ...

`panel` is the heading of the group in `--help`; groups without one stand under "Options". A group given as
the default of a parameter holds the defaults of that command's options. A number also names its range, which
`--help` shows and which is checked before the command starts:

    rank: Annotated[int, typer.Option(help="Rank of the adapters."), RANGES["rank"]] = 8
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import MISSING, fields, is_dataclass
from inspect import Parameter
from typing import Annotated, Any, get_type_hints

from probeprune.ranges import Range, plain

MILLION = 1_000_000
"""Upper ends of ranges from here on only keep out what no tensor holds; `--help` leaves them out."""


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """The command with each parameter that is a dataclass replaced by one keyword for each of its fields.

    The keywords are listed in `__signature__`, where Typer looks for options. A call checks the ranges,
    builds the dataclasses and passes them on; it raises `UsageError` with the name of an option that is out
    of range. Raises `ValueError` where two groups have a field of the same name.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    flat: list[Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name in groups:
            flat += _options(groups[parameter.name], parameter.default)
        else:
            flat.append(parameter.replace(kind=Parameter.KEYWORD_ONLY, annotation=hints[parameter.name]))
    ranges = {p.name: found for p in flat if (found := _range(p.annotation)) is not None}
    flat = [p.replace(annotation=_with_range(p.annotation)) for p in flat]
    signature = inspect.Signature(flat)

    @functools.wraps(command)
    def run(**given: Any) -> None:
        call = signature.bind(**given)
        call.apply_defaults()
        values = call.arguments
        for name, allowed in ranges.items():
            if values[name] is not None and not isinstance(values[name], str):
                values[name] = plain(name, values[name], f"--{name.replace('_', '-')}", allowed)
        records = {
            name: group(**{f.name: values.pop(f.name) for f in fields(group)})
            for name, group in groups.items()
        }
        command(**values, **records)

    run.__signature__ = signature  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in flat}
    run.ranges = ranges  # type: ignore[attr-defined]  # for what Typer finds to be no number (`typed.py`)
    return run


def _options(group: Any, defaults: Any) -> Iterator[Parameter]:
    """One keyword per field of a group; defaults come from the record `defaults` where there is one."""
    hints = get_type_hints(group, include_extras=True)
    for field in fields(group):
        default = getattr(defaults, field.name) if isinstance(defaults, group) else field.default
        kind, (option, *rest) = hints[field.name].__origin__, hints[field.name].__metadata__
        option = copy(option)
        option.rich_help_panel = getattr(group, "panel", None)
        yield Parameter(
            field.name,
            Parameter.KEYWORD_ONLY,
            default=Parameter.empty if default is MISSING else default,
            annotation=Annotated[(kind, option, *rest)],
        )


def _range(annotation: Any) -> Range | None:
    """The range that an option's annotation names, if any."""
    return next((m for m in getattr(annotation, "__metadata__", ()) if isinstance(m, Range)), None)


def _with_range(annotation: Any) -> Any:
    """The annotation of an option whose help also tells its range."""
    allowed = _range(annotation)
    if allowed is None:
        return annotation
    option = copy(annotation.__metadata__[0])
    ends = f"at least {allowed.least}" if allowed.whole and allowed.most >= MILLION else allowed.ends
    option.help = f"{option.help} {ends[0].upper()}{ends[1:]}."
    return Annotated[annotation.__origin__, option]
