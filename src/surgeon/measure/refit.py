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


class Sums:
    """The sums of a fit over rows: products in float32, sums in float64. With `constant`, the last input is one.

    `shape` is that of the map: its inputs and its outputs.
    """

    def __init__(self, shape: tuple[int, int], *, constant: bool, device: torch.device | None = None) -> None:
        inputs, outputs = shape
        where = None if device is None or device.type == "mps" else device
        self.constant = constant
        self.num_rows = 0
        self.gram = torch.zeros(inputs, inputs, dtype=torch.float64, device=where)  # G
        self.cross = torch.zeros(inputs, outputs, dtype=torch.float64, device=where)  # B
        self._missing = 0.0  # sum w^2 |t - h|^2
        self._wanted = 0.0  # sum w^2 |t|^2

    def add(self, inputs: Tensor, states: Tensor, targets: Tensor, first: Tensor) -> None:
        """Add rows: the inputs of the map, the states as they are and as they are wanted, and which are first tokens.

        A row that is wanted to be zero has no relative error, and does not enter.
        """
        wanted = targets.float()
        norms = wanted.norm(dim=-1, keepdim=True)
        weights = torch.where(norms > 0, (1 + (FIRST - 1) * first[:, None]) / norms, torch.zeros_like(norms))
        features, missing = weights * inputs.float(), weights * (wanted - states.float())
        self.gram += wide(features.T @ features)
        self.cross += wide(features.T @ missing)
        self._missing += float(wide(missing).square().sum())
        self._wanted += float(wide(weights * wanted).square().sum())
        self.num_rows += len(inputs)

    def add_up(self) -> None:
        """Make the sums those of all processes that measure together."""
        self.gram, self.cross = summed(self.gram), summed(self.cross)
        numbers = summed(torch.tensor([self._missing, self._wanted, self.num_rows], dtype=torch.float64))
        self._missing, self._wanted, rows = numbers.tolist()
        self.num_rows = round(rows)

    def error(self, change: Tensor | None = None) -> float:
        """Return the relative error of the states, weighted, after a change of the map: the root of a mean of squares.

        It is computed from the sums, without another pass.
        """
        left = self._missing
        if change is not None:
            left += float((change * (self.gram @ change - 2 * self.cross)).sum())
        if math.isnan(left):
            return math.inf
        return (max(0.0, left) / self._wanted) ** 0.5 if self._wanted else 0.0

    def solve(self, ridge: float) -> Tensor:
        """Return the change of the map, shape (P, D), in float64; NaN where rounding leaves nothing to solve with."""
        diagonal = self.gram.diagonal()
        strength = torch.full_like(diagonal, float(diagonal[: len(diagonal) - self.constant].mean()))
        if self.constant:  # its scale is none of the inputs'
            strength[-1] = diagonal[-1]
        # A feature that is always zero stays as it is, also where all are.
        strength = (ridge * strength).clamp_(min=torch.finfo(torch.float64).tiny)
        factor, failed = torch.linalg.cholesky_ex(self.gram + strength.diag())
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
    solutions = [Solution(fit.solve(ridge), ridge) for ridge in ridges]
    return min(solutions, key=lambda solution: held.error(solution.change))
