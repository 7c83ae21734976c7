"""The run that trains the operator of a growth: the small model stands still, the loss is the large model's."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from surgeon.checkpoint.source import Source
from surgeon.errors import DataError
from surgeon.growth.operator import Operator
from surgeon.models.skeleton import build_skeleton
from surgeon.plan.operators import PREFIX
from surgeon.plan.plan import Plan
from surgeon.plan.planned import PlannedSource
from surgeon.progress import stage
from surgeon.train.data import RunData
from surgeon.train.objective import Objective
from surgeon.train.run_dir import Request
from surgeon.train.runner import Runner
from surgeon.train.task import Task
from surgeon.train.trainer import EvalLosses
from surgeon.transforms.learned import Learned


@dataclass(frozen=True, eq=False)
class LearnedOperator:
    """The learned tensors after a run, None for one that was stopped, and what the run says of itself.

    `held_out` are the evaluations before the first step and after the last one, of the same rows.
    """

    tensors: Mapping[str, Tensor] | None
    steps: int
    tokens: int
    held_out: tuple[EvalLosses, EvalLosses]
    data: list[dict[str, Any]]
    settings: Mapping[str, Any]
    notes: tuple[str, ...]


def train_operator(
    source: Source,
    exact: Plan,
    learned: Learned,
    task: Task,
    data: tuple[str, ...],
    *,
    request: Request,
    run_dir: Path,
    device: str,
) -> LearnedOperator:
    """Return the operator of a growth after its training on `data`, in a directory in which a killed run goes on.

    `exact` is the plan of the exact growth of `source`, `learned` what can be learned of it.

    Raises DataError where no text is held out, TrainingError for a run that diverges, OutputError and PlanError as any
    run does.
    """
    runner = _GrowthRunner(source, exact, learned, data, task, run_dir=run_dir, device=device)
    with runner.held(request, resume=True):
        trained = runner.fit()
        if trained.is_stopped:
            runner.stopped(trained)
        else:
            runner.reporter.status("done")
    evaluated = [losses for losses in runner.reporter.evaluations if losses.validation is not None]
    return LearnedOperator(
        tensors=None if trained.is_stopped else runner.operator.tensors(),
        steps=trained.steps,
        tokens=trained.tokens,
        held_out=(evaluated[0], evaluated[-1]),
        data=runner.provenance,
        settings={"learning_rate": runner.rate, **runner.batches.settings()},
        notes=tuple(runner.reporter.notes),
    )


class _OperatorTask(Task):
    """A language model's task, of whose activations none is computed twice: its weights are gone by then."""

    @property
    def can_recompute(self) -> bool:
        return False


def growth_task(task: Task) -> Task:
    """Return a task with what an operator cannot do left out."""
    return _OperatorTask(task.settings, task.recorded) if type(task) is Task else task


class _GrowthRunner(Runner):
    """A run whose model is an operator. Its source is the grown model, which is on no disk."""

    def __init__(
        self, source: Source, exact: Plan, learned: Learned, data: tuple[str, ...], task: Task, **options: Any
    ) -> None:
        super().__init__(PlannedSource(source, exact), data, growth_task(task), **options)
        self._small, self._exact, self._learned = source, exact, learned

    def _loaded(self) -> Any:
        kind = self.task.kind(self.source)
        if kind is None and self.source.config.get("is_encoder_decoder"):
            from transformers import AutoModelForSeq2SeqLM

            kind = AutoModelForSeq2SeqLM
        with stage("growing the model"):
            self.operator = Operator(
                self._small,
                self._exact,
                self._learned,
                PREFIX,
                lambda dtype: build_skeleton(self.source, dtype, kind),
                seed=self.settings.seed,
            )
        self.operator.model.config.use_cache = False
        return self.operator.model

    def _trained(self, model: Any, teacher: Any) -> Any:
        self.task.attach(model, Objective.of(self.settings, kd_weight=0.0, layer_map=None), None)
        plan = model.__dict__["_surgeon_plan"]
        self.operator.__dict__["_surgeon_plan"] = plan
        return self.operator

    def _check_data(self, data: RunData, *, resumed: bool) -> None:
        if "validation" not in data.held_out:
            raise DataError(
                "no text is held out, and what was learned is judged on text that was not trained on",
                hint="Give one: --eval-data FILE.",
            )
        super()._check_data(data, resumed=resumed)
