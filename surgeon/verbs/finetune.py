"""The verb `finetune`: train a checkpoint on data, in a run directory that outlives the process."""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from surgeon.anatomy.anatomy import read_anatomy
from surgeon.checkpoint import output as outputs
from surgeon.checkpoint.header import is_quantized
from surgeon.checkpoint.source import Source, spec_of
from surgeon.errors import MeasureError, OutputError, PlanError
from surgeon.gist.settings import GistSettings
from surgeon.options import (
    Reads,
    device_option,
    in_python,
    option,
    reads_of,
    revision_option,
    same_option,
    takes,
    trust_option,
)
from surgeon.surgery import open_source, parse_size
from surgeon.train.result import Training
from surgeon.train.settings import ComputeSettings, LearningSettings, Settings, deciding

if TYPE_CHECKING:
    from surgeon.cost.estimate import RunEstimate
    from surgeon.train.run_dir import TrainingWatcher
    from surgeon.train.task import Task

Group = TypeVar("Group")


@dataclass(frozen=True, kw_only=True)
class PlaceOptions:
    """Where the data is, and where the run and its result are written."""

    data: Sequence[str] = option(
        "Text, or records (text; prompt, completion; instruction, output; question, answer; messages): .txt, "
        ".jsonl, .json, .parquet, a directory of them, or a Hub dataset. Repeatable.",
        metavar="DATA",
        reads=True,
    )
    output: str | os.PathLike[str] | None = option(
        "Where the result goes. Default: MODEL-finetune.", None, names=("--output", "-o"), metavar="DIR", writes=True
    )
    run_dir: str | os.PathLike[str] | None = option(
        "Directory for checkpoints, metrics and plot. Default: OUTPUT.run.", None, metavar="DIR", writes=True
    )
    resume: bool = option("Continue the run in the run directory, or begin one there.", False)
    overwrite: bool = option("Replace an existing output once the new one is complete.", False)


@dataclass(frozen=True, kw_only=True)
class StorageOptions:
    """How the result is stored."""

    dtype: str = option(
        "Dtype of the result: keep (the source's), float32, bfloat16 or float16.", "keep", metavar="DTYPE"
    )
    max_shard_size: int | str = option("Largest weight file: 5GB, 500MB.", "5GB", metavar="SIZE")


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(ComputeSettings, GistSettings, LearningSettings):
    """The options of all runs, and those of each task.

    Their order is that of --help, run.json and the receipt: dataclasses take the fields of the last base first.
    """

    def of(self, group: type[Group]) -> Group:
        """Return the options of a group: `Settings` or `GistSettings`. Raises PlanError as the group does."""
        names = [item.name for item in fields(group)]  # type: ignore[arg-type]  # a dataclass
        return group(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True, kw_only=True)
class MachineOptions:
    """Which model is trained on which device."""

    device: str = device_option()
    revision: str | None = revision_option()
    trust_remote_code: bool = trust_option()


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(MachineOptions, TrainingOptions, StorageOptions, PlaceOptions):
    """The options of `finetune`."""

    watcher: "TrainingWatcher | None" = in_python("An object that is called with each step and evaluation.")
    command: str | None = in_python("The command line, for the card and the receipt.")


@dataclass(frozen=True, kw_only=True)
class EstimateOptions(MachineOptions, TrainingOptions):
    """The options of `estimate_finetune`."""

    data: Sequence[str] = same_option(PlaceOptions, "data")
    num_processes: int | None = in_python("Processes that would train. Default: as many as a launcher has started.")


