"""From gradients to scores: how much training on a row helps with a query. Pure functions of arrays."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from surgeon.errors import MeasureError
from surgeon.text import size

Array = NDArray[np.float32]
Scores = NDArray[np.float64]
BLOCK = 1 << 24  # numbers in float64 at a time: 128 MB


@dataclass(frozen=True)
class Method:
    """A way to score rows. `about` is its sentence for people.

    `solves`: all rows' gradients are kept, and a system of equations is solved; else a row's score is its dot product
    with the query's gradient, both of length 1 where `is_cosine`. `by_rate`: several checkpoints count by their
    learning rates, else alike.

    `shape` says what is divided by the root of Adam's mean squares: "rows", whose gradients are then steps of Adam, or
    "both", rows and queries, each by the square root of that root: the gradients of weights that are stretched so that
    a step of Adam is one of plain descent. `needs_shape`: it is refused without the optimiser's state.
    """

    about: str
    solves: bool = False
    is_cosine: bool = False
    shape: Literal["rows", "both"] | None = None
    needs_shape: bool = False
    by_rate: bool = False


METHODS = {
    "trak": Method("gradients through the inverse of their covariance, with a ridge", solves=True, shape="both"),
    "less": Method(
        "cosine of Adam's step and the query's gradient", is_cosine=True, shape="rows", needs_shape=True, by_rate=True
    ),
    "cosine": Method("cosine of gradients", is_cosine=True),
    "tracin": Method("dot product of gradients", by_rate=True),
}


def needed_bytes(rows: int, width: int) -> int:
    """Return the memory that `trak` takes at most, in bytes: the matrix, its factors, and a block of gradients."""
    return 3 * 8 * min(rows, width) ** 2 + 2 * 8 * BLOCK


def trak(rows: Array, queries: Array, *, ridge: float, free: int | None = None) -> Scores:
    """Return q' (Φ'Φ + n λ I)^-1 φ for each row φ of `rows`, (n, k), and each q of `queries`, (Q, k): shape (n, Q).

    λ is `ridge` times the mean of |φ|²; without one the matrix has no inverse where k > n. The smaller of the two
    equal systems is solved, of n or of k equations, in float64. Raises MeasureError where it does not fit into `free`
    bytes.
    Source: Park et al. 2023, arXiv:2303.14186, eq. 13, of one model, with the gradient of the loss in place of that of
    the margin (then the factor Q there is 1), and a ridge.
    """
    assert ridge > 0, "without a ridge the matrix has no inverse"
    n, k = rows.shape
    if free is not None and needed_bytes(n, k) > free:
        raise MeasureError(
            f"{min(n, k):,} equations take {size(needed_bytes(n, k))}, and {size(free)} are free",
            hint="Project to fewer numbers, such as --projection 4, or use --method cosine.",
        )
    if n <= k:
        gram, cross = np.zeros((n, n)), np.zeros((n, len(queries)))
        for part in _slices(k, n):
            block = rows[:, part].astype(np.float64)
            gram += block @ block.T
            cross += block @ queries[:, part].T.astype(np.float64)
        return _solved(gram, cross, ridge * float(np.trace(gram)))
    moments = np.zeros((k, k))
    for part in _slices(n, k):
        block = rows[part].astype(np.float64)
        moments += block.T @ block
    directions = _solved(moments, queries.T.astype(np.float64), ridge * float(np.trace(moments)))
    return np.concatenate([rows[part].astype(np.float64) @ directions for part in _slices(n, k)])


def dots(rows: Array, queries: Array, *, is_cosine: bool) -> Scores:
    """Return the dot product, or the cosine, of each of `rows`, (n, k), with each of `queries`, (Q, k): (n, Q)."""
    left, right = rows.astype(np.float64), queries.astype(np.float64)
    if is_cosine:
        left, right = _unit(left), _unit(right)
    found: Scores = left @ right.T
    return found


def _unit(vectors: Scores) -> Scores:
    """Return vectors of length 1; those of zeros stay so."""
    unit: Scores = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    return unit


def _solved(matrix: Scores, right: Scores, damping: float) -> Scores:
    """Return the solution with `damping` on the diagonal. A matrix of zeros, of rows without gradients, gives zeros."""
    if not damping:
        return np.zeros_like(right)
    matrix[np.diag_indices_from(matrix)] += damping
    return np.linalg.solve(matrix, right).astype(np.float64, copy=False)


def _slices(count: int, other: int) -> Iterator[slice]:
    step = max(1, BLOCK // max(1, other))
    return (slice(start, min(start + step, count)) for start in range(0, count, step))
