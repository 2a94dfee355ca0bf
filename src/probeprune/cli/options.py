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
the default of a parameter holds the defaults of that command's options.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import MISSING, fields, is_dataclass
from inspect import Parameter
from typing import Annotated, Any, get_type_hints


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """The command with each parameter that is a dataclass replaced by one keyword for each of its fields.

    The keywords are listed in `__signature__`, where Typer looks for options. A call builds the dataclasses
    and passes them on. Raises `ValueError` where two groups have a field of the same name.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    flat: list[Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name in groups:
            flat += _options(groups[parameter.name], parameter.default)
        else:
            flat.append(parameter.replace(kind=Parameter.KEYWORD_ONLY, annotation=hints[parameter.name]))
    signature = inspect.Signature(flat)

    @functools.wraps(command)
    def run(**given: Any) -> None:
        call = signature.bind(**given)
        call.apply_defaults()
        values = call.arguments
        records = {
            name: group(**{f.name: values.pop(f.name) for f in fields(group)})
            for name, group in groups.items()
        }
        command(**values, **records)

    run.__signature__ = signature  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in flat}
    return run


def _options(group: Any, defaults: Any) -> Iterator[Parameter]:
    """One keyword per field of a group; defaults come from the record `defaults` where there is one."""
    hints = get_type_hints(group, include_extras=True)
    for field in fields(group):
        default = getattr(defaults, field.name) if isinstance(defaults, group) else field.default
        kind, option = hints[field.name].__origin__, copy(hints[field.name].__metadata__[0])
        option.rich_help_panel = getattr(group, "panel", None)
        yield Parameter(
            field.name,
            Parameter.KEYWORD_ONLY,
            default=Parameter.empty if default is MISSING else default,
            annotation=Annotated[kind, option],
        )
