"""Means with standard errors, and two models compared on the same rows or records.

Rows of a text and records of a task are the independent draws here, not tokens: the tokens of a row share a context.
Source: Miller 2024 (Adding Error Bars to Evals, arXiv:2411.00640), sections 2.1, 2.2 and 4.2.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace


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
class Difference:
    """How much more one model has than another of a mean, on the same rows: in the mean of the paired differences.

    `z` is the difference over its standard error, None where that is 0 or unknown.
    """

    value: float
    error: float | None

    @property
    def z(self) -> float | None:
        return self.value / self.error if self.error else None


def paired(sums: Sequence[float], others: Sequence[float], sizes: Sequence[int] | None = None) -> Difference:
    """Return the mean of the differences, cluster by cluster, with the standard error of `estimate`."""
    found = estimate([one - other for one, other in zip(sums, others, strict=True)], sizes)
    return Difference(found.value, found.error)


def recovery(value: float, baseline: float, *, higher_is_better: bool) -> float | None:
    """Return how much of the baseline is there, in percent: 100 is as good, more is better. None where that is 0 / 0.

    Of scores it is 100 · value / baseline; of perplexities, where less is better, 100 · baseline / value.
    """
    above, below = (value, baseline) if higher_is_better else (baseline, value)
    return 100.0 * above / below if below and math.isfinite(above) else None


@dataclass(frozen=True)
class Scored:
    """What one model scored.

    `figures` are means with their errors. `outcomes` holds, for what is compared pairwise, a number for each row
    (the sum of its losses) or record (its score), and `sizes` how many tokens a row has, None for records. `counts`
    says of how many of what.
    """

    model: str
    figures: Mapping[str, Estimate]
    counts: Mapping[str, int]
    outcomes: Mapping[str, tuple[float, ...]]
    sizes: tuple[int, ...] | None = None

    def with_outcome(self, name: str, scores: tuple[float, ...]) -> "Scored":
        """Return this with one more score of every record."""
        figures, outcomes = {**self.figures, name: estimate(scores)}, {**self.outcomes, name: scores}
        return replace(self, figures=figures, outcomes=outcomes)

    def against(self, other: "Scored") -> dict[str, Difference]:
        """Return the paired difference of every outcome from another model's on the same rows or records."""
        return {name: paired(found, other.outcomes[name], self.sizes) for name, found in self.outcomes.items()}
