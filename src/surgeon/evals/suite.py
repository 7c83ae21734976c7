"""Several tasks in one table: each a metric on data, with the mean over tasks and its recovery."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from surgeon import text
from surgeon.evals.compare import (
    Estimate,
    PairedDifference,
    Recovery,
    Scored,
    estimate,
    markdown_table,
    mean_of,
    recovered,
    short_label,
)
from surgeon.evals.evaluation import Evaluation
from surgeon.evals.options import METRICS_OF, OF_TEXT, EvaluationOptions, MetricOptions
from surgeon.options import (
    OptionError,
    device_option,
    flag_of,
    option,
    progress_option,
    revision_option,
    trust_option,
    words,
)
from surgeon.showing import Shown
from surgeon.text import plus_minus, sliced


@dataclass(frozen=True, kw_only=True)
class SuiteOptions(MetricOptions):
    """The options of `surgeon.evaluate_suite`: as of `evaluate`, each for the metrics on which it has an effect."""

    metric: str = option("One metric for each --data, in their order: exact-match,rouge-l", metavar="METRIC,METRIC")
    device: str = device_option()
    revision: str | None = revision_option()
    trust_remote_code: bool = trust_option()
    progress: Any = progress_option()

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.tasks

    @property
    def tasks(self) -> dict[str, EvaluationOptions]:
        """The options of each task's evaluation, by its name. Raises OptionError or PlanError for wrong ones."""
        metrics = words(self.metric)
        if len(metrics) != len(self.data):
            raise OptionError(
                "metric", f"--metric has {len(metrics)} metrics for {len(self.data)} --data", hint="Give one each."
            )
        for name, known in METRICS_OF.items():
            if getattr(self, name) not in (None, False) and not set(known) & set(metrics):
                raise OptionError(
                    name,
                    f"{flag_of(name)} has no effect on {' and '.join(metrics)}",
                    hint=f"Leave out {flag_of(name)}.",
                )
        if self.judge is not None:
            raise OptionError("judge", "--judge goes with one metric", hint="Give one --metric and one --data.")
        names = _names(self.data, metrics)
        return {name: self._of(spec, metric) for name, spec, metric in zip(names, self.data, metrics, strict=True)}

    def _of(self, data: str, metric: str) -> EvaluationOptions:
        if metric == "acceptance":
            raise OptionError("metric", "acceptance stands in no table of tasks", hint="Measure it by itself.")
        own = ("data", "metric", "predictions")
        given = {item.name: getattr(self, item.name) for item in fields(EvaluationOptions) if item.name not in own}
        without = {name for name, metrics in METRICS_OF.items() if metric not in metrics}
        return EvaluationOptions(
            **{name: value for name, value in given.items() if name not in without}, data=[data], metric=metric
        )


def _names(data: Sequence[str], metrics: Sequence[str]) -> list[str]:
    """Return the names of tasks: those of their files, with the metric where two have one name."""
    stems = [_stem(spec) for spec in data]
    names = [
        stem if stems.count(stem) == 1 else f"{stem} {metric}" for stem, metric in zip(stems, metrics, strict=True)
    ]
    return [f"{name} {number}" if names.count(name) > 1 else name for number, name in enumerate(names, start=1)]


def _stem(spec: str) -> str:
    """Return "gsm8k" for "data/gsm8k.jsonl[:100]", and for "org/gsm8k:main:test"."""
    name, *_ = sliced(spec)
    return Path(name.partition(":")[0]).name.partition(".")[0] or spec