@takes(FinetuneOptions)
def finetune(model: str | os.PathLike[str], options: FinetuneOptions) -> Training:
    """Train a checkpoint directory or Hub model on data, write the result to `output`, and return a summary.

    To heal a cut model is to train it on until its loss recovers.

    Raises DataError, PlanError, MeasureError, OutputError before anything is trained, and TrainingError for a run that
    diverges or does not fit into memory.

        surgeon.finetune("SmolLM2-135M-24L", data=["wiki.txt"], output="healed", max_steps=300, teacher="SmolLM2-135M")
    """
    from surgeon.models.loading import runs
    from surgeon.train.runner import Runner

    training = checked(options.of(TrainingOptions))
    source = opened(model, options.revision, gist=training.gist)
    target = Path(options.output or default_output(source))
    reads = reads_of(options) | {"MODEL": (os.fspath(model),)}
    outputs.check_target(target, overwrite=options.overwrite, reads=reads)
    if options.dtype not in ("keep", "float32", "bfloat16", "float16"):
        raise PlanError(f"unknown dtype {options.dtype!r}", hint="One of: keep, float32, bfloat16, float16.")
    parse_size(options.max_shard_size)
    place = Path(options.run_dir or f"{target}.run")
    _check_places(target, place, reads)
    _ = source.companions  # one that is no file of the checkpoint is refused now, and not after hours

    task = task_of(source, training)
    device, watcher = options.device, options.watcher
    with (
        runs(source.label, trust_remote_code=options.trust_remote_code),
        (runner := Runner(source, tuple(options.data), task, run_dir=place, device=device, watcher=watcher)).held(
            resume=options.resume
        ),
    ):
        steps = runner.fit()
        if steps.is_stopped:
            return runner.stopped(steps)
        storage = {name: getattr(options, name) for name in ("dtype", "max_shard_size", "overwrite", "command")}
        runner.write(steps, target, **storage)
        return runner.finished(steps, target)


@takes(EstimateOptions)
def estimate_finetune(model: str | os.PathLike[str], options: EstimateOptions) -> "RunEstimate":
    """Return an estimate of `finetune` with these options: steps, tokens, memory, time. Trains and keeps nothing."""
    from surgeon.models.device import resolve_device
    from surgeon.models.loading import runs
    from surgeon.train.inputs import Inputs
    from surgeon.train.launch import processes

    training = checked(options.of(TrainingOptions))
    source = opened(model, options.revision, gist=training.gist)
    inputs = Inputs(
        source,
        tuple(options.data),
        task_of(source, training),
        resolve_device(options.device),
        lambda note: None,
        lambda: None,
        num_processes=options.num_processes or processes(),
    )
    running = runs(source.label, trust_remote_code=options.trust_remote_code)
    with running, tempfile.TemporaryDirectory() as directory:
        return inputs.estimate(Path(directory))


def checked(options: TrainingOptions) -> TrainingOptions:
    """Return the options. Raises PlanError where one makes no sense, alone or beside another."""
    settings, gist = options.of(Settings), options.of(GistSettings)
    if gist != GistSettings():
        gist.check(settings)
    return options


def task_of(source: Source, options: TrainingOptions) -> "Task":
    """Return the task that the options choose."""
    from surgeon.train.task import Task

    settings, recorded = options.of(Settings), deciding(options)
    if not options.gist:
        return Task(settings, recorded)
    from surgeon.gist.training import GistTask

    return GistTask(settings=settings, recorded=recorded, source=source, gist=options.of(GistSettings))


def _check_places(target: Path, run_dir: Path, reads: Reads) -> None:
    """Raise OutputError for places that would fail only at the end, or whose files are read."""
    outputs.check_apart(run_dir, reads)
    if run_dir.resolve() in target.resolve().parents:
        raise OutputError(
            f"the output {target} lies in the run's directory {run_dir}, whose files the run replaces",
            hint="Choose a place beside it with -o.",
        )
    if target.resolve() in (run_dir.resolve(), *run_dir.resolve().parents):
        raise OutputError(
            f"the run's directory {run_dir} lies in the output {target}, which must be empty until the end",
            hint="Leave out --run-dir, or choose a place beside the output.",
        )
    parent = next(place for place in target.resolve().parents if place.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write into {parent}, where {target} is to be", hint="Choose another place with -o.")


def opened(model: str | os.PathLike[str], revision: str | None, *, gist: bool = False) -> Source:
    """Return the model to train. Raises MeasureError for one that cannot be trained, CheckpointError for damage."""
    source = open_source(model, revision=revision)
    read_anatomy(spec_of(source))
    if source.config.get("is_encoder_decoder") and not gist:
        raise MeasureError(
            f"{source.label} has an encoder and a decoder; such models are trained with gists only",
            hint="Add --gist, or train it with a script of transformers.",
        )
    if is_quantized(source.config):
        raise MeasureError(
            f"{source.label} is quantized; what is trained are weights as numbers",
            hint="Train the unquantized checkpoint; --qlora quantizes it while it trains.",
        )
    return source


def default_output(source: Source) -> str:
    """Return the default name of the result: the model's name, and the verb."""
    label = Path(source.label)
    return f"{label.name or label.resolve().name or 'model'}-finetune"
