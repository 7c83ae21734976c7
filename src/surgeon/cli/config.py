"""--config and --show-config: options from a YAML file, and such a file made of options.

Both act on the words of a command line before the command parses them: what a file says becomes words like those that
are typed. So a file is checked by the command's own parser, and a receipt holds the options and not the file's name.
"""

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import typer
from typer.exceptions import TyperException

from surgeon.checkpoint.overlap import check_replaced
from surgeon.cli.command import CONFIG, SHOW_CONFIG, command_of
from surgeon.cli.commands import commands
from surgeon.cli.help import Command, default_of
from surgeon.cli.steps import function_of, keys_of
from surgeon.errors import RecipeError
from surgeon.options import GROUPS, OptionError
from surgeon.recipe.checking import check_options, words_of
from surgeon.recipe.reading import Place, Value, read_options

HINT = "surgeon COMMAND --show-config prints such a file."


class _Typed(NamedTuple):
    """What a command line gives: the values of the options that are on it, by their fields, and its other words."""

    values: Mapping[str, Any]
    words: Sequence[str]


def expanded(words: Sequence[str]) -> tuple[list[str], Mapping[str, Place]]:
    """Return a command line with the options of its --config file in it, and the lines that gave them, by field.

    With --show-config the file is printed, and the process ends. Raises OptionError, with file and line, for an option
    that the command does not have, RecipeError for a file that cannot be read.
    """
    name, rest = words[0], list(words[1:])
    if name not in commands():
        return list(words), {}
    from importlib import import_module

    command = command_of(import_module(f"surgeon.cli.{name}"))
    typed = _typed(command, rest)
    places: dict[str, Place] = {}
    if (file := typed.values.get(CONFIG)) is not None:
        found = _options(Path(file), name)
        fields = _fields(command)
        taken = {key: value for key, value in found.items() if fields[key] not in typed.values}
        rest = _merged(name, taken, [*_without(rest)])
        places = {fields[key]: value.place for key, value in taken.items()}
        typed = _typed(command, rest)
        if (output := typed.values.get("output")) and typed.values.get("overwrite"):
            check_replaced(Path(output), {"--config": (file,)})
    if typed.values.get(SHOW_CONFIG):
        _check(command, rest, places)
        sys.stdout.write(_page(command, typed.values))
        sys.exit(0)
    return [name, *rest], places


def _typed(command: Command, words: Sequence[str]) -> _Typed:
    """Return what a command line gives. Unknown options are left to the command, which refuses them."""
    context = typer.Context(command, info_name=command.name, resilient_parsing=True, ignore_unknown_options=True)
    try:
        values, other, _ = command.make_parser(context).parse_args(args=list(words))
    except TyperException:  # an option without its value: the command says so
        return _Typed({}, words)
    arguments = {item.name for item in command.params if item.param_type_name == "argument"}
    given = {name: value for name, value in values.items() if name not in arguments or _is_given(value)}
    return _Typed(given, other)


def _is_given(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, tuple | list) and len(value) > 0)


def _options(path: Path, name: str) -> Mapping[str, Value]:
    """Return the options in a file. Raises OptionError for those that the command does not have."""
    found = read_options(path, "a config file", hint=HINT)
    try:
        return check_options(name, found, keys_of(name))
    except RecipeError as error:
        raise OptionError("", str(error), hint=error.hint) from error


def _fields(command: Command) -> dict[str, str]:
    """Return the field of each option by its key in a file."""
    return {key_of(item): str(item.name) for item in command.params if item.name not in (CONFIG, SHOW_CONFIG)}


def key_of(item: Any) -> str:
    """Return the name of an option or an argument in a file."""
    is_argument = item.param_type_name == "argument"
    return str(item.name.replace("_", "-") if is_argument else max(item.opts, key=len).removeprefix("--"))


def _merged(name: str, taken: Mapping[str, Value], words: Sequence[str]) -> list[str]:
    """Return words with options of a file before them, and its arguments after them: what is typed last wins."""
    keys = keys_of(name)
    options = words_of({key: value for key, value in taken.items() if not keys[key].is_argument}, keys)
    arguments = [item for key, value in taken.items() if keys[key].is_argument for item in value.items]
    guard = ["--"] if any(item.startswith("-") for item in arguments) else []
    return [*options, *words, *guard, *arguments]


def _without(words: Sequence[str]) -> Iterator[str]:
    """Yield words without --config and its value."""
    left = iter(words)
    for word in left:
        if word == "--config":
            next(left, None)
        elif not word.startswith("--config="):
            yield word


def _check(command: Command, words: Sequence[str], places: Mapping[str, Place]) -> None:
    """Raise what the command would raise of its options; those that are missing do not matter here."""
    try:
        context: Any = command.make_context(command.name, list(words))
        function_of(str(command.name)).grouped(dict(context.params))
    except TyperException as error:
        if not hasattr(error, "param_type"):  # a missing option
            raise
    except OptionError as error:
        place = places.get(error.option)
        raise OptionError(error.option, f"{place}: {error}", hint=error.hint) if place else error from None


def _page(command: Command, given: Mapping[str, Any]) -> str:
    """Return a file: the options that are given, and the others as comments with their defaults."""
    lines = [f"# surgeon {command.name} --config FILE: what the command line gives wins."]
    items = [item for item in command.params if item.name not in (CONFIG, SHOW_CONFIG)]
    for group in (None, *GROUPS):
        of_group = [item for item in items if getattr(item, "rich_help_panel", None) == group]
        lines += ["", f"# {group}"] if group and of_group else []
        lines += [_line(item, given) for item in of_group]
    return "\n".join([*lines, ""])


def _line(item: Any, given: Mapping[str, Any]) -> str:
    key = key_of(item)
    if item.name in given:
        value = given[item.name]
        if isinstance(value, tuple | list):
            return f"{key}: [{', '.join(map(_scalar, value))}]"
        return f"{key}: {_scalar(value)}"
    default = default_of(item, "").removeprefix("default: ")
    if item.param_type_name == "option" and item.is_flag:
        return f"# {key}: {str(bool(item.default)).lower()}"
    return f"# {key}: {default}" if default and not item.required else f"# {key}:"


def _scalar(value: Any) -> str:
    """Return a value in YAML that reads as the same text; true and false are what switches are."""
    if isinstance(value, bool):
        return str(value).lower()
    text = str(value)
    is_plain = re.fullmatch(r"[A-Za-z0-9./][\w./%+-]*", text) and text.lower() not in _MORE_THAN_TEXT
    return text if is_plain else json.dumps(text, ensure_ascii=False)


_MORE_THAN_TEXT = {"true", "false", "null", "yes", "no", "on", "off", "y", "n", "~"}
