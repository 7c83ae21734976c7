"""The files of a run's directory: the request, metrics.jsonl with a line per report, and status.json with the state.

metrics.jsonl has one JSON object per line, each with its "step". A line with "loss" is of training, one with
"eval_loss" of an evaluation; both are the same quantity, for language models the cross-entropy. With a teacher "kl",
"hidden" and "objective", which is minimised, stand beside it. JSON has no NaN: a number that is not finite is null, and
named under "not_finite".
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Protocol, TextIO

from surgeon.checkpoint.header import not_regular
from surgeon.checkpoint.json_files import read_json as parsed_file
from surgeon.checkpoint.output import write_whole
from surgeon.checkpoint.receipt import to_bytes
from surgeon.checkpoint.source import RECEIPT
from surgeon.errors import CheckpointError, DataError, OutputError, PlanError
from surgeon.mistyped import hint_beside

METRICS, STATUS = "metrics.jsonl", "status.json"
NOT_FINITE = "not_finite"
State = Literal["preparing", "running", "done", "stopped", "failed"]
MetricsRecord = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """The numbers of a training step, or the means of a few.

    `loss` is the cross-entropy in nats per trained token, or the loss of another task in its unit: the quantity that
    evaluations have too. With a teacher, `kl` is the divergence, also in nats per trained token, `hidden` the error of
    hidden states, and `objective` the mix of all that is minimised; without one they are None.
    """

    step: int
    tokens: int  # read since the run began
    loss: float
    learning_rate: float
    objective: float | None = None
    kl: float | None = None
    hidden: float | None = None
    grad_norm: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None  # a part of the peak, 0 to 1; None where the peak is not known
    memory: int | None = None  # bytes, the most so far
    seconds_left: float | None = None
    epoch: float | None = None  # passes over the data so far

    def to_record(self) -> dict[str, Any]:
        """Return the record of this step in metrics.jsonl."""
        fields = {name: getattr(self, name) for name in _STEP_KEYS}
        return {name: value for name, value in fields.items() if value is not None}


PARTS = ("kl", "hidden")  # of the objective of a run with a teacher, beside the cross-entropy
_STEP_KEYS = (
    *("step", "tokens", "loss", "objective", *PARTS, "learning_rate", "grad_norm"),
    *("tokens_per_second", "mfu", "memory", "epoch"),
)
_NUMBERS = (*_STEP_KEYS, "eval_loss", "eval_loss_error", "probe_loss", "cross_entropy")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalReport:
    """The losses of an evaluation, in nats per token: of held-out rows, and of a fixed sample of trained rows.

    `error` is the standard error of the validation loss as an estimate of that of all such text. The difference of two
    evaluations of one run, which are on the same rows, has a much smaller one.
    """

    step: int
    tokens: int
    validation: float | None
    probe: float | None = None
    error: float | None = None

    def to_record(self) -> dict[str, Any]:
        """Return the record of this evaluation in metrics.jsonl."""
        losses = {"eval_loss": self.validation, "eval_loss_error": self.error, "probe_loss": self.probe}
        known = {name: loss for name, loss in losses.items() if loss is not None}
        return {"step": self.step, "tokens": self.tokens} | known


class TrainingWatcher(Protocol):
    """Shows the progress of a training run, on a terminal for example."""

    def begin(self, total_steps: int, *, done: int = 0) -> None:
        """Begin a run of `total_steps` steps, `done` of which an earlier process did."""

    def step(self, report: StepReport) -> None:
        """Show a step."""

    def evaluated(self, report: EvalReport) -> None:
        """Show an evaluation."""

    def note(self, text: str) -> None:
        """Show a sentence, such as a warning."""

    def end(self) -> None:
        """Close the display when training has ended, in whatever way. May be called twice."""


class MetricsLog:
    """The metrics.jsonl of a run. Each line has been flushed when `write` returns."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / METRICS
        self._file = self._open()

    def write(self, record: MetricsRecord) -> None:
        """Append a record, which has at least a "step". Raises OutputError when the disk is full or refuses."""
        assert isinstance(record["step"], int), "a record without its step cannot be dropped when a run resumes"
        with _guarded(self._path):
            self._file.write(_to_json(record) + "\n")
            self._file.flush()

    def resume_at(self, step: int) -> None:
        """Drop the records after `step` and an incomplete last line: the resumed run writes them again."""
        self.close()
        earlier = [record for record in _records(self._path) if record["step"] <= step]
        with _guarded(self._path):
            write_whole(self._path, (f"{_to_json(record)}\n".encode() for record in earlier))
        self._file = self._open()

    def close(self) -> None:
        """Close the file."""
        with _guarded(self._path):
            self._file.close()

    def _open(self) -> TextIO:
        with _guarded(self._path):
            return self._path.open("a", encoding="utf-8")


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Return the records of a run directory, or of its metrics.jsonl, in order, without an incomplete last line.

    Raises DataError where there is no run, and for a damaged file, naming file and line.
    """
    path = run / METRICS if run.is_dir() else run
    if not path.is_file():
        message = f"{run} has no {METRICS}" if run.is_dir() else f"no such run: {run}"
        hint = "Name the directory of a run: OUT.run, or the one of --run-dir."
        raise DataError(message, hint=hint if run.is_dir() else hint_beside(run, hint))
    return _records(path)


def write_status(run_dir: Path, state: State, **facts: Any) -> None:
    """Replace status.json: the state, the time, and facts such as step, exit_code, error."""
    content = {"state": state, "updated": datetime.now(UTC).isoformat(timespec="seconds"), "pid": os.getpid()} | facts
    path = run_dir / STATUS
    with _guarded(path):
        write_whole(path, [f"{_to_json(content, indent=1)}\n".encode()])


def write_done(run_dir: Path, *, output: Path, summary: Mapping[str, Any], **facts: Any) -> None:
    """Write into status.json that the run is done, with its summary and the identity of its output."""
    write_status(run_dir, "done", output=str(output), receipt=_receipt_of(output), summary=summary, **facts)


def summary_of(run_dir: Path, output: Path) -> dict[str, Any] | None:
    """Return the summary of a run that is done, and whose output is still there; None for any other."""
    try:
        status = json.loads((run_dir / STATUS).read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(status, dict) or status.get("state") != "done" or status.get("receipt") is None:
        return None
    summary = status.get("summary")
    return summary if isinstance(summary, dict) and status["receipt"] == _receipt_of(output) else None


def write_result(
    run_dir: Path, *, source: Mapping[str, Any], step: Mapping[str, Any], summary: Mapping[str, Any]
) -> None:
    """Write what the output will be: its source, the step of its receipt, and the summary of the run.

    By it a resumed run knows its own output, where it was killed between writing that and its last status.
    """
    write_json(run_dir / RESULT, {"source": source, "step": step, "summary": without_nan(summary)})


def written_by(run_dir: Path, output: Path) -> dict[str, Any] | None:
    """Return the summary of the run that wrote `output`, by the output's receipt; None where another one wrote it."""
    try:
        result, receipt = (json.loads(file.read_bytes()) for file in (run_dir / RESULT, output / RECEIPT))
        told = (receipt["source"], receipt["steps"][-1]["finetune"])
        summary = result["summary"] if told == (result["source"], result["step"]) else None
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return None
    return summary if isinstance(summary, dict) else None


