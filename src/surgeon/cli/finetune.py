"""`surgeon finetune`."""

import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from surgeon.anatomy.config import is_classifier, is_headless
from surgeon.checkpoint.receipt import made_of
from surgeon.cli.command import Debug, Json, Model, Quiet, data_words, emit_next, spread
from surgeon.options import Checked, check_counts, keywords_of, option, reads_of
from surgeon.processes import is_first, is_launched, second_to_the_first
from surgeon.surgery import open_source
from surgeon.train.result import Training
from surgeon.verbs import finetune as verb

GROUP = "training"
EXAMPLE = "surgeon finetune gpt2-27 --data text.txt --teacher gpt2-large --max-steps 300 -o healed"
LAUNCHED = "TORCHELASTIC_RUN_ID"  # set by torchrun and accelerate launch
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
    from surgeon.train.launch import relaunch

    num_processes, push_to_hub, private = start.num_processes, start.push_to_hub, start.private
    options = keywords_of(training) | keywords_of(machine)
    if start.dry_run:
        many = num_processes if num_processes > 1 else None
        with results_alone():
            estimate = verb.estimate_finetune(model, data=places.data, num_processes=many, **options)
        emit_json(estimate.to_dict(), estimated=True) if json else emit(estimate.to_text())
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
    try:
        with second_to_the_first(), results_alone():
            trained = _train(model, keywords_of(asked), quiet=quiet)
    except KeyboardInterrupt:
        if is_first():
            log(f"interrupted; {_going_on(verb.places_of(model, asked)[1])}")
        raise
    if not is_first():
        return
    if trained.output is None:
        log(f"stopped at step {trained.steps:,}; {_going_on(trained.run_dir)}")
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
    if following := _next(model, str(trained.output), training):
        emit_next(*following)


def _train(model: str, options: dict[str, Any], *, quiet: bool) -> Training:
    from surgeon.cli.training_line import TrainingLine

    command = shlex.join(["surgeon", *sys.argv[1:]])
    return verb.finetune(model, **options | {"watcher": TrainingLine(quiet=quiet), "command": command})


def _going_on(run_dir: Path) -> str:
    """Return where the newest checkpoint of an interrupted run is, and the command that continues it."""
    from surgeon.train.checkpoints import checkpoints
    from surgeon.train.run_dir import METRICS

    kept = checkpoints(run_dir)
    where = f"the newest checkpoint is {kept[-1]}" if kept else "no checkpoint was written yet"
    if not kept and not (run_dir / METRICS).exists():
        return "nothing was trained yet"
    if LAUNCHED in os.environ:  # by torchrun or accelerate, whose own words are not known here
        return f"{where}. The same command with --resume continues"
    words = [word for word in sys.argv[1:] if word != "--resume"]
    return f"{where}. Continue with: {shlex.join(['surgeon', *words, '--resume'])}"


def _next(model: str, output: str, options: verb.TrainingOptions) -> list[str]:
    """Return the words of the command that a user may want next.

    What is judged is judged on held-out data, against the teacher, or else what the model was made of.
    """
    if options.gist_reader == "frozen":
        return ["compress", model, "--adapter", output, "--prompt-file", "prompt.txt"]
    unseen = data_words(options.eval_data, options.columns) if options.eval_data else []
    if options.gist:
        return ["evaluate", output, "--gist", *(unseen or ["--data", "held-out.jsonl"])]
    baseline = options.teacher or (model if options.keep_adapter else made_of(model))
    against = [] if baseline is None else ["--baseline", baseline]
    config = open_source(output).config
    if is_headless(config) or config.get("is_encoder_decoder"):
        return ["inspect", output]  # `evaluate` refuses both
    if is_classifier(config):
        unseen = unseen or ["--data", "held-out.jsonl"]
        return ["evaluate", output, "--metric", "classification", *unseen, *against]
    return ["evaluate", output, *(unseen or ["--data", "held-out.txt"]), *against]
