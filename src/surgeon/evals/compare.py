"""Means with standard errors, two models compared on the same rows or records, and how figures are printed.

Rows of a text and records of a task are the independent draws here, not tokens: the tokens of a row share a context.
Source: Miller 2024 (Adding Error Bars to Evals, arXiv:2411.00640), sections 2.1, 2.2 and 4.2.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from surgeon.text import plus_minus, printable

ONE_RECORD = "one record has no error; give more of them"


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value and its standard error, None where there is one row or record only."""

    value: float
    error: float | None

    def scaled(self, factor: float) -> "Estimate":
        """Return both times a factor."""
        return Estimate(self.value * factor, None if self.error is None else self.error * abs(factor))


def estimate(sums: Sequence[float], sizes: Sequence[int] | None = None) -> Estimate:
    """Return L = Σ sums / Σ sizes with its standard error, each entry being one cluster of `sizes` observations.

    error² = R / (R - 1) · Σ_r (sums_r - L · sizes_r)² / (Σ sizes)², for R clusters. Where all sizes are 1 (the default)
    this is the sample's standard deviation over √R; of scores that are 0 or 1 it is √(p (1 - p) / (R - 1)).
    Source: Cochran 1977 (Sampling Techniques), section 6.3, the error of a ratio.
    """
    weights = [1] * len(sums) if sizes is None else list(sizes)
    total, count = math.fsum(weights), len(sums)
    mean = math.fsum(sums) / total
    if count < 2:
        return Estimate(mean, None)
    squares = math.fsum((value - mean * weight) ** 2 for value, weight in zip(sums, weights, strict=True))
    return Estimate(mean, math.sqrt(count / (count - 1) * squares) / total)


def exponential(loss: Estimate) -> Estimate:
    """Return exp of a loss: the perplexity, its error to first order (delta method): perplexity · error of the loss."""
    value = math.exp(loss.value) if loss.value < 700 else math.inf
    return Estimate(value, None if loss.error is None else value * loss.error)


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """The mean of the differences between two models' figures, row by row or record by record.

    `z` is the difference over its standard error, None where that is 0 or unknown.
    """

    value: float
    error: float | None

    @property
    def z(self) -> float | None:
        return self.value / self.error if self.error else None


def paired(sums: Sequence[float], others: Sequence[float], sizes: Sequence[int] | None = None) -> PairedDifference:
    """Return the mean of the differences, cluster by cluster, with the standard error of `estimate`."""
    mean = estimate([one - other for one, other in zip(sums, others, strict=True)], sizes)
    return PairedDifference(mean.value, mean.error)


def recovery(value: float, baseline: float, *, higher_is_better: bool) -> float | None:
    """Return the share of the baseline's score in percent: 100 is as good, more is better. None where it is 0 / 0.

    Of scores it is 100 · value / baseline; of perplexities, where less is better, 100 · baseline / value.
    """
    above, below = (value, baseline) if higher_is_better else (baseline, value)
    return 100.0 * above / below if below and math.isfinite(above) else None


@dataclass(frozen=True, slots=True)
class Recovery:
    """A share of the baseline's score in percent with its standard error, or the reason for which there is none."""

    value: float | None
    error: float | None = None
    refused: str | None = None

    def __str__(self) -> str:
        return f"none: {self.refused}" if self.value is None else f"{plus_minus(self.value, self.error)} %"

    @property
    def cell(self) -> str:
        """The text of a table's cell, without the reason."""
        return "none" if self.value is None else str(self)


def mean_of(estimates: Sequence[Estimate]) -> Estimate:
    """Return the mean of independent estimates; its error is unknown where one of theirs is."""
    errors = [item.error for item in estimates if item.error is not None]
    error = math.sqrt(math.fsum(error**2 for error in errors)) / len(estimates)
    value = math.fsum(item.value for item in estimates) / len(estimates)
    return Estimate(value, error if len(errors) == len(estimates) else None)


def recovered(tasks: Sequence[tuple[Sequence[float], Sequence[float]]]) -> Recovery:
    """Return 100 · A / B, with A the mean over tasks of a model's mean scores, and B of the baseline's.

    The scores of a task are paired record by record, and tasks are independent. The error is that of the delta method:
    100 / B times the error of A - (A / B) · B with the ratio held fixed, whose terms are a record's score less A / B
    times the baseline's. Refused where B is not two of its errors above 0: the ratio could then be anything. Refused
    too where a task has one record, whose error nobody knows.
    Source: Fieller 1954 for the condition; Cochran 1977, section 6.4, for the error.
    """
    model, baseline = (mean_of([estimate(pair[index]) for pair in tasks]) for index in (0, 1))
    if baseline.error is None:
        return Recovery(None, None, ONE_RECORD)
    if baseline.value <= 2 * baseline.error:
        found = plus_minus(baseline.value, baseline.error)
        return Recovery(None, None, f"the baseline's mean, {found}, is not two errors above 0")
    ratio = model.value / baseline.value
    rests = [estimate([one - ratio * other for one, other in zip(*pair, strict=True)]) for pair in tasks]
    error = mean_of(rests).error
    assert error is not None
    return Recovery(100 * ratio, 100 * error / baseline.value)


