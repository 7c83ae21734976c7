"""`surgeon finetune`."""

import shlex
import sys
from dataclasses import dataclass
from typing import Any

import typer

from surgeon.cli.command import Debug, Json, Model, Quiet, spread
from surgeon.options import Checked, check_counts, keywords_of, option, reads_of
from surgeon.train.result import Training
from surgeon.verbs import finetune as verb

GROUP = "training"
EXAMPLE = "surgeon finetune gpt2-27 --data text.txt --teacher gpt2-large --max-steps 300 -o healed"
STOPPED = 143  # the status of a process that SIGTERM ended, as shells report it


@dataclass(frozen=True, kw_only=True)
class StartOptions(Checked):
    """Whether and how the run is started, and where its result goes then."""

    dry_run: bool = option("Print steps, tokens, memory and time, and train nothing.", False, group="run")
    num_processes: int = option(
        "Number of processes to start on this machine (one per GPU).", 1, metavar="N", group="run"
    )
    push_to_hub: str | None = option(
        "Upload the finished output to this Hub repository.", None, metavar="REPO", group="output"
    )
    private: bool = option("Make the Hub repository private if it is created.", False, group="output")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "num_processes")


@spread
def finetune(
    model: Model,
    *,
    context: typer.Context,
    places: verb.PlaceOptions,
    start: StartOptions,
    storage: verb.StorageOptions,
    training: verb.TrainingOptions,
    machine: verb.MachineOptions,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train a model on data: heal a cut model (until its loss recovers), train new layers, distil from a teacher."""
    from surgeon.cli.terminal import emit, emit_json, log, results_alone
    from surgeon.train.launch import is_first, is_launched, relaunch, second_to_the_first

    num_processes, push_to_hub, private = start.num_processes, start.push_to_hub, start.private
    options = keywords_of(training) | keywords_of(machine)
    if start.dry_run:
        many = num_processes if num_processes > 1 else None
        with results_alone():
            estimate = verb.estimate_finetune(model, data=places.data, num_processes=many, **options)
        emit_json(estimate.to_dict()) if json else emit(estimate.to_text())
        return
    given = [name for name in context.params if str(context.get_parameter_source(name)).endswith("COMMANDLINE")]
    asked = verb.FinetuneOptions(**keywords_of(places), **keywords_of(storage), **options, given=given)
    if "num_processes" not in given:
        num_processes = verb.num_processes_of(model, asked) or 1
    reads = reads_of(verb.continued(model, asked)) | {"MODEL": (model,)}
    if push_to_hub is not None:
        from surgeon.checkpoint.overlap import check_uploaded

        check_uploaded(push_to_hub, reads)
    if num_processes > 1 and not is_launched():
        verb.checked(training)  # so that a mistake is one error, and not one per process
        sys.exit(relaunch(sys.argv[1:], processes=num_processes))
    with second_to_the_first(), results_alone():
        trained = _train(model, keywords_of(asked), quiet=quiet)
    if not is_first():
        return
    if trained.output is None:
        log(f"stopped at step {trained.steps:,}; the same command with --resume continues")
        sys.exit(STOPPED)
    entries = trained.to_dict()
    if push_to_hub is not None:
        from surgeon.checkpoint.hub import push

        entries["url"] = push(trained.output, push_to_hub, private=private, reads=reads)
        log(f"uploaded to {entries['url']}")
    if json:
        emit_json(entries)
        return
    emit(trained.to_text())
    if (following := _next(model, str(trained.output), training)) is not None:
        emit(f"\nnext: {following}")


def _train(model: str, options: dict[str, Any], *, quiet: bool) -> Training:
    from surgeon.cli.training_line import TrainingLine

    command = shlex.join(["surgeon", *sys.argv[1:]])
    return verb.finetune(model, **options | {"watcher": TrainingLine(quiet=quiet), "command": command})


def _next(model: str, output: str, options: verb.TrainingOptions) -> str | None:
    """Return the command that a user may want next, None for adapters that only PEFT loads."""
    if options.gist_reader == "frozen":
        return f"surgeon compress {model} --adapter {output} --prompt TEXT"
    if options.keep_adapter:
        return None
    return f"surgeon evaluate {output} " + ("--gist --data RECORDS" if options.gist else "--data TEXT")
