"""`surgeon grow`."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from surgeon.cli import clock, command
from surgeon.cli.command import Model, Writing, run, spread
from surgeon.errors import OutputError
from surgeon.options import keywords_of
from surgeon.verbs import grow as verb

if TYPE_CHECKING:
    from surgeon.surgery import Surgery

GROUP = "surgery"
STOPPED = 143  # the status of a process that SIGTERM ended, as shells report it
EXAMPLE = "surgeon grow gpt2 --layers 16 --hidden-size 2x -o gpt2-grown"
Verify = Annotated[
    bool | None,
    typer.Option(
        "--verify/--no-verify",
        help="Load the result and compare its logits with the source's. Default: below 1 B parameters.",
        rich_help_panel="run",
    ),
]


@spread
def grow(model: Model, options: verb.GrowOptions, verify: Verify = None, *, writing: Writing) -> None:
    """Make a model deeper and wider, with its function kept."""
    if options.learn is None:
        run(verb.grow(model, **keywords_of(options)), writing, verify=verify)
        return
    from surgeon.processes import together

    with together(options.device):
        _learned(model, options, writing, verify=verify)


def _learned(model: str, options: verb.GrowOptions, writing: Writing, *, verify: bool | None) -> None:
    """Plan, learn, write and report. Processes that a launcher started do this together."""
    from surgeon.cli.terminal import log
    from surgeon.processes import speaks
    from surgeon.verbs.learning import Growing, LearningStoppedError

    surgery: Surgery = verb.grow(model, **keywords_of(replace(options, measure=False)))
    own: Path | None = None  # the state of the learning, which ends with its result
    if not writing.dry_run:
        command.check(surgery, writing)  # before hours of training
        output = surgery.summary(writing.output).output
        if options.run_dir is None and options.learn:
            own = output.with_name(f"{output.name}.learn")
            options = replace(options, run_dir=str(own))
        _check_run_dir(output, options.run_dir)
        try:
            with clock.part("learning"):
                surgery = verb.grow(model, **keywords_of(options))
        except LearningStoppedError as stopped:
            log(f"{stopped}; {stopped.hint}")
            sys.exit(STOPPED)
    assert isinstance(surgery, Growing), "it was asked to learn"
    run(surgery, writing, verify=verify, report=surgery.learning)
    if own is not None and speaks():
        shutil.rmtree(own, ignore_errors=True)  # a run refuses a directory that holds anything else


def _check_run_dir(output: Path, run_dir: str | None) -> None:
    """Raises OutputError where the run would be kept in the output, which must be empty until the end, or around it."""
    if run_dir is None:
        return
    target, place = output.resolve(), Path(run_dir).resolve()
    if target == place or target in place.parents or place in target.parents:
        raise OutputError(
            f"the run's directory {run_dir} and the output {output} lie in one another",
            hint="Choose a place beside the output with --run-dir.",
        )
