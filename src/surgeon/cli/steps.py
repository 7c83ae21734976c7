"""The commands as steps of a recipe: their options by name, checked, planned, and run in processes of their own."""

import inspect
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import cache
from importlib import import_module
from types import FrameType
from typing import Any

from typer.exceptions import TyperException

from surgeon.cli.command import CONFIG, SHOW_CONFIG, Writing, carried_out, command_of, draft_of
from surgeon.cli.commands import commands
from surgeon.cli.mistakes import explained
from surgeon.draft import Draft
from surgeon.options import OptionError, verb_named
from surgeon.recipe.commands import Key, StepError, UsageError
from surgeon.starter import held_pipe
from surgeon.surgery import Surgery

KINDS = {"integer": "integer", "float": "number", "boolean": "switch"}
WORDS = ("[TEXT]", "TEXT", "KIND")  # arguments that name nothing to read
NO_MODELS = {"DATA", "FILE", "DIR", "CONFIG", "SRC"}  # what options name that read no model
GRACE = 1.0  # seconds for a command to end by itself
OWN = ("run", "plot")  # commands that are no steps: the report draws the runs of all steps


class CommandLine:
    """The commands of `surgeon` for recipes, as `surgeon.recipe.commands.Commands` describes."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet

    def _said(self, command: str) -> list[str]:
        return ["--quiet"] if self._quiet and "quiet" in self.keys(command) else []

    def names(self) -> Sequence[str]:
        return [name for name in commands() if name not in OWN]

    def keys(self, command: str) -> Mapping[str, Key]:
        return keys_of(command)

    def check(self, command: str, words: Sequence[str]) -> None:
        self._parsed(command, words)

    def is_surgery(self, command: str) -> bool:
        return bool(verb_named(command).plans)

    def continues(self, command: str) -> bool:
        return not verb_named(command).begins

    def repeat(self, command: str, step: Mapping[str, Any], model: Surgery | None) -> Surgery:
        function = _planner(command)
        known = inspect.signature(function).parameters
        options = {name: value for name, value in step.items() if name in known}
        return function(**options) if model is None else function(model, **options)

    def plan(self, command: str, words: Sequence[str], model: Surgery | None, *, measure: bool = False) -> Surgery:
        parsed = self._parsed(command, words)
        function = _planner(command)
        known = inspect.signature(function).parameters
        values = {"measure": measure} if "measure" in known else {}
        for group in parsed.values():
            if is_dataclass(group) and not isinstance(group, Writing):
                values |= {item.name: getattr(group, item.name) for item in fields(group) if item.name in known}
        argument = next(name for name, key in self.keys(command).items() if key.is_argument)
        return function(parsed[argument] if model is None else model, **values)

    def draft(self, command: str, words: Sequence[str], surgery: Surgery) -> Draft:
        return draft_of(surgery, self._parsed(command, words)["writing"])

    def write(self, command: str, words: Sequence[str], surgery: Surgery) -> dict[str, Any]:
        parsed = self._parsed(command, [*self._said(command), *words])
        summary, _, entries = carried_out(surgery, parsed["writing"], verify=parsed.get("verify", False))
        return summary.to_dict() | entries

    def run(self, command: str, words: Sequence[str]) -> dict[str, Any]:
        """Run a command in a process that ends with this one.

        SIGTERM is passed on, so that training writes a checkpoint; the terminal sends Ctrl-C to both.
        """
        typed = [sys.executable, "-m", "surgeon", command, "--json", *self._said(command), *words]
        with held_pipe() as (pipe, told):
            child = subprocess.Popen(typed, env=os.environ | told, pass_fds=(pipe,), stdout=subprocess.PIPE, text=True)  # noqa: S603

            def pass_on(signum: int, frame: FrameType | None) -> None:
                child.send_signal(signum)

            before = signal.signal(signal.SIGTERM, pass_on)
            try:
                printed, _ = child.communicate()
            except KeyboardInterrupt:  # of a terminal, which has sent it to both, or to this process alone
                with suppress(subprocess.TimeoutExpired):
                    child.wait(GRACE)
                if child.poll() is None:
                    child.send_signal(signal.SIGINT)
                    child.wait()
                raise
            finally:
                signal.signal(signal.SIGTERM, before)
        status = 128 - child.returncode if child.returncode < 0 else child.returncode
        if status:
            raise StepError(f"surgeon {command} ended with status {status}", status=status)
        try:
            result: dict[str, Any] = json.loads(printed)
        except ValueError as error:
            raise StepError(f"surgeon {command} printed no JSON", status=1) from error
        return result

    def _parsed(self, command: str, words: Sequence[str]) -> dict[str, Any]:
        """Return what a command would be called with. Raises UsageError where it would refuse its options."""
        single, function = _command(command), function_of(command)
        try:
            context: Any = single.make_context(command, list(words))
            parsed: dict[str, Any] = function.grouped(dict(context.params))
        except (TyperException, OptionError) as error:
            said = error if isinstance(error, OptionError) else explained(error)
            raise UsageError(str(said), option=said.option, hint=said.hint or f"surgeon {command} --help") from error
        return parsed


def _planner(command: str) -> Callable[..., Surgery]:
    """Return the function that plans the surgery of a command."""
    function: Callable[..., Surgery] = getattr(import_module(f"surgeon.verbs.{command}"), verb_named(command).plans)
    return function


@cache
def _command(name: str) -> Any:
    return command_of(import_module(f"surgeon.cli.{name}"))


def function_of(name: str) -> Any:
    return getattr(import_module(f"surgeon.cli.{name}"), name)


@cache
def keys_of(command: str) -> Mapping[str, Key]:
    flags = getattr(function_of(command), "flags", {})
    found = {}
    for item in _command(command).params:
        if item.name in (CONFIG, SHOW_CONFIG):
            continue
        flag = flags.get(item.name)
        is_argument = item.param_type_name == "argument"
        name = item.name.replace("_", "-") if is_argument else max(item.opts, key=len).removeprefix("--")
        kind = KINDS.get(item.type.name, "text")
        is_file = flag is None and item.metavar == "FILE"
        reads = (is_argument and item.metavar not in WORDS) or is_file or bool(flag and flag.reads)
        found[name] = Key(
            name=name,
            kind=kind,  # type: ignore[arg-type]
            help=(flag.help if flag else getattr(item, "help", "")) or "",
            flag="" if is_argument else max(item.opts, key=len),
            off=item.secondary_opts[0] if item.secondary_opts else "",
            is_list=bool(item.multiple) if not is_argument else item.nargs == -1,
            is_argument=is_argument,
            is_required=bool(item.required),
            reads=reads,
            is_model=reads and not set(str(item.metavar).split(",")) & NO_MODELS,
            writes=bool(flag and flag.writes) and name != "output",
            decides=not (flag and flag.at_resume),
            words=tuple(flag.choices.listed) if flag and flag.choices and flag.choices.is_complete else (),
            aliases=tuple(flag.choices.aliases) if flag and flag.choices else (),
        )
    return found
