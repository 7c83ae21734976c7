"""Means with standard errors, two models compared on the same rows or records, and how figures are printed.

Rows of a text and records of a task are the independent draws here, not tokens: the tokens of a row share a context.
Source: Miller 2024 (Adding Error Bars to Evals, arXiv:2411.00640), sections 2.1, 2.2 and 4.2.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from surgeon.text import printable

FEW_DIGITS = 1e7  # from here on a number is written with an exponent


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
        if self.value is None:
            return f"none: {self.refused}"
        return f"{self.value:.2f} %" if self.error is None else f"{self.value:.2f} ± {self.error:.2g} %"


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
    times the baseline's. Refused where B is not two of its errors above 0: the ratio could then be anything.
    Source: Fieller 1954 for the condition; Cochran 1977, section 6.4, for the error.
    """
    model, baseline = (mean_of([estimate(pair[index]) for pair in tasks]) for index in (0, 1))
    if baseline.value <= 2 * (baseline.error or 0.0):
        found = plus_minus(baseline.value, baseline.error)
        return Recovery(None, None, f"the baseline's mean, {found}, is not two errors above 0")
    ratio = model.value / baseline.value
    rests = [estimate([one - ratio * other for one, other in zip(*pair, strict=True)]) for pair in tasks]
    error = mean_of(rests).error
    return Recovery(100 * ratio, None if error is None else 100 * error / baseline.value)


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


def plus_minus(value: float, error: float | None) -> str:
    """Return "24.22 ± 0.84": as many digits as the error makes sense of, two of its own."""
    if error is None or not 0 < error < math.inf or abs(value) >= FEW_DIGITS:
        return f"{value:.6g}" + ("" if error is None else f" ± {error:.2g}")
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    cells = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(table_cell(word) for word in line)} |" for line in cells)


def table_cell(content: str) -> str:
    """Return text that stays inside its cell of a table."""
    return printable(content).replace("|", r"\|")
