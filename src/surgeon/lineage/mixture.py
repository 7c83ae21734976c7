"""Whether the child is a weighted mean of several candidates, and with which weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from surgeon.lineage.numbers import Array, step

STEPS = 4  # of the child's dtype: where the candidates differ by less, rounding decides what the child is
FITS = 0.98  # share of the variance that a mixture explains
LEAST_WEIGHT = 0.02
LEAST_NUMBERS = 256


@dataclass(frozen=True)
class Mixture:
    """The weight of each candidate, its standard error, and how it varies over the tensors that were looked at.

    The weights add up to 1. `explained` is the share of the variance of child minus the first candidate.
    """

    weights: Mapping[str, float]
    errors: Mapping[str, float]
    spread: Mapping[str, float]
    explained: float
    is_sliced: bool  # every tensor is one candidate's alone

    @property
    def is_even(self) -> bool:
        """Whether the weights are those of all tensors."""
        return all(value < 0.05 for value in self.spread.values())

    def __str__(self) -> str:
        parts = [f"{weight:.3g} {name}" for name, weight in self.weights.items()]
        varied = "" if self.is_even else f", varying by {max(self.spread.values()):.2g} over tensors"
        return f"{' + '.join(parts)} (s.e. {max(self.errors.values()):.1g}, R² {self.explained:.3f}{varied})"

    def to_dict(self) -> dict[str, Any]:
        """Return the mixture as `--json` prints it."""
        return {
            "weights": dict(self.weights),
            "errors": dict(self.errors),
            "spread": dict(self.spread),
            "explained": self.explained,
            "is_even": self.is_even,
        }


def mixture_of(names: Sequence[str], blocks: Sequence[tuple[Array, Sequence[Array]]], dtype: str) -> Mixture | None:
    """Return the mixture of candidates that the child is, None where it is none.

    `blocks` are (the child's rows, those of each candidate in order) for several tensors. Least squares of child - p1
    on pk - p1, over numbers where some candidates differ by more than 4 steps of the child's dtype: the child's
    rounding goes along with p1 and would pull the weights. A mixture has at least two weights above 0.02, and
    explains 98 %.
    """
    sets = []
    for child, parents in blocks:
        base = parents[0]
        others = np.stack([parent - base for parent in parents[1:]], -1).reshape(-1, len(names) - 1)
        change = (child - base).reshape(-1)
        clear = np.abs(others).max(1) > STEPS * step(child, dtype).reshape(-1)
        if clear.sum() >= LEAST_NUMBERS:
            sets.append((others[clear].astype(np.float64), change[clear].astype(np.float64)))
    if not sets:
        return None
    x, y = np.concatenate([a for a, _ in sets]), np.concatenate([b for _, b in sets])
    fitted = [_solved(a, b) for a, b in sets]
    residual = sum(float(np.square(b - a @ w).sum()) for (a, b), w in zip(sets, fitted, strict=True))
    total = float(np.square(y).sum())
    explained = 1 - residual / total if total else 0.0
    weights = _solved(x, y)
    if explained < FITS:
        return None
    noise = float(np.square(y - x @ weights).sum()) / max(1, len(y) - x.shape[1])
    errors = np.sqrt(np.maximum(np.diag(np.linalg.pinv(x.T @ x)) * noise, 0))
    all_weights = np.append(1 - weights.sum(), weights)
    all_errors = np.append(np.sqrt((errors**2).sum()), errors)
    per_set = np.array([np.append(1 - w.sum(), w) for w in fitted])
    if np.sum(np.abs(all_weights) > np.maximum(LEAST_WEIGHT, 3 * all_errors)) < 2:
        return None
    used = [k for k in range(len(names)) if abs(all_weights[k]) > LEAST_WEIGHT or per_set[:, k].std() > LEAST_WEIGHT]
    return Mixture(
        {names[k]: float(all_weights[k]) for k in used},
        {names[k]: float(all_errors[k]) for k in used},
        {names[k]: float(per_set[:, k].std()) for k in used},
        explained,
        bool(np.all(np.minimum(np.abs(per_set), np.abs(per_set - 1)) < LEAST_WEIGHT)),
    )


def _solved(x: Array, y: Array) -> Array:
    found: Array = np.linalg.lstsq(x.T @ x, x.T @ y, rcond=1e-10)[0]
    return found