def without_nan(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return a summary with None in place of numbers that JSON does not have."""
    return {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in summary.items()}


def _receipt_of(output: Path) -> str | None:
    """Return the SHA-256 of an output's receipt, which tells one result from another; None where there is none."""
    try:
        return hashlib.sha256((output / RECEIPT).read_bytes()).hexdigest()
    except OSError:
        return None


def _records(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", hint=f"Look at it: ls -l {path}") from error
    whole = [line for line in lines if line.endswith("\n")]  # not so where a run was killed, or is writing now
    records = [_from_json(line, f"{path}:{number}") for number, line in enumerate(whole, start=1)]
    for number, record in enumerate(records, start=1):
        if type(record.get("step")) is not int:
            raise DataError(f"{path}:{number}: a record without its step", hint="Is this a metrics.jsonl of surgeon?")
        if wrong := next((key for key in _NUMBERS if not isinstance(record.get(key), int | float | None)), None):
            raise DataError(f"{path}:{number}: {wrong!r} is no number", hint="Is this a metrics.jsonl of surgeon?")
    return [_as_now(record) for record in records]


def _as_now(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record of an older surgeon in today's words: its "loss" was the objective, beside "cross_entropy"."""
    if "cross_entropy" not in record or "loss" not in record:
        return record
    objective = {"objective": record["loss"]} if any(part in record for part in PARTS) else {}
    kept = {name: value for name, value in record.items() if name != "cross_entropy"}
    return kept | {"loss": record["cross_entropy"]} | objective


def _to_json(record: MetricsRecord, *, indent: int | None = None) -> str:
    not_finite = {
        name: str(value) for name, value in record.items() if isinstance(value, float) and not math.isfinite(value)
    }
    plain = {name: None if name in not_finite else value for name, value in record.items()}
    return json.dumps(plain | ({NOT_FINITE: not_finite} if not_finite else {}), allow_nan=False, indent=indent)


def _from_json(text: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
        if not isinstance(record, dict):
            raise ValueError("not an object")
        return record | {name: float(value) for name, value in record.pop(NOT_FINITE, {}).items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{where}: {error}", hint="The file is damaged; remove that line.") from error


@contextmanager
def _guarded(path: Path) -> Iterator[None]:
    """Raise OutputError in place of the system's error."""
    try:
        yield
    except OSError as error:
        hint = "Free some space, or choose another place with --run-dir."
        raise OutputError(f"cannot write {path}: {error.strerror}", hint=hint) from error


REQUEST = "run.json"
BATCH = "batch.json"  # the batches of a step, as they were chosen
RATE = "lr.json"  # the result of --lr auto
DAMAGED_HINT = "Remove the run's directory, or choose another with --run-dir."
SELECTED = "selected.json"  # the rows that --select chose
RESULT = "result.json"  # what the run is about to write as its output
WEIGHTS = ".weights"  # trained weights, until the output is written
TRAINED, HELD_OUT, TEACHER = "data", "eval", "teacher"  # directories of tokens, and of a teacher's answers
DATA = "data.json"  # the data of the run: a resumed run must read the same


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a run is asked for. A resumed run has the same model, data and settings; `others` it takes where not given.

    `settings` decide numbers of the result, `others` do not: the output, the device, the size of a shard.
    """

    model: Mapping[str, Any]
    data: Sequence[str]
    settings: Mapping[str, Any]
    others: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the request as run.json holds it."""
        settings, others = dict(self.settings), dict(self.others)
        return {"model": dict(self.model), "data": list(self.data), "settings": settings, "others": others}


def begun(run_dir: Path) -> Request | None:
    """Return the request of the run in a directory; None where there is none, or one that failed before its first step.

    Raises OutputError for a damaged one.
    """
    file = run_dir / REQUEST
    _check_regular(run_dir)
    if not file.is_file() or not (run_dir / METRICS).exists():
        return None
    content = read_json(file)
    kinds = {"model": dict, "data": list, "settings": dict, "others": dict}
    if not isinstance(content, dict) or not all(isinstance(content.get(key), kind) for key, kind in kinds.items()):
        raise OutputError(f"{file} is damaged: it holds no request of a run", hint=DAMAGED_HINT)
    return Request(**{key: content[key] for key in kinds})


def check_same(run_dir: Path, request: Request) -> None:
    """Raises PlanError where the run in a directory began with another request, naming the first difference."""
    if differs := _difference(read_json(run_dir / REQUEST), json.loads(to_bytes(request.to_dict()))):
        name, was, now = differs
        begun_with = f"with {name} {_brief(was)}" if was not in (None, "") else f"without {name}"
        raise PlanError(
            f"the run in {run_dir} began {begun_with}, and {_brief(now) or 'none'} is asked for now",
            hint="Resume it with what it began with, or begin anew with another --run-dir.",
        )


def _brief(value: Any) -> Any:
    """Return what tells a value from another in a message: of a model its id, or its path."""
    if not isinstance(value, dict):
        return value
    place = value.get("id") or value.get("path") or value
    return f"{place} at {value['commit']}" if "commit" in value else place


def claim(run_dir: Path, request: Request, *, resume: bool) -> None:
    """Write the request into an empty directory, or check that the run in it began with the same request.

    A run that failed before its first step, without data for example, does not count: the new request replaces it.
    Raises OutputError for a directory that holds a run without `resume`, or other files; PlanError for another run.
    """
    _check_regular(run_dir)
    file = run_dir / REQUEST
    if not file.exists():
        if any(not path.name.startswith(".") for path in run_dir.iterdir()):
            raise OutputError(f"{run_dir} is not empty, and holds no run", hint="Choose another place with --run-dir.")
        write_json(file, request.to_dict())
        return
    if not (run_dir / METRICS).exists():
        for name in (RATE, DATA, BATCH, SELECTED):
            (run_dir / name).unlink(missing_ok=True)
        write_json(file, request.to_dict())
        return
    if not resume:
        hint = "Continue it with --resume, remove it, or choose another place with --run-dir."
        raise OutputError(f"{run_dir} holds a run", hint=hint)
    check_same(run_dir, request)


def _check_regular(run_dir: Path) -> None:
    """Raises OutputError where a file of the run is a pipe, a device or the like: reading one may never end."""
    paths = sorted(run_dir.iterdir()) if run_dir.is_dir() else []
    if odd := next((path for path in paths if path.exists() and not_regular(path)), None):
        raise OutputError(f"{odd} is {not_regular(odd)}, not a file", hint="Remove it, or choose another --run-dir.")


def read_json(file: Path) -> Any:
    """Return the content of a run's JSON file. Raises OutputError for a damaged one."""
    try:
        return parsed_file(file)
    except CheckpointError as error:
        raise OutputError(f"the run's directory is damaged: {error}", hint=DAMAGED_HINT) from error


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a run's JSON file, whole or not at all."""
    with _guarded(file):
        write_whole(file, [to_bytes(content)])


def _difference(before: Any, now: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """Return the first difference between two requests: its name, and both values."""
    if not isinstance(before, dict) or not isinstance(before.get("settings"), dict):
        return "a request", before, "this one"
    flat = [
        {f"the {key}": content.get(key) for key in ("model", "data")}
        | {f"--{name.replace('_', '-')}": value for name, value in content["settings"].items()}
        for content in (before, now)
    ]
    old, new = flat
    return next(((name, old.get(name), value) for name, value in new.items() if old.get(name) != value), None)
