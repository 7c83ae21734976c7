"""The verb `finetune`: train a checkpoint on data, in a run directory that outlives the process."""

import os
import shlex
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from surgeon.anatomy.anatomy import read_anatomy
from surgeon.anatomy.config import UNTRAINED, class_names, is_classifier, is_headless
from surgeon.checkpoint import output as outputs
from surgeon.checkpoint.header import is_quantized
from surgeon.checkpoint.lora import MergedSource
from surgeon.checkpoint.source import Source, spec_of
from surgeon.data.documents import check_there
from surgeon.errors import MeasureError, OutputError, PlanError
from surgeon.gist.settings import GistSettings
from surgeon.options import (
    Checked,
    OptionError,
    Reads,
    device_option,
    dtype_option,
    flag_of,
    in_python,
    option,
    output_option,
    overwrite_option,
    progress_option,
    reads_of,
    revision_option,
    same_option,
    shard_option,
    size_in_bytes,
    takes,
    trust_option,
)
from surgeon.processes import is_first, processes
from surgeon.progress import Progress
from surgeon.surgery import open_source
from surgeon.train.checkpoints import held
from surgeon.train.result import Training, concluded
from surgeon.train.run_dir import DAMAGED_HINT, REQUEST, Request, begun, check_same, summary_of, written_by
from surgeon.train.selecting import LESS, SelectionSettings
from surgeon.train.settings import ComputeSettings, LearningSettings, Settings, deciding

if TYPE_CHECKING:
    from surgeon.cost.estimate import RunEstimate
    from surgeon.train.inputs import Select
    from surgeon.train.run_dir import TrainingWatcher
    from surgeon.train.task import Task

Group = TypeVar("Group")


@dataclass(frozen=True, kw_only=True)
class PlaceOptions(Checked):
    """Where the data is, and where the run and its result are written."""

    data: Sequence[str] = option(
        "Text, or records (text; prompt, completion; instruction, output; question, answer; messages ...): .txt, "
        ".jsonl, .json, .csv, .parquet, a directory, or a dataset, saved or on the Hub. Repeatable. "
        "Only a resumed run needs none.",
        (),
        metavar="DATA",
        reads=True,
        group="data",
    )
    output: str | os.PathLike[str] | None = output_option("Where the result goes. Default: MODEL-finetune.")
    run_dir: str | os.PathLike[str] | None = option(
        "Directory for checkpoints, metrics and plot. Default: OUTPUT.run.",
        None,
        metavar="DIR",
        writes=True,
        group="output",
    )
    resume: bool = option(
        "Continue the run in the run directory with the options that it began with, or begin one there.",
        False,
        group="output",
    )
    overwrite: bool = overwrite_option()


@dataclass(frozen=True, kw_only=True)
class StorageOptions(Checked):
    """How the result is stored."""

    dtype: str = dtype_option()
    max_shard_size: int | str = shard_option()

    def __post_init__(self) -> None:
        super().__post_init__()
        size_in_bytes(self.max_shard_size)


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(ComputeSettings, GistSettings, SelectionSettings, LearningSettings):
    """The options of all runs, and those of each task.

    Their order is that of --help, run.json and the receipt: dataclasses take the fields of the last base first.
    """

    def of(self, group: type[Group]) -> Group:
        """Return the options of a group: `Settings` or `GistSettings`. Raises PlanError as the group does."""
        names = [item.name for item in fields(group)]  # type: ignore[arg-type]  # a dataclass
        return group(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True, kw_only=True)
class MachineOptions(Checked):
    """Which model is trained on which device."""

    device: str = device_option()
    revision: str | None = revision_option()
    trust_remote_code: bool = trust_option()


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(MachineOptions, TrainingOptions, StorageOptions, PlaceOptions):
    """The options of `finetune`."""

    watcher: "TrainingWatcher | None" = in_python("An object that is called with each step and evaluation.")
    progress: Progress | bool | None = progress_option()
    command: str | None = in_python("The command line, for the card and the receipt.")
    given: Collection[str] = in_python("Options that a resumed run must not take from its own. Default: all named.", ())


@dataclass(frozen=True, kw_only=True)
class EstimateOptions(MachineOptions, TrainingOptions):
    """The options of `estimate_finetune`."""

    data: Sequence[str] = same_option(PlaceOptions, "data")
    progress: Progress | bool | None = progress_option()
    num_processes: int | None = in_python("Processes that would train. Default: as many as a launcher has started.")


