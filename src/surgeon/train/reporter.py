"""Reports of steps and evaluations to metrics.jsonl, status.json and a watcher, with warnings of overfitting."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from surgeon.errors import SurgeonError
from surgeon.processes import is_first
from surgeon.progress import Stage, current
from surgeon.text import scrubbed
from surgeon.train.pace import PaceMeter
from surgeon.train.run_dir import (
    EvalReport,
    MetricsLog,
    State,
    StepReport,
    TrainingWatcher,
    read_metrics,
    write_status,
)
from surgeon.train.trainer import EvalLosses

GAP = 0.2  # nats; the paper calls a data set large enough where (train - validation)² < 0.04 at the best step
RISES = 3  # in a row; one or two happen by chance on small validation sets
# Below half the validation loss the model has memorised the trained text: a small model on 300 lines of question
# formation had 0.30 against 1.98 nats after 600 steps, on enough lines 0.997 against 0.993. It is a ratio, because the
# meaning of 0.5 nats depends on the text, and it needs the gap too, because near 0 a ratio is noise.
COLLAPSE = 0.5


class Guard:
    """Judges the evaluations of one run, in their order. Each warning comes once."""

    def __init__(self) -> None:
        self._first: tuple[float, float] | None = None  # probe and validation at the start
        self._best: tuple[float, int] | None = None  # the lowest validation loss, and its step
        self._last: float | None = None
        self._rises = 0
        self._warned: set[str] = set()

    @classmethod
    def resumed(cls, records: Iterable[Mapping[str, Any]]) -> "Guard":
        """Return a guard that has observed the evaluations in metrics.jsonl, and given their warnings."""
        guard = cls()
        for record in records:
            if "eval_loss" in record:
                guard.observe(record["step"], record.get("probe_loss"), record["eval_loss"])
        return guard

    @property
    def best_step(self) -> int | None:
        """The step with the lowest validation loss so far."""
        return None if self._best is None else self._best[1]

    def observe(self, step: int, probe: float | None, validation: float | None) -> list[str]:
        """Return the new warnings after an evaluation, a sentence each; the losses are in nats per token."""
        warnings: dict[str, str] = {}
        if validation is not None:
            if self._best is None or validation < self._best[0]:
                self._best = validation, step
            self._rises = self._rises + 1 if self._last is not None and validation > self._last else 0
            self._last = validation
            if self._rises >= RISES:
                warnings["rising"] = self._rising(step, validation)
            if probe is not None:
                warnings |= self._compare(step, probe, validation)
        new = {kind: text for kind, text in warnings.items() if kind not in self._warned}
        self._warned |= set(new)
        return list(new.values())

    def _rising(self, step: int, validation: float) -> str:
        assert self._best is not None
        return (
            f"validation loss has risen {self._rises} times in a row, to {validation:.3f} at step {step}; "
            f"the best was {self._best[0]:.3f} at step {self._best[1]}"
        )

    def _compare(self, step: int, probe: float, validation: float) -> dict[str, str]:
        """Return warnings from both losses, compared with those at the start: either text may be the easier one.

        The gap must have grown both absolutely and relative to the losses. When a model learns a new form both losses
        may fall to a half; then the gap halves too, and nothing is memorised.
        """
        if self._first is None:
            self._first = probe, validation
        gap = validation - probe
        grown = gap - (self._first[1] - self._first[0])
        if self._first[0] > 0:
            grown = min(grown, validation - probe * self._first[1] / self._first[0])
        if grown <= GAP:
            return {}
        warnings = {
            "gap": f"at step {step} held-out text costs {validation:.3f} nats, trained text {probe:.3f}: "
            f"{grown:.2f} more than at the start; the model begins to memorise"
        }
        usual = min(1.0, self._first[0] / self._first[1]) if self._first[1] > 0 else 1.0
        if probe < COLLAPSE * usual * validation:
            assert self._best is not None
            warnings["collapse"] = (
                f"the loss on trained text has fallen to {probe:.3f} at step {step}, that on held-out text is "
                f"{validation:.3f}: stop, the best step was {self._best[1]} ({self._best[0]:.3f})"
            )
        return warnings


class Reporter:
    """Reports the steps and evaluations of the first process; in other processes it writes and shows nothing.

    Without a watcher of its own the training is one piece of work of the call's progress.
    `steps` are the records of the run's steps, and `evaluations` its evaluations, in the first process also those
    before a resume.
    """

    def __init__(self, run_dir: Path, watcher: TrainingWatcher | None) -> None:
        self.run_dir, self.watcher = run_dir, watcher if is_first() else None
        self.steps: list[Mapping[str, Any]] = []
        self.evaluations: list[EvalLosses] = []
        self.notes: list[str] = []
        self._guard, self._step, self._tokens = Guard(), 0, 0  # tokens of the whole run
        self._log: MetricsLog | None = None
        self._meter: PaceMeter | None = None
        self._stage: Stage | None = None  # of a run without a watcher

    def status(self, state: State, **facts: Any) -> None:
        """Write the state of the run into status.json."""
        if is_first():
            write_status(self.run_dir, state, step=self._step, **facts)

    def note(self, text: str) -> None:
        """Show a sentence to the user, unless it was shown before."""
        if text not in self.notes:
            self.notes.append(text)
            if self.watcher is not None:
                self.watcher.note(text)

    def say(self, text: str) -> None:
        """Show a sentence that is of use before the run alone: its summary does not repeat it."""
        if self.watcher is not None:
            self.watcher.note(text)

    def begin(self, *, steps: int, step: int, tokens: int, meter: PaceMeter) -> None:
        """Begin the steps of a run, after `step` earlier ones; records of later steps are dropped."""
        self._step, self._tokens, self._meter = step, tokens, meter
        if is_first():
            self._log = MetricsLog(self.run_dir)
            self._log.resume_at(step)
            for record in read_metrics(self.run_dir):
                if "loss" in record:
                    self.steps.append(record)
                if "eval_loss" in record or "probe_loss" in record:
                    losses = (record.get(name) for name in ("eval_loss", "probe_loss", "eval_loss_error"))
                    self.evaluations.append(EvalLosses(record["step"], *losses))
            self._guard = Guard.resumed(read_metrics(self.run_dir))
        self.status("running")
        if self.watcher is not None:
            self.watcher.begin(steps, done=step)
        elif is_first():
            self._stage = current().begin("training", steps, "steps")
            self._stage(step)

    def step(self, logs: dict[str, float]) -> None:
        """Report a step, from the trainer's logs."""
        assert self._meter is not None
        self._step, self._tokens = int(logs["step"]), int(logs["tokens"])
        pace = self._meter.step(self._step, self._tokens)
        report = StepReport(
            step=self._step,
            tokens=self._tokens,
            loss=logs["loss"],
            objective=logs.get("objective"),
            kl=logs.get("kl"),
            hidden=logs.get("hidden"),
            learning_rate=logs["learning_rate"],
            grad_norm=logs.get("grad_norm"),
            tokens_per_second=pace.tokens_per_second,
            mfu=pace.mfu,
            memory=pace.memory,
            seconds_left=pace.seconds_left,
            epoch=logs.get("epoch"),
        )
        self.steps.append(report.to_record())
        if self._log is not None:
            self._log.write(report.to_record())
        if self.watcher is not None:
            self.watcher.step(report)
        elif self._stage is not None:
            self._stage(1)

    def evaluated(self, losses: EvalLosses) -> None:
        """Report an evaluation, and the warnings that it gives rise to."""
        self.evaluations.append(losses)
        facts = {"validation": losses.validation, "probe": losses.probe, "error": losses.error}
        report = EvalReport(step=losses.step, tokens=self._tokens, **facts)
        if self._log is not None:
            self._log.write(report.to_record())
        if self.watcher is not None:
            self.watcher.evaluated(report)
        for warning in self._guard.observe(losses.step, losses.probe, losses.validation):
            self.note(warning)

    @property
    def last_step(self) -> int:
        """How many steps of the run are done."""
        return self._step

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Return a context whose time does not count as steps."""
        assert self._meter is not None
        with self._meter.paused():
            yield

    @property
    def tokens_per_second(self) -> float | None:
        """The speed of this process's steps, on all devices together."""
        return None if self._meter is None else self._meter.average

    def end(self) -> None:
        """Close the watcher and metrics.jsonl after the last step."""
        if self.watcher is not None:
            self.watcher.end()
        if self._stage is not None:
            self._stage.done()
        if self._log is not None:
            self._log.close()
            self._log = None

    def failed(self, error: BaseException) -> None:
        """Write the error of a failed run into status.json."""
        self.end()
        code = error.code if isinstance(error, SystemExit) else 130 if isinstance(error, KeyboardInterrupt) else 1
        hint = error.hint if isinstance(error, SurgeonError) else None
        self.status("failed", exit_code=code, error=scrubbed(str(error)) or type(error).__name__, hint=hint)

    def validations(self) -> Sequence[float]:
        """Return the validation losses so far."""
        return [losses.validation for losses in self.evaluations if losses.validation is not None]
