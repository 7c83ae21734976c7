"""The verb `evaluate`: what a model scores on data, with errors, and beside a baseline on the same tokens."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from surgeon import text
from surgeon.errors import DataError, PlanError
from surgeon.evals.compare import Difference, Scored, recovery
from surgeon.evals.files import checked_target, opened, write_records
from surgeon.evals.prompts import BATCH_SIZE, MAX_NEW_TOKENS
from surgeon.evals.table import cell, markdown, plus_minus, short
from surgeon.evals.verdicts import Judgement, card_sentences

if TYPE_CHECKING:
    from surgeon.evals.runs import Run
    from surgeon.measure.scoring import Meter

METRICS = ("perplexity", "exact-match", "rouge-l", "choice")
SAMPLES, SEQUENCE_LENGTH = 64, 512  # of a perplexity; of records all are taken
# Which metrics an option goes with.
_GOES_WITH = {
    "sequence_length": ("perplexity",),
    "stride": ("perplexity",),
    "max_new_tokens": ("exact-match", "rouge-l"),
    "batch_size": ("exact-match", "rouge-l"),
    "chat": ("exact-match", "rouge-l"),
    "extract": ("exact-match",),
    "predictions": ("exact-match", "rouge-l", "choice"),
    "judge": ("exact-match", "rouge-l"),
}


@dataclass(frozen=True)
class Evaluation:
    """What a model scored on data, and, with a baseline, beside it.

    `scored.figures` are, with their standard errors: for perplexity "perplexity", "loss" (nats a token) and
    "bits_per_byte"; for the others "exact_match", "rouge_l", or "accuracy" and "accuracy_normalised", all 0 to 1,
    and with a judge "win_rate" against the baseline, `judgement` being what it said.
    `differences` are paired, this model's less the baseline's. `setup` says what makes the figures reproducible.
    `predictions` has a record for each prompt: prompt, reference, prediction, score.
    """

    metric: str
    scored: Scored
    baseline: Scored | None
    setup: Mapping[str, Any]
    notes: tuple[str, ...]
    predictions: tuple[Mapping[str, Any], ...]
    seconds: float
    judgement: Judgement | None = None

    @property
    def recovery(self) -> float | None:
        """How much of the baseline is there, in percent; None without one, or where it scores 0.

        For perplexity 100 · baseline's perplexity / this perplexity, for scores 100 · this score / baseline's, of the
        first figure: 100 is as good as the baseline, more is better.
        """
        if self.baseline is None:
            return None
        ours, theirs = (next(iter(scored.figures.values())).value for scored in (self.scored, self.baseline))
        return recovery(ours, theirs, higher_is_better=self.metric != "perplexity")

    @property
    def differences(self) -> dict[str, Difference]:
        """The mean of the paired differences from the baseline, of the loss or the scores; {} without a baseline."""
        return {} if self.baseline is None else self.scored.against(self.baseline)

    def to_dict(self) -> dict[str, Any]:
        """Return the evaluation as `--json` prints it."""
        result = {"metric": self.metric, **_entries(self.scored), **self.setup}
        if self.baseline is not None:
            result["baseline"] = _entries(self.baseline)
            result["differences"] = {
                name: {"value": found.value, "error": found.error, "z": found.z}
                for name, found in self.differences.items()
            }
            result["recovery"] = self.recovery
        if self.judgement is not None:
            result["judge"] = {"model": self.judgement.judge, **self.judgement.to_dict()}
        return result | {"notes": list(self.notes), "seconds": round(self.seconds, 3)}

    def to_text(self) -> str:
        """Return the evaluation for people."""
        rows = [("model", self.scored.model)] + ([] if self.baseline is None else [("baseline", self.baseline.model)])
        rows += [("data", self._told())]
        rows += [] if self.recovery is None else [("recovery", f"{self.recovery:.2f} %")]
        if self.judgement is not None:
            rows += [("judge", self.judgement.judge), ("verdicts", self.judgement.told())]
        notes = (*self.notes, *(() if self.judgement is None else self.judgement.notes))
        rows += [("note", note) for note in notes]
        return f"{text.table(*self._table('', 'model', 'baseline'))}\n\n{text.rows(rows)}"

    def to_markdown(self) -> str:
        """Return the evaluation as a block for a model card."""
        names = [short(scored.model) for scored in (self.scored, self.baseline) if scored is not None]
        recovered = "" if self.recovery is None else f" Recovery: {self.recovery:.2f} %."
        judged = "" if self.judgement is None else card_sentences({" against ".join(names): self.judgement})
        told = f"Measured with `surgeon evaluate` on {self._told()}.{recovered}{judged}"
        return f"{markdown(*self._table('', *names))}\n\n{told}"

    def _table(self, *header: str) -> tuple[list[str], list[list[str]]]:
        header = header[:2] if self.baseline is None else (*header, "difference", "z")
        lines = []
        for name, found in self.scored.figures.items():
            line = [name.replace("_", " "), plus_minus(found.value, found.error)]
            if self.baseline is not None:
                other, difference = self.baseline.figures[name], self.differences.get(name)
                line.append(plus_minus(other.value, other.error))
                line.append("" if difference is None else plus_minus(difference.value, difference.error))
                line.append("" if difference is None or difference.z is None else f"{difference.z:.1f}")
            lines.append(line)
        return list(header), lines

    def _told(self) -> str:
        counts = self.scored.counts
        if self.metric != "perplexity":
            amount = f"{counts['records']:,} records"
        elif self.setup["stride"] is None:
            amount = f"{counts['tokens']:,} tokens, in {counts['rows']} rows of {self.setup['sequence_length']}"
        else:
            length, stride = self.setup["sequence_length"], self.setup["stride"]
            amount = f"{counts['tokens']:,} tokens, in {counts['rows']} windows of {length} with a stride of {stride}"
        return f"{amount}, of {cell(', '.join(map(short, self.setup['data'])))}, in {self.setup['dtype']}"


def evaluate(
    model: str | os.PathLike[str],
    *,
    data: Sequence[str],
    metric: str = "perplexity",
    baseline: str | os.PathLike[str] | None = None,
    samples: int | None = None,
    sequence_length: int | None = None,
    stride: int | None = None,
    max_new_tokens: int | None = None,
    batch_size: int | None = None,
    extract: str | None = None,
    chat: bool = False,
    predictions: str | os.PathLike[str] | None = None,
    judge: str | os.PathLike[str] | None = None,
    device: str = "auto",
    revision: str | None = None,
    meter: "Meter | None" = None,
) -> Evaluation:
    """Return what a checkpoint directory or Hub model scores on data, and with a `baseline` beside that model.

    `metric` is "perplexity" of the first `samples` (64) rows of `sequence_length` (512) tokens, or with a `stride` of
    windows over as many tokens; "exact-match" or "rouge-l" of greedy answers of up to `max_new_tokens` (256); or
    "choice". Of records all are taken, or the first `samples`. `extract` is a regular expression whose last match is
    compared, `chat` puts prompts into the tokenizer's chat template, `predictions` is a .jsonl to write. `judge` is a
    model that compares each answer with the baseline's, once both are written: `surgeon.judge_answers`.

    Raises DataError for data that cannot be read or has no answers, MeasureError for a model that cannot be evaluated
    and for a baseline that sees other tokens, PlanError for options that contradict each other, OutputError.

        print(surgeon.evaluate("gpt2-large-27", data=["text.txt"], baseline="gpt2-large").to_text())
    """
    began = monotonic()
    given = {
        "sequence_length": sequence_length,
        "stride": stride,
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "extract": extract,
        "chat": chat or None,
        "predictions": predictions,
        "judge": judge,
    }
    _check(metric, data, given | {"samples": samples})
    if judge is not None and baseline is None:
        hint = "Name the model whose answers these are compared with: --baseline ORIGINAL."
        raise PlanError("a judge compares two models' answers, and there is one model", hint=hint)
    pattern = None if extract is None else _compiled(extract)
    target = None if predictions is None else checked_target(Path(predictions))
    sources = [opened(model, revision)] + ([] if baseline is None else [opened(baseline, None)])

    from surgeon.evals import runs
    from surgeon.evals.judge import seated
    from surgeon.models.device import resolve_device

    bench = runs.Bench(sources, resolve_device(device), meter or (lambda what, tokens, layers: None))
    bound = max_new_tokens or MAX_NEW_TOKENS
    judging = None if judge is None else seated(judge, data, bench.device, samples=samples, max_new_tokens=bound)
    found: Run
    if metric == "perplexity":
        rows = {"samples": samples or SAMPLES, "sequence_length": sequence_length or SEQUENCE_LENGTH}
        found = runs.run_perplexity(bench, data, **rows, stride=stride)
    elif metric == "choice":
        found = runs.run_choice(bench, data, samples=samples)
    else:
        found = runs.run_answers(
            bench,
            data,
            metric=metric,
            samples=samples,
            max_new_tokens=bound,
            batch_size=batch_size or BATCH_SIZE,
            extract=pattern,
            chat=chat,
        )
    if target is not None:
        write_records(found.predictions, target)
    if judging is not None:  # by now the models are gone, and what they wrote is on disk
        found = runs.judge_run(found, *judging, bench, batch_size=batch_size or BATCH_SIZE)
        if target is not None:
            write_records(found.predictions, target)
    other = found.scored[1] if baseline is not None else None
    seconds = monotonic() - began
    return Evaluation(
        metric, found.scored[0], other, found.setup, found.notes, found.predictions, seconds, found.judgement
    )


def _check(metric: str, data: Sequence[str], given: Mapping[str, Any]) -> None:
    """Raises PlanError for options that make no sense, alone or together."""
    if metric not in METRICS:
        raise PlanError(f"unknown metric {metric!r}", hint=f"One of: {', '.join(METRICS)}.")
    if not data:
        raise DataError("there is no data to evaluate on", hint="Give a text or records: --data FILE.")
    for name, value in given.items():
        option = f"--{name.replace('_', '-')}"
        if value is not None and metric not in _GOES_WITH.get(name, METRICS):
            raise PlanError(
                f"{option} says nothing to {metric}", hint=f"It goes with {' and '.join(_GOES_WITH[name])}."
            )
        least = 2 if name == "sequence_length" else 1
        if type(value) is int and value < least:
            raise PlanError(f"{option} is {value}; {least} is the least", hint=f"Set {option} to {least} or more.")
    stride, length = given["stride"], given["sequence_length"] or SEQUENCE_LENGTH
    if stride is not None and stride >= length:
        raise PlanError(
            f"windows of {length} tokens that begin {stride} apart leave the first of each without context",
            hint=f"Use a --stride below {length}; without it the text is cut into rows.",
        )


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        hint = r"Write one with one group, such as '#### (-?[\d,]+)'"
        raise PlanError(f"--extract is no regular expression: {error}", hint=hint) from error


def _entries(scored: Scored) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for name, found in scored.figures.items():
        figures |= {name: _finite(found.value), f"{name}_error": _finite(found.error)}
    return {"model": scored.model, **figures, **scored.counts}


def _finite(value: float | None) -> float | None:
    """Return a number that JSON has: exp of a loss may be beyond a float."""
    return value if value is not None and math.isfinite(value) else None
