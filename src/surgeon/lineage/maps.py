"""Which position of a candidate's axis each position of the child's axis is: by correlation of their samples."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from surgeon.lineage.numbers import Array

LEAST = 0.5  # correlation of two positions that are one
SHARE = 0.25  # of the positions that have a match: below, two axes have nothing to do with one another
TIE = 1e-4
BLOCK = 2048  # positions at once

KINDS = ("identity", "subset", "clone", "pad", "permutation")


@dataclass(frozen=True, eq=False)
class AxisMap:
    """The position of the candidate that each position of the child is, -1 where none; `size` is the candidate's.

    `signs` are -1 where the two are opposite, `strength` is the median |correlation| of those that match.
    """

    index: Array
    size: int
    signs: Array
    strength: float = 1.0

    @classmethod
    def same(cls, size: int) -> "AxisMap":
        """Return the map of an axis onto itself."""
        return cls(np.arange(size), size, np.ones(size, np.float32))

    @property
    def matched(self) -> Array:
        """The positions of the child that have a match."""
        return np.flatnonzero(self.index >= 0)

    @property
    def kind(self) -> str:
        """One of KINDS: "pad" has new positions, "clone" one twice, "permutation" is any other order."""
        known = self.index[self.index >= 0]
        is_ordered = bool(np.all(np.diff(known) > 0))
        if len(np.unique(known)) < len(known):
            return "clone"
        if len(known) < len(self.index):
            return "pad" if is_ordered else "permutation"
        if not is_ordered:
            return "permutation"
        return "identity" if len(known) == self.size else "subset"

    @property
    def is_same(self) -> bool:
        """Whether each position is the one of the same number."""
        return len(self.index) == self.size and bool(np.array_equal(self.index, np.arange(self.size)))

    def words(self, shown: str = "") -> str:
        """Return the map in words: "1536 → 1024: 512 dropped, order kept"."""
        old, new = self.size, len(self.index)
        known = self.index[self.index >= 0]
        used, fresh = len(np.unique(known)), new - len(known)
        parts = {
            "identity": ["unchanged"],
            "subset": [f"{old - used} dropped", "order kept"],
            "clone": [f"{used} copied to {len(known)}"],
            "pad": [f"{used} kept", f"{fresh} new"],
            "permutation": ["another order"] + ([f"{old - used} dropped"] if used < old else []),
        }[self.kind]
        if self.kind in ("clone", "permutation") and fresh:
            parts.append(f"{fresh} new")
        if bool(np.any(self.signs[self.matched] < 0)):
            parts.append(f"{int(np.sum(self.signs[self.matched] < 0))} with the opposite sign")
        sizes = f"{old}" if old == new else f"{old} → {new}"
        return f"{sizes}: {', '.join(parts)}{shown}"

    def runs(self) -> list[list[int]]:
        """Return the map in runs of (first position or -1, how many), as receipts have them."""
        found: list[list[int]] = []
        for place in self.index.tolist():
            if found and (
                (place < 0 and found[-1][0] < 0) or (found[-1][0] >= 0 and place == found[-1][0] + found[-1][1])
            ):
                found[-1][1] += 1
            else:
                found.append([place, 1])
        return found


def matched(child: Array, parent: Array, *, centred: bool) -> AxisMap | None:
    """Return the map of the columns of two samples, None where they have nothing to do with one another.

    Both have shape (samples, positions), with the same samples; `centred` subtracts each column's mean first. A pair
    counts above |correlation| 0.5, and above what the largest of as many chances is: sqrt(2 ln(d d') / samples).
    """
    one, other = _normalised(child, centred), _normalised(parent, centred)
    size, new, samples = other.shape[1], one.shape[1], len(one)
    floor = max(LEAST, float(np.sqrt(2 * np.log(max(2, size * new)) / samples)))
    if size == new:  # the commonest, and quick to see
        own = np.einsum("ij,ij->j", one, other)
        if bool(np.all(np.abs(own) > max(0.9, floor))):
            return AxisMap(np.arange(size), size, np.sign(own), float(np.median(np.abs(own))))
    index, signs, strength = np.full(new, -1), np.ones(new, np.float32), np.zeros(new, np.float32)
    for start in range(0, new, BLOCK):
        found = one[:, start : start + BLOCK].T @ other
        places = np.arange(start, start + len(found))
        best = np.abs(found).argmax(1)
        height = np.abs(found[np.arange(len(found)), best])
        own_place = places[places < size]
        own = np.abs(found[np.arange(len(own_place)), own_place])
        best[: len(own)] = np.where(own >= height[: len(own)] - TIE, own_place, best[: len(own)])
        good = height > floor
        index[places] = np.where(good, best, -1)
        signs[places] = np.where(good, np.sign(found[np.arange(len(found)), best]), 1)
        strength[places] = height
    if np.mean(index >= 0) < SHARE:
        return None
    index = _filled(index, size)
    return AxisMap(index, size, signs, float(np.median(strength[index >= 0])))


def _filled(index: Array, size: int) -> Array:
    """Return a map in which single positions without a match continue what stands on both sides of them.

    Training may move a position far; it is still the same one where its neighbours are.
    """
    filled = index.copy()
    known = np.flatnonzero(index >= 0)
    for before, after in pairwise(known):
        if after - before > 1 and index[after] - index[before] == after - before:
            filled[before : after + 1] = np.arange(index[before], index[after] + 1)
    first, last, end = known[0], known[-1], len(index)
    if index[first] == first:
        filled[:first] = np.arange(first)
    if index[last] + end - 1 - last == size - 1:
        filled[last:] = np.arange(index[last], size)
    return filled


def _normalised(rows: Array, centred: bool) -> Array:
    values = rows - rows.mean(0) if centred else rows
    lengths = np.sqrt(np.einsum("ij,ij->j", values, values))
    normal: Array = values / np.where(lengths > 0, lengths, 1)
    return normal
