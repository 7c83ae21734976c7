"""The grid of a quantized copy: dequantized weights lie on a few evenly spaced values within each group."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from surgeon.lineage.numbers import Array

GROUPS = (32, 64, 128)  # and whole rows
ON_GRID = 0.07  # mean distance to the nearest code; 0.25 for numbers that lie on no grid, 0.12 on a wrong one
# By bits: what an absolute maximum may have been divided by. The halves are torchao's, the powers of two llama.cpp's.
LEVELS = {8: (127.0, 127.5, 128.0), 4: (7.0, 7.5, 8.0), 3: (3.0, 3.5, 4.0)}
SMALL = 16  # codes up to here: rounding to bfloat16 moves larger ones by as much as a part of a step


@dataclass(frozen=True, slots=True)
class Grid:
    """A grid: bits of a code, how many numbers of a row share a scale (None: the row), and whether zero is free."""

    bits: int
    group: int | None
    is_affine: bool = False
    distance: float = 0.0

    def __str__(self) -> str:
        return f"int{self.bits} {'per row' if self.group is None else f'group {self.group}'}"


def grid_of(rows: Array) -> Grid | None:
    """Return the grid on which the rows of a matrix lie, None where they lie on none; rows of shape (R, inputs).

    Every number of bits, size of group and kind of scale is tried: w over absmax / (2^(b-1) - 1) for a symmetric grid,
    w - min over (max - min) / (2^b - 1) for an affine one. The measure is the mean distance to the nearest whole
    number, over small codes. An unquantized matrix has 0.25.
    """
    found: list[Grid] = []
    width = rows.shape[1]
    for group in (None, *(size for size in GROUPS if width % size == 0 and width > size)):
        parts = rows.reshape(-1, width if group is None else group)
        parts = parts[np.ptp(parts, axis=1) > 0]
        if len(parts) < 4 or parts.shape[1] < 16:
            continue
        if len(parts) > 4096:
            parts = parts[:: len(parts) // 4096]
        for bits, levels in LEVELS.items():
            distance = min(_symmetric(parts, level, bits) for level in levels)
            found.append(Grid(bits, group, False, distance))
            if bits < 8:
                found.append(Grid(bits, group, True, _affine(parts, bits)))
    return best_of(found)


def best_of(found: Sequence[Grid]) -> Grid | None:
    """Return the closest grid that is close; of nearly equal ones that of fewer bits, then of the larger group."""
    close = [grid for grid in found if grid.distance < ON_GRID]
    if not close:
        return None
    least = min(grid.distance for grid in close)
    equal = [grid for grid in close if grid.distance <= 1.5 * least + 0.002]
    return min(equal, key=lambda grid: (grid.bits, grid.is_affine, -(grid.group or 1 << 30)))


def _symmetric(parts: Array, level: float, bits: int) -> float:
    """Return the mean distance of small codes from whole numbers, where the largest |w| of a group is `level`."""
    codes = parts / (np.abs(parts).max(axis=1, keepdims=True) / np.float32(level))
    return _distance(codes, small=min(SMALL, 2 ** (bits - 1)))


def _affine(parts: Array, bits: int) -> float:
    low, high = parts.min(axis=1, keepdims=True), parts.max(axis=1, keepdims=True)
    return _distance((parts - low) / ((high - low) / np.float32(2**bits - 1)), small=2**bits)


def _distance(codes: Array, *, small: int) -> float:
    """Return the mean distance from whole numbers of the codes that are at most `small`, of those that are not 0."""
    used = codes[(np.abs(codes) <= small + 0.5) & (codes != 0)]
    if used.size < 64:
        return 1.0
    return float(np.abs(used - np.round(used)).mean())
