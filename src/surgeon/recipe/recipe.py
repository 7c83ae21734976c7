"""A recipe from its file to its report: read, checked, planned, run."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgeon import text
from surgeon.errors import RecipeError, SurgeonError
from surgeon.mistyped import close_to
from surgeon.options import Checked, option, output_option, overwrite_option
from surgeon.recipe.checking import Job, Rounds, checked, jobs_of
from surgeon.recipe.commands import Commands
from surgeon.recipe.figures import headline, sentence
from surgeon.recipe.planning import PlannedStep, check_disk, plan
from surgeon.recipe.reading import read_recipe
from surgeon.recipe.record import Record, held
from surgeon.recipe.replay import Replay, is_receipt, replay
from surgeon.recipe.report import write_report
from surgeon.recipe.running import Outcome, Runner, Say
from surgeon.showing import Shown


@dataclass(frozen=True, kw_only=True)
class RecipeOptions(Checked):
    """The options of `run`."""

    settings: Sequence[str] = option(
        "Replace a setting of the recipe: model=gpt2-large. Repeatable.",
        (),
        names=("--set",),
        metavar="NAME=VALUE",
        group="steps",
    )
    first: str | None = option(
        "Run this step and those after it again, though they are done; their outputs are replaced.",
        None,
        names=("--from",),
        metavar="STEP",
        group="steps",
    )
    output: str | os.PathLike[str] | None = output_option(
        "Directory for the outputs of all steps and the report. Default: the recipe's name."
    )
    overwrite: bool = overwrite_option("Make anew what an earlier run made with other options or inputs.")
    dry_run: bool = option("Print the whole plan (sizes, tokens, time, disk) and run nothing.", False, group="run")


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class RecipeRun(Shown):
    """What came of a recipe. `failure` is why it stopped early, None where it came to its end.

    `report` is the page with the figures and pictures; None for a dry run.
    """

    outcomes: Sequence[Outcome | PlannedStep]
    report: Path | None
    failure: SurgeonError | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the run as `--json` prints it."""
        steps = [outcome.to_dict() for outcome in self.outcomes]
        return {"steps": steps, "report": None if self.report is None else str(self.report)}

    @property
    def headline(self) -> str:
        """The number of steps, and where the report is."""
        where = "only planned" if self.report is None else f"report in {self.report}"
        return f"{len(self.outcomes)} steps, {where}{'' if self.failure is None else f', stopped: {self.failure}'}"

    def to_text(self) -> str:
        """Return the run for people: each step with its figures, and what was lost."""
        if self.report is None:
            return _plan_text([step for step in self.outcomes if isinstance(step, PlannedStep)])
        outcomes = [outcome for outcome in self.outcomes if isinstance(outcome, Outcome)]
        lines = [
            [outcome.name, outcome.command, outcome.status, headline(outcome.result), text.duration(outcome.seconds)]
            for outcome in outcomes
        ]
        parts = [text.table(["step", "command", "status", "figures", "time"], lines)] if lines else []
        if (said := sentence(outcomes)) is not None:
            parts.append(said)
        last = next((outcome.output for outcome in reversed(outcomes) if outcome.output), None)
        rows = [("report", str(self.report))]
        rows += [] if last is None else [("output", last)]
        return "\n\n".join([*parts, text.rows(rows)])


def run_or_replay(path: Path, options: RecipeOptions, commands: Commands, say: Say) -> RecipeRun | Replay:
    """Run a recipe, or remake the checkpoint whose receipt `path` is. Raises RecipeError, OutputError, as both do."""
    if not is_receipt(path):
        return run_recipe(path, options, commands, say)
    if options.settings or options.first:
        raise RecipeError("a receipt has no settings and no steps to begin with", hint="Leave out --set and --from.")
    output = None if options.output is None else Path(options.output)
    return replay(path, output, commands, say, overwrite=options.overwrite, dry_run=options.dry_run)


def run_recipe(path: Path, options: RecipeOptions, commands: Commands, say: Say) -> RecipeRun:
    """Run a recipe, and return what came of each step, also where one failed.

    Raises RecipeError and OutputError for what is known before anything runs: a wrong option, a missing file, a
    reference to a later step, an impossible surgery, a full disk.
    """
    recipe = read_recipe(path, commands.names(), options.settings)
    jobs = checked(recipe, commands)
    _check_first(options.first, jobs)
    directory = Path(options.output or path.stem)
    if options.dry_run:
        return RecipeRun(outcomes=plan(jobs, commands, directory, estimates=True), report=None)
    with held(directory):
        settings = {name: str(value) for name, value in recipe.settings.items()}
        record = Record(directory, recipe=path, settings=settings)
        done = [name for name, entry in record.entries.items() if entry.status == "done"]
        check_disk(plan(jobs, commands, directory, estimates=False), directory, done)
        runner = Runner(
            jobs=jobs,
            commands=commands,
            record=record,
            say=say,
            overwrite=options.overwrite,
            first=options.first,
        )
        failure: SurgeonError | None = None
        try:
            runner.run()
        except SurgeonError as error:
            failure = error
        report = write_report(directory, path.stem, runner.outcomes, record, None if failure is None else str(failure))
    return RecipeRun(outcomes=runner.outcomes, report=report, failure=failure)


def _check_first(first: str | None, jobs: Sequence[Job | Rounds]) -> None:
    names = list(dict.fromkeys(job.name for item in jobs for job in jobs_of(item)))
    repeated = [job.name for item in jobs if isinstance(item, Rounds) for job in item.jobs]
    rounds = {name for name in repeated if first is not None and re.fullmatch(rf"{re.escape(name)}-\d+", first)}
    if first is not None and first not in names and not rounds:
        raise RecipeError(f"--from {first}: no such step{close_to(first, names)}", hint=f"Steps: {', '.join(names)}.")


def _plan_text(steps: Sequence[PlannedStep]) -> str:
    rows: list[tuple[str, str]] = []
    for step in steps:
        often = f"  (at most {step.rounds} times)" if step.rounds > 1 else ""
        rows.append((step.name, f"surgeon {step.command}{often}"))
        rows += [(f"  {name}", value) for name, value in step.rows]
    rows.append(("disk", f"{text.size(sum(step.disk * step.rounds for step in steps))} at least"))
    known = [step.seconds * step.rounds for step in steps if step.seconds is not None]
    if known:
        rows.append(("time", f"about {text.duration(sum(known))} of training"))
    return text.rows(rows)
