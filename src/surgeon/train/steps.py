"""The steps of a run, carried out by the trainer, and what came of them."""

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from surgeon.models.loading import quiet_transformers
from surgeon.train import checkpoints
from surgeon.train.arguments import arguments, check_optimizer
from surgeon.train.data import RunData
from surgeon.train.reporter import Reporter
from surgeon.train.settings import Settings
from surgeon.train.trainer import Control, DivergedError, EvalLosses, Stop, SurgeonTrainer

KEPT = 2  # checkpoints of a run that is not finished: the newest may prove damaged


@dataclass(frozen=True)
class TrainedSteps:
    """The steps of the whole run. Losses are in nats per token; those of training are over the last tenth of the steps.

    `train_loss` and `eval_loss` are cross-entropies, with their standard errors; `train_kl` and `objective` are those
    of a run with a teacher.
    """

    steps: int
    tokens: int
    train_loss: float | None
    train_loss_error: float | None
    train_kl: float | None
    objective: float | None
    eval_loss: float | None
    eval_loss_error: float | None
    best_step: int | None
    is_stopped: bool


def run_steps(
    model: Any,
    data: RunData,
    settings: Settings,
    *,
    run_dir: Path,
    lr: float,
    steps: int,
    device: str,
    resume_from: Path | None,
    reporter: Reporter,
    stop: Stop,
) -> tuple[SurgeonTrainer, TrainedSteps]:
    """Train, and return the trainer, which holds the model, with a summary of the steps.

    Raises TrainingError for a run that diverges, OutputError for a full disk.
    """
    resumed = resume_from is not None
    trainer = SurgeonTrainer(
        model,
        arguments(settings, data, run_dir=run_dir, lr=lr, steps=steps, device=device, resumed=resumed),
        data=data,
        on_step=reporter.step,
        on_evaluation=reporter.evaluated,
        paused=reporter.paused,
        keep=settings.keep_checkpoints or KEPT,
        keep_best=settings.keep_best,
    )
    check_optimizer(trainer, settings)
    control = Control(stop, patience=settings.patience, history=reporter.validations())
    trainer.add_callback(control)
    with quiet_transformers():
        if resume_from is not None and (checkpoints.step_of(resume_from) >= steps or control.is_over):
            trainer.restore(resume_from)  # training had ended, and only the result was not written
        else:
            trainer.train(resume_from_checkpoint=str(resume_from) if resumed else None)
    tail = reporter.steps[-max(1, len(reporter.steps) // 10) :]
    train_loss, train_loss_error = _mean(tail, "loss")
    evaluated = [losses for losses in reporter.evaluations if losses.validation is not None]
    return trainer, TrainedSteps(
        steps=trainer.state.global_step,
        tokens=trainer.state.num_input_tokens_seen,
        train_loss=train_loss,
        train_loss_error=train_loss_error,
        train_kl=_mean(tail, "kl")[0],
        objective=_mean(tail, "objective")[0],
        eval_loss=evaluated[-1].validation if evaluated else None,
        eval_loss_error=evaluated[-1].error if evaluated else None,
        best_step=trainer.state.best_global_step,
        is_stopped=stop.is_requested,
    )


def _mean(steps: Sequence[Mapping[str, Any]], name: str) -> tuple[float | None, float | None]:
    """Return the mean of a number of some steps, and its standard error; None for what they do not give."""
    numbers = [float(step[name]) for step in steps if name in step]
    if not numbers:
        return None, None
    error = stdev(numbers) / math.sqrt(len(numbers)) if len(numbers) > 1 else None
    return fmean(numbers), error


def loss_after(model: Any, data: RunData, settings: Settings, *, lr: float, steps: int, device: str) -> float:
    """Return the loss of the held-out rows (without any, of trained rows) after a short run at a learning rate.

    It is infinite for a run that diverges. Nothing of the run is kept.
    """
    evaluations: list[EvalLosses] = []
    short = replace(
        settings, max_steps=steps, epochs=None, eval_every=steps, save_every=0, keep_best=False, patience=None
    )
    with tempfile.TemporaryDirectory() as directory:
        trainer = SurgeonTrainer(
            model,
            arguments(short, data, run_dir=Path(directory), lr=lr, steps=steps, device=device, resumed=True),
            data=data,
            on_step=lambda logs: None,
            on_evaluation=evaluations.append,
        )
        try:
            with quiet_transformers():
                trainer.train()
        except DivergedError:
            return math.inf
    last = evaluations[-1]
    loss = last.probe if last.validation is None else last.validation
    return math.inf if loss is None or not math.isfinite(loss) else loss
