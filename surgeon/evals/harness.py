"""The tasks of lm-evaluation-harness, which runs as a process of its own and leaves a file of results."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any

from surgeon import text
from surgeon.checkpoint.source import Source, open_source
from surgeon.errors import MeasureError, PlanError
from surgeon.evals.compare import Estimate, recovery
from surgeon.evals.table import markdown, plus_minus, short

COMMAND = "lm-eval"
INSTALL_HINT = 'pip install "surgeon[eval]"'
LAST_LINES = 30  # of what the harness says are kept, to tell why it failed


@dataclass(frozen=True)
class TaskEvaluation:
    """What lm-evaluation-harness found: by task and metric (its names, "acc" or "acc,strict-match") a value and its
    standard error, None where it gives none; and of `lower` whether less is better.
    """

    model: str
    scores: Mapping[str, Mapping[str, Estimate]]
    baseline: str | None
    baseline_scores: Mapping[str, Mapping[str, Estimate]]
    lower: frozenset[tuple[str, str]]
    seconds: float

    @property
    def recovery(self) -> dict[str, dict[str, float | None]]:
        """How much of the baseline is there, in percent, by task and metric; {} without a baseline.

        100 · value / baseline, and 100 · baseline / value where the harness says that less is better.
        """
        return {
            task: {
                name: recovery(
                    found.value,
                    self.baseline_scores[task][name].value,
                    higher_is_better=(task, name) not in self.lower,
                )
                for name, found in metrics.items()
                if name in self.baseline_scores[task]
            }
            for task, metrics in self.scores.items()
            if task in self.baseline_scores
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the evaluation as `--json` prints it."""
        result: dict[str, Any] = {"metric": "tasks", "model": self.model, "tasks": _entries(self.scores)}
        if self.baseline is not None:
            result["baseline"] = {"model": self.baseline, "tasks": _entries(self.baseline_scores)}
            result["recovery"] = self.recovery
        return result | {"seconds": round(self.seconds, 3)}

    def to_text(self) -> str:
        """Return the evaluation for people."""
        rows = [("model", self.model)] + ([] if self.baseline is None else [("baseline", self.baseline)])
        return f"{text.table(*self._table('model', 'baseline'))}\n\n{text.rows(rows)}"

    def to_markdown(self) -> str:
        """Return the evaluation as a block for a model card."""
        table = markdown(*self._table(short(self.model), short(self.baseline or "")))
        return f"{table}\n\nMeasured with lm-evaluation-harness, through `surgeon evaluate --tasks`."

    def _table(self, model: str, baseline: str) -> tuple[list[str], list[list[str]]]:
        header = ["task", "metric", model] + ([] if self.baseline is None else [baseline, "recovery"])
        lines = []
        for task, metrics in self.scores.items():
            for name, found in metrics.items():
                better = "↓" if (task, name) in self.lower else ""
                line = [task, f"{name}{better}", plus_minus(found.value, found.error)]
                if self.baseline is not None:
                    other = self.baseline_scores.get(task, {}).get(name)
                    share = self.recovery.get(task, {}).get(name)
                    line += [
                        "" if other is None else plus_minus(other.value, other.error),
                        "" if share is None else f"{share:.2f} %",
                    ]
                lines.append(line)
        return header, lines


def evaluate_tasks(
    model: str | os.PathLike[str],
    tasks: Sequence[str],
    *,
    baseline: str | os.PathLike[str] | None = None,
    task_dir: str | os.PathLike[str] | None = None,
    samples: int | None = None,
    batch_size: int | None = None,
    chat: bool = False,
    device: str = "auto",
    revision: str | None = None,
    quiet: bool = True,
) -> TaskEvaluation:
    """Return what lm-evaluation-harness finds on its tasks, or on those of the files in `task_dir`.

    `samples` is how many records of a task are taken, `chat` applies the chat template. The harness loads the model
    itself, in the precision in which it is stored. Without `quiet` what it says is passed on to standard error.
    Raises MeasureError where it is not installed, fails, or leaves no results; PlanError for a task_dir that is none.
    """
    began = monotonic()
    if not tasks:
        raise PlanError("no task is named", hint="Name some: --tasks arc_easy,boolq")
    if task_dir is not None and not Path(task_dir).is_dir():
        raise PlanError(f"no such directory: {task_dir}", hint="--task-dir is a directory with task files (.yaml).")
    program = _program()
    options = ["--tasks", ",".join(tasks), "--batch_size", str(batch_size or 1)]
    options += [] if task_dir is None else ["--include_path", str(Path(task_dir).absolute())]
    options += [] if samples is None else ["--limit", str(samples)]
    options += ["--apply_chat_template"] if chat else []
    if device != "auto":
        options += ["--device", device]
    sources = [open_source(model, revision=revision)] + ([] if baseline is None else [open_source(baseline)])
    found = [
        _run(program, source, revision if number == 0 else None, options, quiet=quiet)
        for number, source in enumerate(sources)
    ]
    scores = [_scores(results, source.label) for results, source in zip(found, sources, strict=True)]
    better = found[0].get("higher_is_better", {})
    lower = {
        (task, name)
        for task, metrics in scores[0].items()
        for name in metrics
        if better.get(task, {}).get(name.partition(",")[0]) is False
    }
    labels = [source.label for source in sources]
    return TaskEvaluation(
        model=labels[0],
        scores=scores[0],
        baseline=labels[1] if baseline is not None else None,
        baseline_scores=scores[1] if baseline is not None else {},
        lower=frozenset(lower),
        seconds=monotonic() - began,
    )


