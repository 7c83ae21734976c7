"""The checkpoints whose gradients are taken: of a run's directory, or models of one training."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from surgeon.attribution.scoring import Snapshot
from surgeon.checkpoint.source import Source
from surgeon.errors import PlanError
from surgeon.models.loading import libraries_fail, quiet_transformers
from surgeon.train.arguments import RunArguments
from surgeon.train.checkpoints import OPTIMIZER, check, checkpoints, step_of
from surgeon.train.model import load_trainable, trained_model
from surgeon.train.run_dir import read_metrics
from surgeon.train.settings import Settings
from surgeon.train.task import Task
from surgeon.train.teacher import Teacher

SQUARES = "exp_avg_sq"  # of torch's Adam: the mean of squared gradients
Loaded = Callable[[], Any]


def of_models(sources: Sequence[Source], task: Task, teacher: Teacher | None) -> list[Snapshot]:
    """Return the snapshots of models that are stored as checkpoints, each as it is."""
    return [Snapshot(source.label, loading(source, task, teacher)) for source in sources]


def of_run(run_dir: Path, source: Source, task: Task, teacher: Teacher | None, *, device: str) -> list[Snapshot]:
    """Return the snapshots of a run that began with `source`: its checkpoints, each with its learning rate.

    Raises PlanError where there is none, DamagedCheckpointError for one that is damaged.
    """
    found = checkpoints(run_dir)
    if not found:
        raise PlanError(
            f"{run_dir} holds no checkpoint",
            hint="Name the model that the run wrote, or run it with --keep-checkpoints 4.",
        )
    rates = {line["step"]: line["learning_rate"] for line in read_metrics(run_dir) if "learning_rate" in line}
    snapshots = []
    for checkpoint in found:
        check(checkpoint)
        how = (task.settings, device)
        load = partial(_restored, checkpoint, loading(source, task, teacher), *how)
        second = partial(_second, checkpoint, *how) if (checkpoint / OPTIMIZER).is_file() else None
        rate = float(rates.get(step_of(checkpoint), 0.0))
        snapshots.append(Snapshot(checkpoint.name, load, rate, second))
    if not any(snapshot.weight for snapshot in snapshots):  # the last step of a schedule has a rate of 0
        return [replace(snapshot, weight=1.0) for snapshot in snapshots]
    return snapshots


def loading(source: Source, task: Task, teacher: Teacher | None) -> Loaded:
    """Return a function that loads the model as a run begins with it, in float32, its loss attached."""
    return lambda: trained_model(load_trainable(source, task, precision="float32"), source, task, teacher)


def mean_squares(model: Any, optimizer: Any) -> dict[str, torch.Tensor]:
    """Return Adam's mean squares of the gradient of each trained parameter, corrected for their start at zero.

    Raises PlanError for another optimiser.
    """
    found = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if SQUARES not in state or "betas" not in group:
                raise PlanError(
                    f"{type(optimizer).__name__} does not keep the squares of gradients that less divides by",
                    hint="Use --method trak or cosine; to select, train with --optim adamw_torch or --select-by bm25.",
                )
            found[id(parameter)] = state[SQUARES] / (1 - group["betas"][1] ** float(state["step"]))
    return {name: found[id(parameter)] for name, parameter in model.named_parameters() if id(parameter) in found}


def _restored(checkpoint: Path, begin: Loaded, settings: Settings, device: str) -> Any:
    """Return the model with a checkpoint's weights, or its adapters."""
    model = begin()
    with _reading(checkpoint, model, settings, device) as trainer:
        trainer._load_from_checkpoint(str(checkpoint))
    return model


def _second(checkpoint: Path, settings: Settings, device: str, model: Any) -> dict[str, torch.Tensor]:
    """Return the mean squares in a checkpoint's optimiser."""
    with _reading(checkpoint, model, settings, device) as trainer:
        optimizer = trainer.create_optimizer()
        optimizer.load_state_dict(torch.load(checkpoint / OPTIMIZER, map_location="cpu", weights_only=True))
    return mean_squares(model, optimizer)


@contextmanager
def _reading(checkpoint: Path, model: Any, settings: Settings, device: str) -> Iterator[Any]:
    """Yield a Trainer of transformers that reads a checkpoint, as a run that is resumed reads it."""
    hint = "Was it written by the versions of torch and transformers that are here?"
    failing = libraries_fail(f"cannot read {checkpoint}", hint=hint)
    with tempfile.TemporaryDirectory() as directory, failing, quiet_transformers():
        arguments = RunArguments(
            output_dir=directory,
            optim=settings.optim,
            weight_decay=settings.weight_decay,
            use_cpu=device == "cpu",
            report_to="none",
            disable_tqdm=True,
            log_level="error",
            gpu=device if device.startswith("cuda:") else None,
        )
        yield Trainer(model=model, args=arguments)