def unpaired(value: Estimate, baseline: Estimate, *, higher_is_better: bool) -> Recovery:
    """Return the share of a baseline's score, of two figures whose records are not at hand one by one.

    The error is that of two independent figures, √((error_A / A)² + (error_B / B)²) times the share. Of two models on
    the same records, which err together, it is too large rather than too small. Refused without errors, and where the
    lower part of the fraction is not two of its errors above 0.
    """
    (above, below), name = ((value, baseline), "baseline's score") if higher_is_better else ((baseline, value), "score")
    if above.error is None or below.error is None:
        return Recovery(None, None, "its figures have no errors")
    if not below.value > 2 * below.error:
        found = plus_minus(below.value, below.error)
        return Recovery(None, None, f"the {name}, {found}, is not two errors above 0")
    share = recovery(value.value, baseline.value, higher_is_better=higher_is_better)
    if share is None:
        return Recovery(None, None, "its figures are beyond numbers")
    # d(A / B) to first order, without a division by A, which may be 0
    error = 100 * math.hypot(above.error, share / 100 * below.error) / below.value
    return Recovery(share, error)


def gap_closed(
    best: Sequence[float],
    between: Sequence[float],
    worst: Sequence[float],
    sizes: Sequence[int] | None = None,
    *,
    higher_is_better: bool,
) -> Recovery:
    """Return the share of the gap between two figures that a third one closes, in percent: 100 is as good as the best.

    It is (between - worst) / (best - worst), all over the same records; its error is that of a ratio of two means.
    Refused where the gap has the wrong sign, is within two of its errors of 0, or has no error.
    """
    gains = [one - other for one, other in zip(best, worst, strict=True)]
    gap = estimate(gains, sizes)
    ahead = gap.value if higher_is_better else -gap.value
    found = plus_minus(ahead, gap.error)
    if gap.error is None:
        return Recovery(None, None, ONE_RECORD)
    if ahead < 0 and -ahead > 2 * gap.error:
        return Recovery(None, None, f"the whole prompt is worse than none, by {plus_minus(-ahead, gap.error)}")
    if not ahead > 2 * gap.error:
        return Recovery(None, None, f"the whole prompt is better than none by {found}, which is not two errors above 0")
    closed = [one - other for one, other in zip(between, worst, strict=True)]
    ratio = estimate(closed, gains)  # type: ignore[arg-type]  # the ratio of any two sums, negative ones too
    assert ratio.error is not None
    return Recovery(100 * ratio.value, abs(100 * ratio.error))


@dataclass(frozen=True)
class Scored:
    """The scores of one model.

    `figures` are means with their errors. `outcomes` holds the numbers that are compared pairwise: for each row the
    sum of its losses, for each record its score. `sizes` are the tokens per row, None for records. `counts` are the
    numbers of tokens, rows, bytes or records.
    """

    model: str
    figures: Mapping[str, Estimate]
    counts: Mapping[str, int]
    outcomes: Mapping[str, tuple[float, ...]] = field(repr=False)
    sizes: tuple[int, ...] | None = field(default=None, repr=False)

    def with_outcome(self, name: str, scores: tuple[float, ...]) -> "Scored":
        """Return this with one more score per record."""
        figures, outcomes = {**self.figures, name: estimate(scores)}, {**self.outcomes, name: scores}
        return replace(self, figures=figures, outcomes=outcomes)

    def against(self, other: "Scored") -> dict[str, PairedDifference]:
        """Return the paired difference of every outcome from another model's on the same rows or records."""
        return {name: paired(numbers, other.outcomes[name], self.sizes) for name, numbers in self.outcomes.items()}


def short_label(label: str) -> str:
    """Return the name of a model or file: of a local path its last part, for its directory is of this machine alone."""
    return (Path(label).name or label) if Path(label).exists() else label


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    cells = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(table_cell(word) for word in line)} |" for line in cells)


def table_cell(content: str) -> str:
    """Return text that stays inside its cell of a table."""
    return printable(content).replace("|", r"\|")
