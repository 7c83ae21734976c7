"""The verb `finetune`: train a checkpoint on data, in a run directory that outlives the process."""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from surgeon.anatomy.anatomy import read_anatomy
from surgeon.checkpoint import output as outputs
from surgeon.checkpoint.source import Source, spec_of
from surgeon.errors import MeasureError, OutputError, PlanError
from surgeon.gist.settings import GistSettings
from surgeon.surgery import open_source, parse_size
from surgeon.train.result import Training
from surgeon.train.settings import ComputeSettings, LearningSettings, Settings, deciding

if TYPE_CHECKING:
    from surgeon.cost.estimate import RunEstimate
    from surgeon.train.run_dir import TrainingWatcher
    from surgeon.train.task import Task

Group = TypeVar("Group")


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(ComputeSettings, GistSettings, LearningSettings):
    """The options of `finetune`: those of all runs, and those of each task.

    Their order is that of --help, run.json and the receipt: dataclasses take the fields of the last base first.
    """

    def of(self, group: type[Group]) -> Group:
        """Return the options of a group: `Settings` or `GistSettings`. Raises PlanError as the group does."""
        names = [item.name for item in fields(group)]  # type: ignore[arg-type]  # a dataclass
        return group(**{name: getattr(self, name) for name in names})


def finetune(
    model: str | os.PathLike[str],
    *,
    data: Sequence[str],
    output: str | os.PathLike[str] | None = None,
    run_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    dtype: str = "keep",
    max_shard_size: int | str = "5GB",
    device: str = "auto",
    revision: str | None = None,
    watcher: "TrainingWatcher | None" = None,
    command: str | None = None,
    **options: Any,
) -> Training:
    """Train a checkpoint directory or Hub model on data, write the result to `output`, and return a summary.

    To heal a cut model is to train it on until its loss recovers.

    `options` are the fields of `FinetuneOptions`, as `surgeon finetune --help` explains them. The run keeps its
    checkpoints and metrics in `run_dir` ("OUTPUT.run"); with `resume` a run in that directory is continued.
    Raises DataError, PlanError, MeasureError, OutputError before anything is trained, and TrainingError for a run that
    diverges or does not fit into memory.

        surgeon.finetune("SmolLM2-135M-24L", data=["wiki.txt"], output="healed", max_steps=300, teacher="SmolLM2-135M")
    """
    from surgeon.train.runner import Runner

    chosen = checked(FinetuneOptions(**options))
    source = opened(model, revision, gist=chosen.gist)
    target = Path(output or default_output(source))
    outputs.check_target(target, overwrite=overwrite, source=source.origin)
    if dtype not in ("keep", "float32", "bfloat16", "float16"):
        raise PlanError(f"unknown dtype {dtype!r}", hint="One of: keep, float32, bfloat16, float16.")
    parse_size(max_shard_size)
    place = Path(run_dir or f"{target}.run")
    _check_places(target, place)
    runner = Runner(source, tuple(data), task_of(source, chosen), run_dir=place, device=device, watcher=watcher)
    with runner.held(resume=resume):
        steps = runner.fit()
        if steps.is_stopped:
            return runner.stopped(steps)
        runner.write(steps, target, dtype=dtype, max_shard_size=max_shard_size, overwrite=overwrite, command=command)
        return runner.finished(steps, target)


def estimate_finetune(
    model: str | os.PathLike[str],
    *,
    data: Sequence[str],
    device: str = "auto",
    revision: str | None = None,
    num_processes: int | None = None,
    **options: Any,
) -> "RunEstimate":
    """Return an estimate of `finetune` with these options: steps, tokens, memory, time. Trains and keeps nothing.

    `num_processes` is the number of processes that would train; None: as many as a launcher has started.
    """
    from surgeon.models.device import resolve_device
    from surgeon.train.inputs import Inputs
    from surgeon.train.launch import processes

    chosen = checked(FinetuneOptions(**options))
    source = opened(model, revision, gist=chosen.gist)
    inputs = Inputs(
        source,
        tuple(data),
        task_of(source, chosen),
        resolve_device(device),
        lambda note: None,
        lambda: None,
        num_processes=num_processes or processes(),
    )
    with tempfile.TemporaryDirectory() as directory:
        return inputs.estimate(Path(directory))


def checked(options: FinetuneOptions) -> FinetuneOptions:
    """Return the options. Raises PlanError where one makes no sense, alone or beside another."""
    settings, gist = options.of(Settings), options.of(GistSettings)
    if gist != GistSettings():
        gist.check(settings)
    return options


def task_of(source: Source, options: FinetuneOptions) -> "Task":
    """Return the task that the options choose."""
    from surgeon.train.task import Task

    settings, recorded = options.of(Settings), deciding(options)
    if not options.gist:
        return Task(settings, recorded)
    from surgeon.gist.training import GistTask

    return GistTask(settings=settings, recorded=recorded, source=source, gist=options.of(GistSettings))


def _check_places(target: Path, run_dir: Path) -> None:
    """Raise OutputError for places that would fail only at the end, after hours of training."""
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
    if source.config.get("quantization_config") is not None:
        raise MeasureError(
            f"{source.label} is quantized; what is trained are weights as numbers",
            hint="Train the unquantized checkpoint; --qlora quantizes it while it trains.",
        )
    return source


def default_output(source: Source) -> str:
    """Return the default name of the result: the model's name, and the verb."""
    label = Path(source.label)
    return f"{label.name or label.resolve().name or 'model'}-finetune"
