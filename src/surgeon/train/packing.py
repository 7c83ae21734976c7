"""Packing: which pieces of data go into which row, and how often; pure functions of their lengths."""

import math
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from surgeon.errors import DataError

Numbers = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Packing:
    """Row i holds the pieces `pieces[offsets[i]:offsets[i + 1]]`, by their numbers. Both are int64."""

    pieces: Numbers
    offsets: Numbers

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, index: int) -> Numbers:
        """Return the numbers of a row's pieces."""
        return self.pieces[self.offsets[index] : self.offsets[index + 1]]

    def of(self, pieces: ArrayLike) -> "Packing":
        """Return the rows with `pieces[i]` in the place of i, for a packing of some of the pieces."""
        return Packing(np.asarray(pieces, np.int64)[self.pieces], self.offsets)

    def chosen(self, rows: ArrayLike) -> "Packing":
        """Return the rows with these numbers, in this order."""
        contents = [self.row(int(row)) for row in np.asarray(rows)]
        sizes = [len(pieces) for pieces in contents]
        return Packing(np.concatenate([*contents, self.pieces[:0]]), np.cumsum([0, *sizes]))


def one_per_row(lengths: ArrayLike) -> Packing:
    """Return one row for each piece, in their order."""
    count = len(np.asarray(lengths))
    return Packing(np.arange(count), np.arange(count + 1))


def pack(lengths: ArrayLike, row_length: int, *, seed: int) -> Packing:
    """Return rows of at most `row_length` tokens that hold every piece once; the rows are in random order.

    Best fit, decreasing: the longest piece first, each into the row that it fills best. Pieces of one length and rows
    with equal room are placed together, so the time is that of a sort. The choice among equal pieces, and the order of
    the rows, derive from `seed`.
    Source: Ding et al. 2024, arXiv:2404.10830 (best fit for training data).
    """
    sizes = np.asarray(lengths, np.int64)
    assert sizes.ndim == 1, sizes.shape
    assert not len(sizes) or 0 < sizes.min() <= sizes.max() <= row_length, "a piece fits into a row"
    random = np.random.default_rng(seed)
    shuffled = random.permutation(len(sizes))
    order = shuffled[np.argsort(-sizes[shuffled], kind="stable")]
    rows, num_rows = _best_fit(sizes[order], row_length)
    rows = random.permutation(num_rows)[rows]
    by_row = np.argsort(rows, kind="stable")
    counts = np.bincount(rows, minlength=num_rows)
    return Packing(order[by_row], np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))


def _best_fit(sizes: Numbers, row_length: int) -> tuple[Numbers, int]:
    """Return the row that each piece goes into, shape (N,), and how many rows there are; `sizes` are descending."""
    rows = np.empty(len(sizes), np.int64)
    room = _Room()
    num_rows = 0
    for size, start, stop in _runs(sizes):
        while start < stop:
            left = room.least(size)
            if left is None:
                left = row_length
                needed = -(-(stop - start) // (row_length // size))
                room.add(left, np.arange(num_rows, num_rows + needed))
                num_rows += needed
            each = left // size  # best fit: the chosen row stays the tightest one until it is full
            taken = room.take(left, -(-(stop - start) // each))
            chosen = np.repeat(taken, each)[: stop - start]
            rows[start : start + len(chosen)] = chosen
            start += len(chosen)
            in_last = len(chosen) - (len(taken) - 1) * each
            room.add(left - each * size, taken[:-1])
            room.add(left - in_last * size, taken[-1:])
    return rows, num_rows


class _Room:
    """Rows by the tokens that still fit into them."""

    def __init__(self) -> None:
        self._rows: dict[int, list[Numbers]] = {}
        self._left: list[int] = []  # the room of some row, ascending

    def least(self, size: int) -> int | None:
        """Return the least room of a row into which `size` tokens fit, None where they fit into no row."""
        at = bisect_left(self._left, size)
        return self._left[at] if at < len(self._left) else None

    def take(self, left: int, count: int) -> Numbers:
        """Remove and return at most `count` rows with this room, and at least one."""
        stack, taken = self._rows[left], []
        while stack and count:
            rows = stack.pop()
            if len(rows) > count:
                stack.append(rows[count:])
                rows = rows[:count]
            taken.append(rows)
            count -= len(rows)
        if not stack:
            del self._rows[left]
            self._left.remove(left)
        return np.concatenate(taken)

    def add(self, left: int, rows: Numbers) -> None:
        if not left or not len(rows):
            return
        if left not in self._rows:
            self._rows[left] = []
            insort(self._left, left)
        self._rows[left].append(rows)


def _runs(sizes: Numbers) -> Iterator[tuple[int, int, int]]:
    """Yield each size with the begin and the end of its pieces."""
    borders = [*np.flatnonzero(np.diff(sizes, prepend=-1)).tolist(), len(sizes)]
    for start, stop in pairwise(borders):
        yield int(sizes[start]), start, stop


def split(documents: ArrayLike, fraction: float, *, seed: int) -> tuple[Numbers, Numbers]:
    """Return the numbers of the pieces to train on and of those held out, each ascending.

    `documents` is the document of each piece. Whole documents are held out, drawn at random, up to `fraction` of all
    pieces; where every drawn document is longer than that, the shortest one. Of a single document the last pieces are
    held out; a single piece is trained on.
    """
    numbers = np.asarray(documents)
    if fraction <= 0 or len(numbers) < 2:
        return np.arange(len(numbers)), np.arange(0)
    num_held = max(1, round(fraction * len(numbers)))
    which, counts = np.unique(numbers, return_counts=True)
    if len(which) == 1:
        num_held = min(num_held, len(numbers) - 1)
        return np.arange(len(numbers) - num_held), np.arange(len(numbers) - num_held, len(numbers))
    drawn = np.random.default_rng(seed).permutation(len(which))[: len(which) - 1]  # one at least is trained on
    held = drawn[np.cumsum(counts[drawn]) <= num_held]
    if not len(held):
        held = np.argsort(counts, kind="stable")[:1]
    is_held = np.isin(numbers, which[held])
    return np.flatnonzero(~is_held), np.flatnonzero(is_held)


def repeat(sources: ArrayLike, passes: Sequence[float], *, seed: int) -> Numbers:
    """Return the numbers of pieces, ascending, each as often as it is seen in an epoch.

    `sources` is the source of each piece. Source s is seen `passes[s]` times: 2 is twice, 0.5 is half of its pieces
    (rounded half up), drawn at random. Raises DataError for a negative or infinite number of passes.
    """
    numbers = np.asarray(sources)
    assert not len(numbers) or numbers.max() < len(passes), "a source has its number of passes"
    random = np.random.default_rng(seed)
    times = np.zeros(len(numbers), np.int64)
    for source, count in enumerate(passes):
        if not 0 <= count < math.inf:
            raise DataError(f"{count} passes over data are asked for", hint="A weight is 0 or more, such as 0.5 or 2.")
        which = np.flatnonzero(numbers == source)
        times[which] = math.floor(count)
        times[random.permutation(which)[: math.floor(count % 1 * len(which) + 0.5)]] += 1
    return np.repeat(np.arange(len(numbers)), times)
