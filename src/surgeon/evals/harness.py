"""Tasks of lm-evaluation-harness, which runs as a process of its own and writes a file of results."""

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
from surgeon.checkpoint.source import Source
from surgeon.errors import MeasureError, PlanError
from surgeon.evals.compare import Estimate, Recovery, markdown_table, short_label, unpaired
from surgeon.evals.options import MetricOptions
from surgeon.mistyped import hint_beside
from surgeon.models.loading import loadable
from surgeon.options import (
    Checked,
    OptionError,
    device_option,
    in_python,
    option,
    revision_option,
    same_option,
    trust_option,
)
from surgeon.showing import Shown
from surgeon.surgery import open_source
from surgeon.text import plus_minus

COMMAND = "lm-eval"
INSTALL_HINT = 'pip install "surgeon[eval]"'
LAST_LINES = 30  # of the log of the harness, kept for the error message


@dataclass(frozen=True, repr=False)
class TaskEvaluation(Shown):
    """The results of lm-evaluation-harness: a value by task and metric, with its standard error if there is one.

    The names are those of the harness: "acc" or "acc,strict-match". `lower` has the metrics of which less is better.

        evaluation = surgeon.evaluate_tasks("gpt2", "hellaswag", limit=100)
        print(evaluation.scores["hellaswag"]["acc_norm"].value)
    """

    model: str
    scores: Mapping[str, Mapping[str, Estimate]]
    baseline: str | None
    baseline_scores: Mapping[str, Mapping[str, Estimate]]
    lower: frozenset[tuple[str, str]]
    seconds: float

    @property
    def recovery(self) -> dict[str, dict[str, Recovery]]:
        """The share of the baseline's score in percent, by task and metric; {} without a baseline.

        100 · value / baseline, and 100 · baseline / value where less is better. The harness gives no figures by record,
        so the errors are those of independent ones: `unpaired`.
        """
        return {
            task: {
                name: unpaired(
                    figure, self.baseline_scores[task][name], higher_is_better=(task, name) not in self.lower
                )
                for name, figure in metrics.items()
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
            result["recovery"] = {
                task: {name: _share(share) for name, share in shares.items()} for task, shares in self.recovery.items()
            }
        return result | {"seconds": round(self.seconds, 3)}

    @property
    def headline(self) -> str:
        """The model and the tasks."""
        return f"{self.model}, {', '.join(self.scores)}"

    def to_text(self) -> str:
        """Return the evaluation for people."""
        rows = [("model", self.model)] + ([] if self.baseline is None else [("baseline", self.baseline)])
        shares = [(task, name, share) for task, named in self.recovery.items() for name, share in named.items()]
        rows += [("no recovery", f"{task} {name}: {share.refused}") for task, name, share in shares if share.refused]
        return f"{text.table(*self._table('model', 'baseline'))}\n\n{text.rows(rows)}"

    def to_markdown(self) -> str:
        """Return the evaluation as a block for a model card."""
        table = markdown_table(*self._table(short_label(self.model), short_label(self.baseline or "")))
        return f"{table}\n\nMeasured with lm-evaluation-harness, through `surgeon evaluate --tasks`."

    def _table(self, model: str, baseline: str) -> tuple[list[str], list[list[str]]]:
        header = ["task", "metric", model] + ([] if self.baseline is None else [baseline, "recovery"])
        lines = []
        for task, metrics in self.scores.items():
            for name, figure in metrics.items():
                better = "↓" if (task, name) in self.lower else ""
                line = [task, f"{name}{better}", plus_minus(figure.value, figure.error)]
                if self.baseline is not None:
                    other = self.baseline_scores.get(task, {}).get(name)
                    share = self.recovery.get(task, {}).get(name)
                    line += [
                        "" if other is None else plus_minus(other.value, other.error),
                        "" if share is None else share.cell,
                    ]
                lines.append(line)
        return header, lines


@dataclass(frozen=True, kw_only=True)
class TaskEvaluationOptions(Checked):
    """The options of `surgeon.evaluate_tasks`."""

    baseline: str | os.PathLike[str] | None = same_option(MetricOptions, "baseline")
    task_dir: str | os.PathLike[str] | None = option(
        "With --tasks: a directory with your own task files.", None, metavar="DIR", reads=True, group="what is measured"
    )
    samples: int | None = option("Records per task. Default: all.", None)
    batch_size: int | None = option("Prompts per batch. Default: 1.", None)
    chat: bool = option("Apply the chat template.", False)
    device: str = device_option()
    revision: str | None = revision_option()
    trust_remote_code: bool = trust_option()
    quiet: bool = in_python("Keep the log of lm-evaluation-harness from standard error.", True)


def run_tasks(model: str | os.PathLike[str], tasks: Sequence[str], options: TaskEvaluationOptions) -> TaskEvaluation:
    """Return the scores of a model, and of its baseline, on tasks of lm-evaluation-harness."""
    began = monotonic()
    if not tasks:
        raise OptionError("tasks", "--tasks: no task is named", hint="Name some: --tasks arc_easy,boolq")
    if options.task_dir is not None and not Path(options.task_dir).is_dir():
        raise PlanError(
            f"no such directory: {options.task_dir}",
            hint=hint_beside(options.task_dir, "--task-dir is a directory with task files (.yaml)."),
        )
    program, arguments = _program(), _arguments(tasks, options)
    models = [(open_source(model, revision=options.revision), options.revision)]
    models += [] if options.baseline is None else [(open_source(options.baseline), None)]
    results = [_run(program, source, revision, arguments, options) for source, revision in models]
    labels = [source.label for source, _ in models]
    scores = [_scores(one, label) for one, label in zip(results, labels, strict=True)]
    better = results[0].get("higher_is_better", {})
    lower = {
        (task, name)
        for task, metrics in scores[0].items()
        for name in metrics
        if better.get(task, {}).get(name.partition(",")[0]) is False
    }
    has_baseline = options.baseline is not None
    return TaskEvaluation(
        model=labels[0],
        scores=scores[0],
        baseline=labels[1] if has_baseline else None,
        baseline_scores=scores[1] if has_baseline else {},
        lower=frozenset(lower),
        seconds=monotonic() - began,
    )


def _arguments(tasks: Sequence[str], options: TaskEvaluationOptions) -> list[str]:
    """Return the arguments of the harness that are the same for all models."""
    arguments = ["--tasks", ",".join(tasks), "--batch_size", str(options.batch_size or 1)]
    arguments += [] if options.task_dir is None else ["--include_path", str(Path(options.task_dir).absolute())]
    arguments += [] if options.samples is None else ["--limit", str(options.samples)]
    arguments += ["--apply_chat_template"] if options.chat else []
    return arguments + ([] if options.device == "auto" else ["--device", options.device])


def _program() -> str:
    """Return the path of the harness's command: on PATH, or beside this interpreter."""
    program = shutil.which(COMMAND) or shutil.which(COMMAND, path=Path(sys.executable).parent)
    if program is None:
        raise MeasureError("lm-evaluation-harness is not installed: there is no command lm-eval", hint=INSTALL_HINT)
    return program


def _run(
    program: str, source: Source, revision: str | None, given: Sequence[str], options: TaskEvaluationOptions
) -> dict[str, Any]:
    """Return the results of one run of the harness."""
    with TemporaryDirectory(prefix="surgeon-lm-eval-") as scratch:
        name = str(Path(loadable(source, weights=True)[0]).absolute()) if source.origin is not None else source.label
        if "," in name:  # separates arguments there
            Path(scratch, "model").symlink_to(name)
            name = str(Path(scratch, "model"))
        arguments = f"pretrained={name}" + ("" if revision is None else f",revision={revision}")
        arguments += ",trust_remote_code=True" if options.trust_remote_code else ""
        results = Path(scratch, "results")
        command = [program, "run", "--model", "hf", "--model_args", arguments, *given, "--output_path", str(results)]
        code, last = _logged(command, quiet=options.quiet)
        files = sorted(results.rglob("results*.json"))
        if code or not files:
            message = next((line for line in reversed(last) if line.strip()), "it printed nothing")
            failed = f"fails with exit code {code}" if code else "leaves no results"
            raise MeasureError(
                f"lm-eval {failed} on {source.label}: {message.strip()}",
                hint="List its tasks: lm-eval ls tasks. Without -q its whole log is printed.",
            )
        try:
            content = json.loads(files[-1].read_text(encoding="utf-8"))
        except ValueError as error:
            raise MeasureError(f"lm-eval leaves results that are no JSON: {error}", hint=INSTALL_HINT) from error
        if not isinstance(content, dict):
            raise MeasureError("lm-eval leaves results that are no object", hint=INSTALL_HINT)
        return content


def _logged(command: Sequence[str], *, quiet: bool) -> tuple[int, list[str]]:
    """Run a process and return its exit code and its last lines; unless `quiet` stream its log to standard error."""
    last: deque[str] = deque(maxlen=LAST_LINES)
    process = subprocess.Popen(  # noqa: S603  # no shell, and the program is ours
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
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
        if process.poll() is None:  # Ctrl-C, or a closed terminal
            process.terminate()
            process.wait()


def _scores(results: Mapping[str, Any], label: str) -> dict[str, dict[str, Estimate]]:
    """Return the values and errors of every task and group; a metric's filter is named where it is not "none"."""
    scores: dict[str, dict[str, Estimate]] = {}
    for task, entries in results.get("results", {}).items():
        for key, value in entries.items():
            metric, _, filtering = key.partition(",")
            if not filtering or metric.endswith("_stderr") or type(value) not in (int, float):
                continue
            error = entries.get(f"{metric}_stderr,{filtering}")
            has_error = type(error) in (int, float) and math.isfinite(error)
            name = metric if filtering == "none" else key
            scores.setdefault(task, {})[name] = Estimate(float(value), float(error) if has_error else None)
    if not scores:
        raise MeasureError(f"lm-eval scores nothing on {label}", hint="List its tasks: lm-eval ls tasks")
    return scores


def _share(share: Recovery) -> dict[str, Any]:
    refused = {"refused": share.refused} if share.refused else {}
    return {"value": share.value, "error": share.error, **refused}


def _entries(scores: Mapping[str, Mapping[str, Estimate]]) -> dict[str, Any]:
    return {
        task: {
            name: {"value": figure.value if math.isfinite(figure.value) else None, "error": figure.error}
            for name, figure in metrics.items()
        }
        for task, metrics in scores.items()
    }