@takes(FinetuneOptions)
def finetune(model: str | os.PathLike[str], options: FinetuneOptions) -> Training:
    """Train a checkpoint directory or Hub model on data, write the result to `output`, and return a summary.

    To heal a cut model is to train it on until its loss recovers.

    Raises DataError, PlanError, MeasureError, OutputError before anything is trained, and TrainingError for a run that
    diverges or does not fit into memory.

        healing = {"teacher": "SmolLM2-135M", "max_steps": 10, "sequence_length": 64}
        surgeon.finetune("SmolLM2-24L", data=["text.txt"], output="healed", **healing)
    """
    began = time.perf_counter()
    options = continued(model, options)
    if not options.data:
        raise OptionError("data", "--data is missing: there is nothing to train on", hint="Name a file: --data FILE.")
    training = checked(options.of(TrainingOptions))
    check_there((*options.data, *options.eval_data, *options.select_for))
    source = opened(model, options.revision)
    if training.keep_adapter and isinstance(source, MergedSource):
        raise PlanError(
            f"{source.label} is an adapter, so one that is trained on it would have no base that is stored",
            hint=f"Store it first: surgeon convert {shlex.quote(source.label)} -o merged",
        )
    target, place = places_of(model, options)
    done = _finished(place, target) if options.resume else None
    if done is None:
        _check_places(target, place, options, reads_of(options) | {"MODEL": (os.fspath(model),)})
        _ = source.companions  # one that is no file of the checkpoint is refused now, and not after hours
    task = task_of(source, training)
    if training.teacher:
        open_source(training.teacher)  # a mistyped name is answered now, and not once the student is loaded
    settings = task.record() | {"num_processes": processes(), "dtype": options.dtype}  # a step has the rows of all
    others = {name: getattr(options, name) for name in OTHERS} | {"output": str(target.absolute())}
    request = Request(model=source.provenance(), data=options.data, settings=settings, others=others)
    if done is not None:
        check_same(place, request)
        if summary_of(place, target) is None and is_first():  # it was killed just before it would have said so
            with held(place):
                done = replace(concluded(done, task.settings), already_done=True)
        return replace(done, seconds=time.perf_counter() - began)

    from surgeon.models.loading import runs
    from surgeon.train.runner import Runner

    device, watcher = options.device, options.watcher
    with runs(source.label, trust_remote_code=options.trust_remote_code):
        how: dict[str, Any] = {"device": device, "watcher": watcher, "select": _selection(task)}
        runner = Runner(source, tuple(options.data), task, run_dir=place, **how)
        with runner.held(request, resume=options.resume):
            steps = runner.fit()
            if steps.is_stopped:
                return runner.stopped(steps)
            storage = {name: getattr(options, name) for name in ("dtype", "max_shard_size", "overwrite", "command")}
            runner.write(steps, target, **storage)
            return runner.finished(steps, target)


# Options that decide no number of the result: a resumed run takes them from its own where they are not given.
OTHERS = ("max_shard_size", "device", "revision", "keep_checkpoints", "workers", "track")


def continued(model: str | os.PathLike[str], options: FinetuneOptions) -> FinetuneOptions:
    """Return the options, of a run that is resumed with its own in place of those that are not given.

    Raises OutputError where the run's record of them is damaged.
    """
    run_dir = places_of(model, options)[1]
    if not options.resume or (request := begun(run_dir)) is None:
        return options
    own = {**request.settings, **request.others, "data": request.data}
    groups = (MachineOptions, TrainingOptions, StorageOptions, PlaceOptions)
    hints = {name: hint for group in groups for name, hint in get_type_hints(group).items()}
    names = {item.name for item in fields(TrainingOptions)} | {"data", "dtype", "output", *OTHERS}
    taken: dict[str, Any] = {}
    for name in names & own.keys() - set(options.given):
        value = tuple(own[name]) if isinstance(own[name], list) else own[name]
        if not _fits(hints[name], value):
            raise OutputError(
                f"{run_dir / REQUEST} is damaged: {flag_of(name)} cannot be {value!r:.60}", hint=DAMAGED_HINT
            )
        taken[name] = value
    try:
        return replace(options, **taken)
    except OptionError as error:
        if error.option in options.given:
            raise
        raise OutputError(f"{run_dir / REQUEST} is damaged: {error}", hint=DAMAGED_HINT) from error


def num_processes_of(model: str | os.PathLike[str], options: FinetuneOptions) -> int | None:
    """Return how many processes the run has that is to be resumed; None where there is none."""
    request = begun(places_of(model, options)[1]) if options.resume else None
    count = None if request is None else request.settings.get("num_processes")
    return count if type(count) is int and count > 0 else None


def _fits(hint: Any, value: Any) -> bool:
    """Return whether a value has the type of an option."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if isinstance(value, tuple):
        lists = any(isinstance(get_origin(kind), type) and issubclass(get_origin(kind), Sequence) for kind in kinds)
        return lists and all(isinstance(item, str) for item in value)
    words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    return type(value) in kinds or value in words or (type(value) is int and float in kinds)


def places_of(model: str | os.PathLike[str], options: FinetuneOptions) -> tuple[Path, Path]:
    """Return the output and the run's directory."""
    target = Path(options.output or default_output(os.fspath(model)))
    return target, Path(options.run_dir or f"{target}.run")


