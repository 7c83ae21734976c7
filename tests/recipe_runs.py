"""Recipes in tests: written from text, and run in this process, so that torch is imported once."""

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from textwrap import dedent
from typing import Any

from surgeon.cli.command import command_of
from surgeon.cli.steps import CommandLine
from surgeon.errors import SurgeonError
from surgeon.recipe.commands import StepError
from surgeon.recipe.recipe import RecipeOptions, RecipeRun, run_recipe


class InProcess(CommandLine):
    """The commands of surgeon, run in this process; `ran` lists those that were, fused surgeries with a plus."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.ran: list[str] = []

    def run(self, command: str, words: Sequence[str]) -> dict[str, Any]:
        import json

        self.ran.append(command)
        printed = io.StringIO()
        with redirect_stdout(printed):
            try:
                arguments = ["--json", *self._said(command), *words]
                command_of(import_module(f"surgeon.cli.{command}")).main(arguments, command, standalone_mode=False)
            except SurgeonError as error:
                raise StepError(f"surgeon {command}: {error}", status=1) from error
        found: dict[str, Any] = json.loads(printed.getvalue())
        return found

    def write(self, command: str, words: Sequence[str], surgery: Any) -> dict[str, Any]:
        self.ran.append(f"+{command}")
        return super().write(command, words, surgery)


def write(path: Path, text: str) -> Path:
    path.write_text(dedent(text), encoding="utf-8")
    return path


def run(path: Path, output: Path, commands: CommandLine | None = None, **options: Any) -> RecipeRun:
    """Run a recipe in this process. What stops it is raised."""
    given = RecipeOptions(output=output, **options)
    done = run_recipe(path, given, commands or InProcess(), lambda text: None)
    if done.failure is not None:
        raise done.failure
    return done
