"""What happens in a run, told to everyone: metrics.jsonl, status.json, the guard, and whoever watches."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from surgeon.errors import SurgeonError
from surgeon.train.launch import is_first
from surgeon.train.pace import Meter
from surgeon.train.run_dir import EvalReport, MetricsLog, State, StepReport, Watcher, read_metrics, write_status
from surgeon.train.trainer import Evaluated

GAP = 0.2  # nats; the paper calls a set large enough where (train - validation)² stays below 0.04 at the best step
RISES = 3  # in a row; one or two are what small validation sets do by chance
# Below half the validation loss the trained text is known, not guessed: a small model on 300 lines of question
# formation had 0.30 against 1.98 nats after 600 steps, on lines enough 0.997 against 0.993. A share, and not so many
# nats, because what 0.5 nats mean depends on the text; and only with the gap, because near 0 a share is all noise.
COLLAPSE = 0.5


class Guard:
    """Judges the evaluations of one run, told in order. Each warning comes once."""

    def __init__(self) -> None:
        self._first: tuple[float, float] | None = None  # probe and validation at the start
        self._best: tuple[float, int] | None = None  # the lowest validation loss, and its step
        self._last: float | None = None
        self._rises = 0
        self._warned: set[str] = set()

    @classmethod
    def resumed(cls, records: Iterable[Mapping[str, Any]]) -> "Guard":
        """Return a guard that has seen the evaluations in the records of metrics.jsonl, and warned of them."""
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
        """Return the warnings that an evaluation gives rise to, a sentence each; the losses are in nats a token."""
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
        """Return warnings from both losses, against what they were at the start: either text may be the easier one.

        Held-out text must have come to cost more both beside the gap of the start and beside its ratio: where both
        losses fall to a half, as they do while a model learns a new form, a gap halves too, and nothing is memorised.
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


NOTHING_LOGGED = frozenset({"loss", "learning_rate", "grad_norm", "tokens", "epoch"})  # under these names elsewhere


class Reporter:
    """Tells the first process's steps and evaluations. Other processes have one too; it tells nothing.

    `losses` are the cross-entropies of this process's steps and `evaluations` all evaluations of the run, those before
    a resume included.
    """

    def __init__(self, run_dir: Path, watcher: Watcher | None) -> None:
        self.run_dir, self.watcher = run_dir, watcher if is_first() else None
        self.losses: list[float] = []
        self.evaluations: list[Evaluated] = []
        self.notes: list[str] = []
        self._guard, self._step, self._tokens = Guard(), 0, 0  # tokens of the whole run
        self._log: MetricsLog | None = None
        self._meter: Meter | None = None

    def status(self, state: State, **facts: Any) -> None:
        """Say in status.json what the run does."""
        if is_first():
            write_status(self.run_dir, state, step=self._step, **facts)

    def note(self, text: str) -> None:
        """Say a sentence, once."""
        if text not in self.notes:
            self.notes.append(text)
            if self.watcher is not None:
                self.watcher.note(text)

    def begin(self, *, steps: int, step: int, tokens: int, meter: Meter) -> None:
        """Know that steps begin, after `step` ones of a run that is resumed: what was told of later ones is dropped."""
        self._step, self._tokens, self._meter = step, tokens, meter
        if is_first():
            self._log = MetricsLog(self.run_dir)
            self._log.resume_at(step)
            for record in read_metrics(self.run_dir):
                if "eval_loss" in record or "probe_loss" in record:
                    found = Evaluated(record["step"], record.get("eval_loss"), record.get("probe_loss"))
                    self.evaluations.append(found)
            self._guard = Guard.resumed(read_metrics(self.run_dir))
        self.status("running")
        if self.watcher is not None:
            self.watcher.begin(steps, done=step)

    def step(self, logs: dict[str, float]) -> None:
        """Tell a step: what the trainer logs of it."""
        assert self._meter is not None
        self._step, self._tokens = int(logs["step"]), int(logs["tokens"])
        pace = self._meter.step(self._step, self._tokens)
        self.losses.append(logs["cross_entropy"])
        report = StepReport(
            step=self._step,
            tokens=self._tokens,
            loss=logs["loss"],
            learning_rate=logs["learning_rate"],
            grad_norm=logs.get("grad_norm"),
            tokens_per_second=pace.tokens_per_second,
            mfu=pace.mfu,
            memory=pace.memory,
            seconds_left=pace.seconds_left,
        )
        if self._log is not None:
            parts = {name: value for name, value in logs.items() if name not in NOTHING_LOGGED}
            self._log.write(report.to_record() | parts)
        if self.watcher is not None:
            self.watcher.step(report)

    def evaluated(self, found: Evaluated) -> None:
        """Tell an evaluation, and what the guard thinks of it."""
        self.evaluations.append(found)
        report = EvalReport(step=found.step, tokens=self._tokens, validation=found.validation, probe=found.probe)
        if self._log is not None:
            self._log.write(report.to_record())
        if self.watcher is not None:
            self.watcher.evaluated(report)
        for warning in self._guard.observe(found.step, found.probe, found.validation):
            self.note(warning)

    @property
    def last_step(self) -> int:
        """How many steps of the run are done."""
        return self._step

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Return a context whose time is not that of steps."""
        assert self._meter is not None
        with self._meter.paused():
            yield

    @property
    def tokens_per_second(self) -> float | None:
        """How fast the steps of this process were, on all devices together."""
        return None if self._meter is None else self._meter.average

    def end(self) -> None:
        """Know that no step follows."""
        if self.watcher is not None:
            self.watcher.end()
        if self._log is not None:
            self._log.close()
            self._log = None

    def failed(self, error: BaseException) -> None:
        """Say how the run ended, where it did not end well."""
        self.end()
        code = error.code if isinstance(error, SystemExit) else 130 if isinstance(error, KeyboardInterrupt) else 1
        hint = error.hint if isinstance(error, SurgeonError) else None
        self.status("failed", exit_code=code, error=str(error) or type(error).__name__, hint=hint)

    def validations(self) -> Sequence[float]:
        """Return the validation losses so far."""
        return [found.validation for found in self.evaluations if found.validation is not None]
