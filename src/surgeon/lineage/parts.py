"""How one tensor of the child differs from the candidate's: identical, cast, trained, of low rank, or on a grid.

All of it is judged on a block of rows, so that it costs a few ranges of bytes.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from surgeon.lineage.grids import Grid, grid_of
from surgeon.lineage.numbers import Array, rounded, step

Status = Literal["identical", "cast", "scaled", "changed", "zero"]

EDGE = 1.1  # above the largest singular value that rounding alone has
FLAT = 12  # sweeps that make the noise of rounding as large in all rows and columns
SAME_SCALE = 0.01


@dataclass(frozen=True, eq=False)
class Blocks:
    """The same rows of a tensor of the child and of the candidate, position by position, shape (R, n) both."""

    child: Array
    parent: Array
    child_dtype: str
    parent_dtype: str


@dataclass(frozen=True, slots=True)
class Difference:
    """How a tensor's rows differ: the share of equal numbers, the cosine, and ||difference|| / ||candidate's||.

    `scale` is the factor between the two that fits best; the distance is taken after it, and "scaled" is equal after it
    but for rounding, as the gains of a narrower state are. `rank` counts the singular
    values of the difference above what rounding alone makes, None where it was not looked at; `effective` is exp of the
    entropy of their squares. `grid` is the grid that the child lies on and the candidate does not.
    """

    role: str
    layer: int | None
    is_matrix: bool
    status: Status
    equal: float
    cosine: float
    distance: float
    scale: float = 1.0
    rank: int | None = None
    effective: float | None = None
    shape: tuple[int, int] = (0, 0)
    grid: Grid | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the difference as `--json` prints it."""
        return {
            "role": self.role,
            "layer": self.layer,
            "status": self.status,
            "equal": round(self.equal, 6),
            "cosine": round(self.cosine, 6),
            "distance": self.distance,
            "rank": self.rank,
            "effective_rank": None if self.effective is None else round(self.effective, 2),
            "grid": None if self.grid is None else str(self.grid),
        }


def difference(role: str, layer: int | None, blocks: Blocks, *, is_matrix: bool, is_transposed: bool) -> Difference:
    """Return how the child's block differs from the candidate's. `is_transposed`: its columns are outputs."""
    child, parent = blocks.child, blocks.parent
    equal = float(np.mean(child == parent))
    if equal == 1.0:
        is_cast = blocks.child_dtype != blocks.parent_dtype
        return Difference(role, layer, is_matrix, "cast" if is_cast else "identical", 1.0, 1.0, 0.0)
    if not child.any():
        return Difference(role, layer, is_matrix, "zero", equal, 0.0, 1.0)
    if blocks.child_dtype != blocks.parent_dtype and np.array_equal(rounded(parent, blocks.child_dtype), child):
        return Difference(role, layer, is_matrix, "cast", equal, 1.0, _relative(child - parent, parent))
    product = float(np.vdot(child.astype(np.float64), parent))
    lengths = float(np.linalg.norm(child)), float(np.linalg.norm(parent))
    cosine = product / max(1e-30, lengths[0] * lengths[1])
    scale = product / max(1e-30, lengths[1] ** 2)
    scale = scale if abs(scale - 1) > SAME_SCALE and cosine > 0.3 else 1.0
    change = child - np.float32(scale) * parent
    if scale != 1.0 and bool(np.all(np.abs(change) <= step(child, blocks.child_dtype))):
        return Difference(role, layer, is_matrix, "scaled", equal, cosine, _relative(change, child), scale)
    rank = effective = grid = None
    if is_matrix:
        if scale == 1.0:
            rank, effective = ranks(change, child, blocks.child_dtype)
        grid = grid_of(child.T) if is_transposed else grid_of(child)
        theirs = None if grid is None else grid_of(parent.T) if is_transposed else grid_of(parent)
        if grid is not None and theirs is not None and (theirs.bits, theirs.group) == (grid.bits, grid.group):
            grid = None  # both lie on it: it says nothing
    distance = _relative(change, np.float32(scale) * parent)
    shape = (int(change.shape[0]), int(change.shape[1]))
    return Difference(role, layer, is_matrix, "changed", equal, cosine, distance, scale, rank, effective, shape, grid)


def _relative(change: Array, parent: Array) -> float:
    return float(np.linalg.norm(change) / max(1e-30, float(np.linalg.norm(parent))))


def ranks(change: Array, child: Array, dtype: str) -> tuple[int, float]:
    """Return how many singular values of a difference are above those of rounding alone, and the effective rank.

    Rounding to the child's dtype adds noise with variance step^2 / 12 to each number, and its largest singular value
    is about sigma (sqrt(R) + sqrt(n)). As the step follows the size of the number, rows and columns are first scaled
    so that the variance is 1 everywhere on average; that changes no rank.
    """
    effective = _effective(np.linalg.svd(change, compute_uv=False))
    variance = step(child, dtype).astype(np.float64) ** 2 / 12
    rows, columns = np.ones(len(change)), np.ones(change.shape[1])
    for _ in range(FLAT):
        rows = 1 / np.maximum((variance * columns).mean(1), 1e-300)
        columns = 1 / np.maximum((variance * rows[:, None]).mean(0), 1e-300)
    white = change * np.sqrt(rows)[:, None] * np.sqrt(columns)
    values = np.linalg.svd(white, compute_uv=False)
    edge = EDGE * (np.sqrt(change.shape[0]) + np.sqrt(change.shape[1]))
    return int(np.sum(values > edge)), effective


def _effective(values: Array) -> float:
    shares = values.astype(np.float64) ** 2
    shares = shares[shares > 0] / max(1e-300, float(shares.sum()))
    return float(np.exp(-np.sum(shares * np.log(shares))))