def _program() -> str:
    """Return the harness's command: the one on PATH, or the one beside this interpreter."""
    found = shutil.which(COMMAND) or shutil.which(COMMAND, path=Path(sys.executable).parent)
    if found is None:
        raise MeasureError("lm-evaluation-harness is not installed: there is no command lm-eval", hint=INSTALL_HINT)
    return found


def _run(program: str, source: Source, revision: str | None, options: Sequence[str], *, quiet: bool) -> dict[str, Any]:
    """Return the results that one run of the harness leaves."""
    with TemporaryDirectory(prefix="surgeon-lm-eval-") as scratch:
        name = source.label if source.origin is None else str(source.origin.absolute())
        if "," in name:  # separates arguments there
            Path(scratch, "model").symlink_to(name)
            name = str(Path(scratch, "model"))
        arguments = f"pretrained={name}" + ("" if revision is None else f",revision={revision}")
        results = Path(scratch, "results")
        command = [program, "run", "--model", "hf", "--model_args", arguments, *options, "--output_path", str(results)]
        code, last = _listened(command, quiet=quiet)
        files = sorted(results.rglob("results*.json"))
        if code or not files:
            said = next((line for line in reversed(last) if line.strip()), "it says nothing")
            failed = f"fails with exit code {code}" if code else "leaves no results"
            raise MeasureError(
                f"lm-eval {failed} on {source.label}: {said.strip()}",
                hint="The tasks that it knows: lm-eval ls tasks. Without -q it is heard in full.",
            )
        try:
            content = json.loads(files[-1].read_text(encoding="utf-8"))
        except ValueError as error:
            raise MeasureError(f"lm-eval leaves results that are no JSON: {error}", hint=INSTALL_HINT) from error
        if not isinstance(content, dict):
            raise MeasureError("lm-eval leaves results that are no object", hint=INSTALL_HINT)
        return content


def _listened(command: Sequence[str], *, quiet: bool) -> tuple[int, list[str]]:
    """Run a process and return its exit code and its last lines; unless `quiet` they are passed on as they come."""
    last: deque[str] = deque(maxlen=LAST_LINES)
    process = subprocess.Popen(  # noqa: S603  # no shell, and the program is named by us
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace"
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            last.append(line)
            if not quiet:
                sys.stderr.write(line)
        return process.wait(), list(last)
    finally:
        process.stdout.close()
        if process.poll() is None:  # Ctrl-C, or a terminal that is gone
            process.terminate()
            process.wait()


def _scores(results: Mapping[str, Any], label: str) -> dict[str, dict[str, Estimate]]:
    """Return the values and errors of every task and group; a metric's filter is named where it is not "none"."""
    scores: dict[str, dict[str, Estimate]] = {}
    for task, entries in results.get("results", {}).items():
        for key, value in entries.items():
            metric, _, chosen = key.partition(",")
            if not chosen or metric.endswith("_stderr") or type(value) not in (int, float):
                continue
            error = entries.get(f"{metric}_stderr,{chosen}")
            known = type(error) in (int, float) and math.isfinite(error)
            name = metric if chosen == "none" else key
            scores.setdefault(task, {})[name] = Estimate(float(value), float(error) if known else None)
    if not scores:
        raise MeasureError(f"lm-eval scores nothing on {label}", hint="The tasks that it knows: lm-eval ls tasks")
    return scores


def _entries(scores: Mapping[str, Mapping[str, Estimate]]) -> dict[str, Any]:
    return {
        task: {
            name: {"value": found.value if math.isfinite(found.value) else None, "error": found.error}
            for name, found in metrics.items()
        }
        for task, metrics in scores.items()
    }