@dataclass(frozen=True, repr=False)
class SuiteEvaluation(Shown):
    """The scores of a model on several tasks, and those of its baseline if there is one.

    `evaluations` are the tasks' own, by name. The mean, its difference and the recovery are over the tasks with scores,
    0 to 1; a perplexity stands in the table only.

        tasks = ["questions.jsonl", "instructions.jsonl"]
        suite = surgeon.evaluate_suite("gpt2", data=tasks, metric="exact-match,rouge-l", max_new_tokens=4, samples=4)
        print(suite.mean.value, suite.evaluations.keys())
    """

    evaluations: Mapping[str, Evaluation]
    seconds: float = 0.0

    @cached_property
    def model(self) -> str:
        return next(iter(self.evaluations.values())).scored.model

    @cached_property
    def baseline(self) -> str | None:
        baseline = next(iter(self.evaluations.values())).baseline
        return None if baseline is None else baseline.model

    @cached_property
    def _scores(self) -> dict[str, list[tuple[float, ...]]]:
        """By task the scores of its records: the model's and, with a baseline, the baseline's."""
        found = {}
        for name, evaluation in self.evaluations.items():
            if evaluation.metric not in OF_TEXT:
                both = [scored for scored in (evaluation.scored, evaluation.baseline) if scored is not None]
                found[name] = [scored.outcomes[_first(scored)] for scored in both]
        return found

    @property
    def mean(self) -> Estimate | None:
        """The mean over tasks of the model's means, with its error; None where no task has scores."""
        return mean_of([estimate(scores[0]) for scores in self._scores.values()]) if self._scores else None

    @property
    def baseline_mean(self) -> Estimate | None:
        """The same of the baseline; None without one."""
        if self.baseline is None or not self._scores:
            return None
        return mean_of([estimate(scores[1]) for scores in self._scores.values()])

    @property
    def difference(self) -> PairedDifference | None:
        """The mean over tasks of the paired differences from the baseline; None without one."""
        if self.baseline is None or not self._scores:
            return None
        rests = [[one - other for one, other in zip(*pair, strict=True)] for pair in self._scores.values()]
        mean = mean_of([estimate(rest) for rest in rests])
        return PairedDifference(mean.value, mean.error)

    @property
    def recovered(self) -> Recovery | None:
        """100 · mean / baseline's mean, a ratio of means, with its paired error (delta method); None without one."""
        if self.baseline is None:
            return None
        if not self._scores:
            return Recovery(None, None, "no task has scores between 0 and 1")
        return recovered([(scores[0], scores[1]) for scores in self._scores.values()])

    @property
    def notes(self) -> tuple[str, ...]:
        left = [name for name in self.evaluations if name not in self._scores]
        notes = [f"{name}: {note}" for name, evaluation in self.evaluations.items() for note in evaluation.notes]
        return (*((f"not in the mean: {', '.join(left)}",) if left else ()), *notes)

    @property
    def predictions(self) -> list[dict[str, Any]]:
        """The predictions of all tasks, each with its task."""
        return [
            {"task": name, **entry} for name, evaluation in self.evaluations.items() for entry in evaluation.predictions
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the evaluation as `--json` prints it."""
        result: dict[str, Any] = {"metric": "suite", "model": self.model}
        result["tasks"] = {name: evaluation.to_dict() for name, evaluation in self.evaluations.items()}
        result |= _entries("mean", self.mean)
        if self.recovered is not None:
            difference = self.difference
            result["baseline"] = {"model": self.baseline, **_entries("mean", self.baseline_mean)}
            gap = difference and {"value": difference.value, "error": difference.error, "z": difference.z}
            result["differences"] = {"mean": gap} if gap else {}
            result |= {"recovery": self.recovered.value, "recovery_error": self.recovered.error}
            result |= {"recovery_refused": self.recovered.refused} if self.recovered.refused else {}
        return result | {"notes": list(self.notes), "seconds": round(self.seconds, 3)}

    @property
    def headline(self) -> str:
        """The model, the tasks and the mean over them."""
        mean = "" if self.mean is None else f", mean {plus_minus(self.mean.value, self.mean.error)}"
        return f"{short_label(self.model)}, {', '.join(self.evaluations)}{mean}"

    def to_text(self) -> str:
        """Return the evaluation for people."""
        rows = [("model", self.model)] + ([] if self.baseline is None else [("baseline", self.baseline)])
        rows += [] if self.recovered is None else [("recovery", f"{self.recovered}, of the means over tasks")]
        rows += [("note", note) for note in self.notes]
        return f"{text.table(*self._table('model', 'baseline'))}\n\n{text.rows(rows)}"

    def to_markdown(self) -> str:
        """Return the evaluation as a block for a model card."""
        table = markdown_table(*self._table(short_label(self.model), short_label(self.baseline or "")))
        share = "" if self.recovered is None else f" Recovery, the ratio of the means over tasks: {self.recovered}."
        return f"{table}\n\nMeasured with `surgeon evaluate`.{share}"

    def _table(self, model: str, baseline: str) -> tuple[list[str], list[list[str]]]:
        header = ["task", "metric", "records", model]
        header += [] if self.baseline is None else [baseline, "difference", "z", "recovery"]
        lines = [self._line(name, evaluation) for name, evaluation in self.evaluations.items()]
        if self.mean is not None:
            last = ["mean", "", "", plus_minus(self.mean.value, self.mean.error)]
            if self.baseline_mean is not None and self.difference is not None:
                last.append(plus_minus(self.baseline_mean.value, self.baseline_mean.error))
                last += [*_difference(self.difference), _cell(self.recovered)]
            lines.append(last)
        return header, lines

    def _line(self, name: str, evaluation: Evaluation) -> list[str]:
        first = _first(evaluation.scored)
        figure, counts = evaluation.scored.figures[first], evaluation.scored.counts
        what = evaluation.metric if evaluation.metric in OF_TEXT else first.replace("_", " ")
        line = [name, what, f"{counts.get('records', counts.get('rows', 0)):,}", plus_minus(figure.value, figure.error)]
        if evaluation.baseline is not None:
            other = evaluation.baseline.figures[first]
            line.append(plus_minus(other.value, other.error))
            line += [*_difference(evaluation.differences.get(first)), _cell(evaluation.recovered)]
        return line


def _first(scored: Scored) -> str:
    """Return the name of the figure that stands for a task."""
    return next(iter(scored.figures))


def _difference(difference: PairedDifference | None) -> tuple[str, str]:
    if difference is None:
        return "", ""
    z = "" if difference.z is None else f"{difference.z:.1f}"
    return plus_minus(difference.value, difference.error), z


def _cell(share: Recovery | None) -> str:
    return "none" if share is None else share.cell


def _entries(name: str, figure: Estimate | None) -> dict[str, float | None]:
    return {name: None if figure is None else figure.value, f"{name}_error": None if figure is None else figure.error}
