"""`surgeon run`."""

from pathlib import Path
from typing import Annotated

import typer

from surgeon.cli.command import Debug, Json, Quiet, spread
from surgeon.cli.steps import CommandLine
from surgeon.cli.terminal import emit, emit_json, log
from surgeon.recipe.commands import StepError
from surgeon.recipe.recipe import RecipeOptions, RecipeRun, run_or_replay

GROUP = "recipes"
EXAMPLE = "surgeon run recipes/prune-and-heal.yaml --set model=HuggingFaceTB/SmolLM2-135M --set data=text.txt"
Recipe = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe (.yaml), or a checkpoint's surgeon.json.")]


@spread
def run(recipe: Recipe, options: RecipeOptions, json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """Run a recipe: a chain of commands in YAML, resumable; or remake a checkpoint from its surgeon.json."""

    def say(text: str) -> None:
        if not quiet:
            log(text)

    done = run_or_replay(recipe, options, CommandLine(quiet=quiet), say)
    emit_json(done.to_dict()) if json else emit(done.to_text())
    if isinstance(done, RecipeRun) and done.failure is not None:
        if isinstance(done.failure, StepError):  # it has said why
            log(f"stopped: {done.failure}; the same command{' without --from' if options.first else ''} continues")
            raise typer.Exit(done.failure.status)
        raise done.failure
