"""The options that mean the same in every command, and the decorator that spreads a dataclass of options over one."""

import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer

from surgeon.options import Flag, OptionError, flag_of

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint directory, or a Hub id (gpt2-large).")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub model.")]
Seed = Annotated[int, typer.Option(help="Everything random derives from it; same seed, same bytes.")]
Adapter = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="Adapters trained for a frozen reader: they compress, the model reads."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else.")]
Device = Annotated[str, typer.Option(help="What computes: auto (CUDA, then MPS, then the CPU), cpu, cuda, mps.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Debug = Annotated[bool, typer.Option("--debug", help="Full tracebacks.")]


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """Return `command` with each parameter that is a dataclass of options spread into its fields, in their order.

    A value that cannot be (OptionError, or ValueError of a parser) is typer's usage error and names the option.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {}
    parameters: list[inspect.Parameter] = []
    for item in inspect.signature(command).parameters.values():
        hint = hints[item.name]
        if is_dataclass(hint):
            groups[item.name] = hint
            parameters += _parameters(hint)
        else:
            parameters.append(item.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hint))

    def flat(**given: Any) -> None:
        for name, kind in groups.items():
            given[name] = _made(kind, given)
        try:
            command(**given)
        except OptionError as error:  # of options that other functions check
            raise _usage_error(error) from error

    flat.__name__, flat.__doc__ = command.__name__, command.__doc__
    flat.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # typer reads it
    flat.__annotations__ = {item.name: item.annotation for item in parameters}
    return flat


def _made(kind: Any, given: dict[str, Any]) -> Any:
    """Return the options of a dataclass, taken out of what typer parsed."""
    hints = get_type_hints(kind)
    values: dict[str, Any] = {}
    for item in fields(kind):
        flag: Flag = item.metadata["flag"]
        if not flag.on_command_line:
            continue
        value = given.pop(item.name)
        if flag.parse is not None and value is not None:
            try:
                value = flag.parse(value)
            except ValueError as error:
                raise typer.BadParameter(str(error), param_hint=flag_of(item.name)) from error
        values[item.name] = tuple(value or ()) if _is_repeatable(hints[item.name]) else value
    try:
        return kind(**values)
    except OptionError as error:
        raise _usage_error(error) from error


def _usage_error(error: OptionError) -> typer.BadParameter:
    return typer.BadParameter(str(error).removeprefix(f"{flag_of(error.option)} "), param_hint=flag_of(error.option))


def _parameters(kind: Any) -> list[inspect.Parameter]:
    """Return the parameters that typer makes the options of a dataclass from."""
    hints = get_type_hints(kind)
    parameters = []
    for item in fields(kind):
        flag: Flag = item.metadata["flag"]
        if not flag.on_command_line:
            continue
        hint = hints[item.name]
        is_switch = _without_none(hint) is bool
        names = flag.names or ((flag_of(item.name),) if not is_switch or hint is bool else ())
        declared = typer.Option(*names, metavar=flag.metavar, help=flag.help)
        default = inspect.Parameter.empty if item.default is MISSING else item.default
        parameters.append(
            inspect.Parameter(
                item.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None if _is_repeatable(hint) and default is not inspect.Parameter.empty else default,
                annotation=Annotated[_typed(hint, flag, required=item.default is MISSING), declared],
            )
        )
    return parameters


def _typed(hint: Any, flag: Flag, *, required: bool) -> Any:
    """Return the type that typer parses for a field: of a union the one that a text can be."""
    if _is_repeatable(hint):
        return list[str] if required else list[str] | None
    optional = not required and type(None) in get_args(hint)
    plain: Any = str if flag.parse is not None else _without_none(hint)
    return plain | None if optional else plain


def _without_none(hint: Any) -> Any:
    """Return the type of a union that the command line gives: text before all others, a path before a number."""
    if get_origin(hint) not in (Union, UnionType):
        return hint
    members = [member for member in get_args(hint) if member is not type(None)]
    return next((kind for kind in (str, Path) if kind in members), members[0])


def _is_repeatable(hint: Any) -> bool:
    return get_origin(hint) is tuple and get_args(hint)[-1] is Ellipsis
