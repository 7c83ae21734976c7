"""A mistake on the command line: one sentence that says what is wrong, and a hint to type."""

import re
from collections.abc import Iterable
from typing import Any

from typer.exceptions import TyperException

from surgeon.cli.help import Command
from surgeon.mistyped import close_to
from surgeon.options import OptionError

KINDS = {"int": "a whole number", "integer": "a whole number", "float": "a number", "boolean": "true or false"}


def explained(error: TyperException, typed: str = "") -> OptionError:
    """Return what typer refuses, as surgeon says it. `typed` is the command, for an error that does not know it."""
    ctx: Any = getattr(error, "ctx", None)
    command = None if ctx is None else ctx.command
    if not isinstance(command, Command):
        return _of_surgeon(error, command, typed)
    name = f"surgeon {ctx.info_name}"
    listed = f"{name} --help lists its options."
    if hasattr(error, "possibilities"):
        wrong = str(error.option_name)  # type: ignore[attr-defined]
        return OptionError("", f"{name} has no option {wrong}{close_to(wrong, _flags(command))}", hint=listed)
    param: Any = getattr(error, "param", None)
    if hasattr(error, "param_type"):
        return OptionError("", f"{name} needs {_label(param)}", hint=f"Such as: {command.example}")
    if param is not None:
        return OptionError(str(param.name), _value(_label(param), str(error)), hint=listed)
    if extra := re.fullmatch(r"Got unexpected extra argument\S* \((.*)\)", str(error).rstrip(".")):
        word = extra[1].split()[0]
        return OptionError(
            "", f"no option takes the word {word!r}{close_to(f'--{word}', _flags(command))}", hint=listed
        )
    return OptionError("", str(error).rstrip("."), hint=listed)


def _of_surgeon(error: TyperException, group: Any, typed: str) -> OptionError:
    """Return a mistake without a command: one that does not exist, an option of none, an option without its value."""
    hint = "surgeon --help lists the commands."
    if (named := re.match(r"No such command '(.*?)'\.", str(error))) and group is not None:
        return OptionError("", f"surgeon has no command {named[1]}{close_to(named[1], group.commands)}", hint=hint)
    if hasattr(error, "possibilities"):
        wrong = str(error.option_name)  # type: ignore[attr-defined]
        close = close_to(wrong, _flags(group)) or "; options stand after a command"
        return OptionError("", f"surgeon has no option {wrong}{close}", hint=hint)
    if hasattr(error, "option_name"):
        hint = f"surgeon {typed} --help lists the options and their values."
        return OptionError("", f"{error.option_name} needs a value, and has none", hint=hint)
    return OptionError("", str(error).rstrip("."), hint=hint)


def _flags(command: Any) -> Iterable[str]:
    return [flag for item in command.params for flag in (*item.opts, *item.secondary_opts) if flag.startswith("--")]


def _label(item: Any) -> str:
    return str(item.metavar) if item.param_type_name == "argument" else str(max(item.opts, key=len))


def _value(label: str, said: str) -> str:
    """Return what is wrong with a value: of "'x' is not a valid int." that --layers is 'x', and has to be one."""
    found = re.fullmatch(r"(.*) is not a valid (\w+)\.?", said)
    if found is None:
        return f"{label}: {said.rstrip('.')}"
    return f"{label} is {found[1]}, and has to be {KINDS.get(found[2], f'a {found[2]}')}"