def _finished(run_dir: Path, target: Path) -> Training | None:
    """Return the summary of a finished run whose output is `target`, as it was written; None for any other run.

    A run that was killed after it had written its output, and before it could say so, is finished too.
    """
    if begun(run_dir) is None or (summary := summary_of(run_dir, target) or written_by(run_dir, target)) is None:
        return None
    with suppress(KeyError, TypeError):
        return replace(Training.of_finished(summary), output=target, run_dir=run_dir)
    return None


@takes(EstimateOptions)
def estimate_finetune(model: str | os.PathLike[str], options: EstimateOptions) -> "RunEstimate":
    """Return an estimate of `finetune` with these options: steps, tokens, memory, time. Trains and keeps nothing.

    For example:

        print(surgeon.estimate_finetune("gpt2-large", data=["text.txt"], max_steps=300, batch_size=4))
    """
    from surgeon.models.device import resolve_device
    from surgeon.models.loading import runs
    from surgeon.train.inputs import Inputs

    training = checked(options.of(TrainingOptions))
    check_there((*options.data, *options.eval_data, *options.select_for))
    source = opened(model, options.revision)
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
    if gist.gist and settings.select:
        raise OptionError(
            "select",
            "--select looks at the loss of plain rows, and --gist trains another",
            hint="Select for a run without --gist, and train its rows.",
        )
    return options


def task_of(source: Source, options: TrainingOptions) -> "Task":
    """Return the task that the options choose."""
    settings, recorded = options.of(Settings), deciding(options)
    if options.select is None:  # so that what is recorded of other runs stays as it was
        recorded = {name: value for name, value in recorded.items() if not name.startswith("select")}
    if not options.gist:
        return _plain_task(source, settings, recorded)
    from surgeon.gist.training import GistTask

    return GistTask(settings=settings, recorded=recorded, source=source, gist=options.of(GistSettings))


def _selection(task: "Task") -> "Select | None":
    """Return what selects the rows of a run; None where all are trained.

    Raises PlanError for several processes: the training before a selection would wait for them, and they for it.
    """
    if task.settings.select is None:
        return None
    if task.settings.select_by == LESS and processes() > 1:
        raise PlanError(
            f"rows are selected by gradients in one process, and the run has {processes()}",
            hint="Select by words: --select-by bm25; or train in one process.",
        )
    from surgeon.attribution.selecting import selected

    return selected


def _plain_task(source: Source, settings: Settings, recorded: Mapping[str, Any]) -> "Task":
    """Return the task that the model's own class chooses. Raises PlanError for options that it does not have."""
    from surgeon.train.task import Task

    names = class_names(source.config)
    if other := next((name for name in names if name.endswith(UNTRAINED)), None):
        raise PlanError(
            f"{source.label} is a {other}, whose loss is none that a run has",
            hint="Language models, encoder-decoders and sequence classifiers are trained; an encoder with --teacher.",
        )
    encodes = bool(source.config.get("is_encoder_decoder"))
    classifies = is_classifier(source.config)
    embeds = not encodes and is_headless(source.config)
    if not encodes and not classifies and not (embeds and settings.teacher):
        return Task(settings, recorded)
    what = "a classifier" if classifies else "an encoder-decoder" if encodes else "an encoder without a head"
    given: dict[str, Any] = {"train_on": settings.train_on != "completion", "hidden_weight": settings.hidden_weight}
    given |= {"teacher_top_k": settings.teacher_top_k} if embeds else {"teacher": settings.teacher}
    given |= {} if encodes else {"lora": settings.lora}
    if refused := next((name for name, value in given.items() if value), None):
        raise PlanError(f"{flag_of(refused)} has no meaning for {what}", hint=f"Leave out {flag_of(refused)}.")
    if classifies:
        from surgeon.train.classifying import ClassTask, classes_of

        return ClassTask(settings, recorded, classes_of(source))
    if embeds:
        from surgeon.train.embedding import EmbeddingTask, pooling_of

        return EmbeddingTask(settings, recorded, pooling_of(source))
    from surgeon.train.answering import AnswerTask

    return AnswerTask(settings, recorded)


def _check_places(target: Path, run_dir: Path, options: FinetuneOptions, reads: Reads) -> None:
    """Raise OutputError for places that would fail only at the end, or whose files are read."""
    outputs.check_target(target, overwrite=options.overwrite, reads=reads)
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


def opened(model: str | os.PathLike[str], revision: str | None) -> Source:
    """Return the model to train. Raises MeasureError for one that cannot be trained, CheckpointError for damage."""
    source = open_source(model, revision=revision)
    read_anatomy(spec_of(source))
    if is_quantized(source.config):
        raise MeasureError(
            f"{source.label} is quantized; what is trained are weights as numbers",
            hint="Train the unquantized checkpoint; --qlora quantizes it while it trains.",
        )
    return source


def default_output(model: str) -> str:
    """Return the default name of the result: the model's name, and the verb."""
    label = Path(model)
    return f"{label.name or label.resolve().name or 'model'}-finetune"
