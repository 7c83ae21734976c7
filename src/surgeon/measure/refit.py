"""Refit a linear map in closed form, so that states come closest to others: least squares with a ridge to the old map.

With inputs a of the map, states h that it takes part in and states t that are wanted, the change X of the map is

    X = (G + ridge * mean(diag G) * I)^-1 B,   G = sum w^2 a a^T,   B = sum w^2 a (t - h)^T

A row's weight w is 1 / |t|, so that errors are relative, and ten times that for the first token of a text: models park
large numbers there (attention sinks), and a fit without it destroys them. An infinite ridge changes nothing. Sources:
ReplaceMe, arXiv:2505.02819, which fits a square matrix behind the map; the ridge towards the old weights is ours.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from surgeon.models.device import wide
from surgeon.processes import summed

RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0)
# Where nearly no ridge leaves at most this share of the held-out error, what was removed is linear in what is kept.
LINEAR_RIDGE, LINEAR = 1e-7, 1e-2
FIRST = 10.0  # times the weight of the first token


def row_weights(targets: Tensor, first: Tensor) -> Tensor:
    """Return the weights of rows, shape (N, 1), from the states that are wanted and which are first tokens.

    A row that is wanted to be zero has no relative error, and no weight.
    """
    norms = targets.norm(dim=-1, keepdim=True)
    return torch.where(norms > 0, (1 + (FIRST - 1) * first[:, None]) / norms, torch.zeros_like(norms))


class Error:
    """The relative error of states, weighted: the root of a mean of squares over the rows that were added."""

    def __init__(self) -> None:
        self.missing = self.wanted = 0.0  # sums of w^2 |t - h|^2 and w^2 |t|^2
        self.num_rows = 0

    def add(self, states: Tensor, targets: Tensor, first: Tensor) -> None:
        """Add rows: the states as they are and as they are wanted, and which are first tokens."""
        weights = row_weights(targets.float(), first)
        self.missing += float(wide(weights * (targets.float() - states.float())).square().sum())
        self.wanted += float(wide(weights * targets.float()).square().sum())
        self.num_rows += len(states)

    def add_up(self) -> None:
        """Make the sums those of all processes that measure together."""
        numbers = summed(torch.tensor([self.missing, self.wanted, self.num_rows], dtype=torch.float64))
        self.missing, self.wanted, rows = numbers.tolist()
        self.num_rows = round(rows)

    def value(self, change: float = 0.0) -> float:
        """Return the error, after a change of what is missing."""
        left = self.missing + change
        if math.isnan(left):
            return math.inf
        return (max(0.0, left) / self.wanted) ** 0.5 if self.wanted else 0.0


class Sums:
    """The sums of a fit over rows: products in float32, sums in float64. With `constant`, the last input is one.

    `shape` is that of the map: its inputs and its outputs.
    """

    def __init__(self, shape: Sequence[int], *, constant: bool) -> None:
        inputs, outputs = shape
        self.constant = constant
        self.gram = torch.zeros(inputs, inputs, dtype=torch.float64)  # G, on the device of what is added
        self.cross = torch.zeros(inputs, outputs, dtype=torch.float64)  # B
        self._error = Error()

    @property
    def num_rows(self) -> int:
        """How many rows were added."""
        return self._error.num_rows

    def add(self, inputs: Tensor, states: Tensor, targets: Tensor, first: Tensor) -> None:
        """Add rows: inputs of the map, the states as they are and as they are wanted, and which are first tokens."""
        weights = row_weights(targets.float(), first)
        features, missing = weights * inputs.float(), weights * (targets.float() - states.float())
        gram, cross = wide(features.T @ features), wide(features.T @ missing)
        self.gram, self.cross = self.gram.to(gram.device).add_(gram), self.cross.to(cross.device).add_(cross)
        self._error.add(states, targets, first)

    def add_up(self) -> None:
        """Make the sums those of all processes that measure together."""
        self.gram, self.cross = summed(self.gram), summed(self.cross)
        self._error.add_up()

    def error(self, change: Tensor | None = None) -> float:
        """Return the relative error of the states after a change of the map, from the sums, without another pass."""
        if change is None:
            return self._error.value()
        return self._error.value(float((change * (self.gram @ change - 2 * self.cross)).sum()))

    def solve(self, ridge: float) -> Tensor:
        """Return the change of the map, shape (P, D), in float64; NaN where rounding leaves nothing to solve with."""
        diagonal = self.gram.diagonal()
        strength = torch.full_like(diagonal, float(diagonal[: len(diagonal) - self.constant].mean()))
        if self.constant:  # its scale is none of the inputs'
            strength[-1] = diagonal[-1]
        matrix = self.gram.clone()
        # A feature that is always zero stays as it is, also where all are.
        matrix.diagonal().add_((ridge * strength).clamp_(min=torch.finfo(torch.float64).tiny))
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if bool(failed):
            return torch.full_like(self.cross, math.nan)
        return torch.cholesky_solve(self.cross, factor)


@dataclass(frozen=True, eq=False)
class Solution:
    """A change of a map, shape (P, D), in float64, and the ridge that it was solved with."""

    change: Tensor
    ridge: float


def solve(fit: Sums, held: Sums, ridges: Sequence[float] = RIDGES) -> Solution:
    """Return the solution of one of the ridges that leaves the smallest error on held-out rows.

    Where the removed part is linear in the inputs of the map, a fit with nearly no ridge is exact: then it is taken.
    """
    exact = Solution(fit.solve(LINEAR_RIDGE), LINEAR_RIDGE)
    if held.error(exact.change) < LINEAR * held.error():
        return exact
    best, least = exact, math.inf
    for ridge in ridges:
        change = fit.solve(ridge)
        if (error := held.error(change)) < least:
            best, least = Solution(change, ridge), error
    return best
