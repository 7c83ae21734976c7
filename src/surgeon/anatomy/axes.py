"""Named axes, written as in einops: "(kv_heads group q_dim) hidden".

A dimension is a name, a number, or a parenthesised product; "+" joins what is stored one after the other. Both nest:
GPT-NeoX stores, head by head, its query, key and value: "(kv_heads (group q_dim + k_dim + v_dim)) hidden".
"""

import re
from abc import abstractmethod
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, reduce
from itertools import accumulate, chain
from math import prod
from operator import sub
from typing import NamedTuple, Protocol, Self, TypeVar, overload


@dataclass(frozen=True, slots=True)
class Axis:
    """A named axis, or a number of that length."""

    name: str

    def size(self, sizes: Mapping[str, int]) -> int:
        return int(self.name) if self.name.isdigit() else sizes[self.name]


@dataclass(frozen=True, slots=True)
class Product:
    """Factors, outermost first: the last one varies fastest."""

    factors: tuple["Dim", ...]

    def size(self, sizes: Mapping[str, int]) -> int:
        return prod(factor.size(sizes) for factor in self.factors)


@dataclass(frozen=True, slots=True)
class Sum:
    """Blocks laid end to end."""

    blocks: tuple["Dim", ...]

    def size(self, sizes: Mapping[str, int]) -> int:
        return sum(block.size(sizes) for block in self.blocks)


Dim = Axis | Product | Sum


N = TypeVar("N", int, float)


class _Runs(Sequence[N]):
    """Numbers that change seldom, as runs: an axis may be long, and its runs are few.

    Frozen. A tuple of the same numbers is equal. Stored compactly, for where an axis has many runs after all.
    """

    __slots__ = ("_ends", "_firsts")
    _firsts: "array[N]"  # the first number of each run
    _ends: "array[int]"  # where each run ends

    @classmethod
    @abstractmethod
    def of(cls, numbers: Iterable[N]) -> Self:
        """Return these numbers as runs."""

    @staticmethod
    @abstractmethod
    def _at(first: N, offset: int) -> N:
        """Return the number `offset` places after the first of a run."""

    @property
    def runs(self) -> Iterator[tuple[N, int]]:
        """The runs: the first number and the length of each."""
        return zip(self._firsts, map(sub, self._ends, chain((0,), self._ends)), strict=False)

    def between(self, start: int, stop: int) -> Iterator[tuple[N, int]]:
        """Yield the runs of the numbers [start, stop)."""
        number = bisect_right(self._ends, start)
        begin = self._ends[number - 1] if number else 0
        while start < stop:
            end = min(self._ends[number], stop)
            yield self._at(self._firsts[number], start - begin), end - start
            start = begin = end
            number += 1

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __iter__(self) -> Iterator[N]:
        return (self._at(first, offset) for first, length in self.runs for offset in range(length))

    @overload
    def __getitem__(self, place: int) -> N: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[N, ...]: ...
    def __getitem__(self, place: int | slice) -> N | tuple[N, ...]:
        if isinstance(place, slice):
            return tuple(self)[place]
        at = range(len(self))[place]  # raises IndexError
        return next(self.between(at, at + 1))[0]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, type(self)):
            return tuple(self) == other
        return self._ends == other._ends and self._firsts == other._firsts

    def __hash__(self) -> int:  # quick, and not that of an equal tuple: never mix the two as keys
        return hash((self._firsts.tobytes(), self._ends.tobytes()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(self.runs)})"


class Index(_Runs[int]):
    """Positions in runs that count up by one; -1, which is a new position, repeats."""

    __slots__ = ("highest",)
    highest: int  # -1 where all positions are new, or there is none

    def __init__(self, runs: Iterable[tuple[int, int]]) -> None:
        firsts, ends = array("q"), array("q")
        end, following, highest = 0, None, -1
        for first, length in runs:
            if not length:
                continue
            end += length
            if first == following:
                ends[-1] = end
            else:
                firsts.append(first)
                ends.append(end)
            following = first if first < 0 else first + length
            highest = max(highest, following - 1)
        self._firsts, self._ends, self.highest = firsts, ends, highest

    @staticmethod
    def _at(first: int, offset: int) -> int:
        return first if first < 0 else first + offset

    @classmethod
    def of(cls, numbers: Iterable[int]) -> "Index":
        return numbers if isinstance(numbers, Index) else cls((number, 1) for number in numbers)

    @classmethod
    def up_to(cls, length: int) -> "Index":
        """Return the positions 0 to length - 1."""
        return cls(((0, length),))

    @property
    def has_new(self) -> bool:
        """Whether a position is new."""
        return -1 in self._firsts

    @property
    def is_whole(self) -> bool:
        """Whether these are the positions 0 to length - 1."""
        return not self._firsts or (len(self._firsts) == 1 and self._firsts[0] == 0)

    def of_old(self, before: "Index") -> "Index":
        """Return the positions that these positions of `before` come from."""
        return Index(
            run
            for first, length in self.runs
            for run in (((first, length),) if first < 0 else before.between(first, first + length))
        )


class Scale(_Runs[float]):
    """Factors in runs of the same."""

    __slots__ = ()

    def __init__(self, runs: Iterable[tuple[float, int]]) -> None:
        firsts, ends = array("d"), array("q")
        end, last = 0, None
        for factor, length in runs:
            if not length:
                continue
            end += length
            if factor == last:
                ends[-1] = end
            else:
                firsts.append(factor)
                ends.append(end)
            last = factor
        self._firsts, self._ends = firsts, ends

    @staticmethod
    def _at(first: float, offset: int) -> float:
        return first

    @classmethod
    def of(cls, numbers: Iterable[float]) -> "Scale":
        return numbers if isinstance(numbers, Scale) else cls((number, 1) for number in numbers)

    @classmethod
    def all(cls, factor: float, length: int) -> "Scale":
        """Return the same factor `length` times."""
        return cls(((factor, length),))

    @property
    def factors(self) -> frozenset[float]:
        """The different factors."""
        return frozenset(self._firsts)


class Run(NamedTuple):
    """Positions [at, at + length): old positions from `first` on, new where it is -1, with one factor."""

    at: int
    first: int
    length: int
    scale: float


def runs_of(index: Index, scale: Scale) -> Iterator[Run]:
    """Yield the runs of which both positions and factor are one run."""
    assert len(index) == len(scale), "each position has a factor"
    at = 0
    if len(scale.factors) == 1:
        (factor,) = scale.factors
        for first, length in index.runs:
            yield Run(at, first, length, factor)
            at += length
        return
    for first, length in index.runs:
        for factor, count in scale.between(at, at + length):
            yield Run(at, first, count, factor)
            at, first = at + count, first + count if first >= 0 else first


@dataclass(frozen=True, slots=True, init=False)
class Places:
    """The positions of a new dimension: for each, the old position that it comes from (-1: none) and a factor."""

    index: Index
    scale: Scale

    def __init__(self, index: Iterable[int], scale: Iterable[float]) -> None:
        object.__setattr__(self, "index", Index.of(index))
        object.__setattr__(self, "scale", Scale.of(scale))

    @classmethod
    def of_runs(cls, runs: Iterable[tuple[int, int, float]]) -> "Places":
        """Return the places that runs of (first old position, length, factor) make, one after the other."""
        listed = list(runs)
        return cls(
            Index((first, length) for first, length, _ in listed), Scale((scale, length) for _, length, scale in listed)
        )

    @property
    def runs(self) -> Iterator[Run]:
        """The runs of which both positions and factor are one run."""
        return runs_of(self.index, self.scale)

    @property
    def are_same(self) -> bool:
        """Whether each position comes from the old position of the same number, times 1."""
        return self.index.is_whole and self.scale.factors <= {1.0}


class AxisMaps(Protocol):
    """Says where the positions of an axis come from; `block` are the axes that it is multiplied with, itself included.

    The block tells the heads of queries (which have a "group") from those of keys. None: the axis stays as it is.
    """

    def __call__(self, axis: str, block: frozenset[str]) -> Places | None: ...


def shape(dims: tuple[Dim, ...], sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Return the shape that `sizes` gives a tensor of these dimensions. Raises KeyError for an axis without size."""
    return tuple(dim.size(sizes) for dim in dims)


@cache
def axes_of(dim: Dim) -> frozenset[str]:
    """Return the names of all axes in a dimension."""
    match dim:
        case Axis(name):
            return frozenset() if name.isdigit() else frozenset({name})
        case Product(children) | Sum(children):
            return frozenset().union(*map(axes_of, children))


def places(dim: Dim, sizes: Mapping[str, int], maps: AxisMaps, block: frozenset[str] = frozenset()) -> Places:
    """Return the old position of each position of the new `dim`; the axes of the old one have `sizes`.

    A position of a product comes from nowhere when any of its factors does; factors multiply.
    """
    match dim:
        case Axis(name):
            length = dim.size(sizes)
            return maps(name, block | {name}) or Places(Index.up_to(length), Scale.all(1.0, length))
        case Sum(blocks):
            starts = accumulate((part.size(sizes) for part in blocks), initial=0)
            parts = [places(part, sizes, maps, block) for part in blocks]
            return Places.of_runs(
                (run.first if run.first < 0 else run.first + start, run.length, run.scale)
                for start, part in zip(starts, parts, strict=False)
                for run in part.runs
            )
        case Product(factors):
            inner = block | {factor.name for factor in factors if isinstance(factor, Axis)}
            parts = [places(factor, sizes, maps, inner) for factor in factors]
            return reduce(_multiplied, zip(parts, (factor.size(sizes) for factor in factors), strict=True))[0]


def _multiplied(outer: tuple[Places, int], inner: tuple[Places, int]) -> tuple[Places, int]:
    """Return the places of a product of two factors, each with its old length, and the old length of the product."""
    (outside, outer_length), (inside, length) = outer, inner
    inside_runs = list(inside.runs)
    is_whole = inside.are_same and len(inside.index) == length

    def runs() -> Iterator[tuple[int, int, float]]:
        for run in outside.runs:
            if is_whole:  # the commonest: then a run stays a run
                yield run.first if run.first < 0 else run.first * length, run.length * length, run.scale
                continue
            for place in range(run.first, run.first + run.length) if run.first >= 0 else (-1,) * run.length:
                for part in inside_runs:
                    is_new = place < 0 or part.first < 0
                    yield -1 if is_new else place * length + part.first, part.length, run.scale * part.scale

    return Places.of_runs(runs()), outer_length * length


Keep = Callable[[str, Mapping[str, int]], Index | None]  # from an axis, and positions on the axes around it


def survivors(dim: Dim, sizes: Mapping[str, int], keep: Keep, outer: Mapping[str, int] | None = None) -> Index:
    """Return the positions of `dim`, ascending, of which `keep` keeps every coordinate.

    `keep` returns which positions of an axis stay, None for all. It gets the positions on the axes before it in a
    product, so that each of "kv_heads" may keep other positions of "group".
    """
    around = outer or {}
    match dim:
        case Axis(name):
            kept = None if name.isdigit() else keep(name, around)
            return Index.up_to(dim.size(sizes)) if kept is None else kept
        case Sum(blocks):
            starts = accumulate((block.size(sizes) for block in blocks), initial=0)
            parts = [survivors(block, sizes, keep, around) for block in blocks]
            return Index(
                (start + first, length)
                for start, part in zip(starts, parts, strict=False)
                for first, length in part.runs
            )
        case Product(factors):
            first, rest = factors[0], factors[1] if len(factors) == 2 else Product(factors[1:])
            length = rest.size(sizes)
            kept_first = survivors(first, sizes, keep, around)
            if not axes_of(rest):  # a number: all of it stays
                return Index((start * length, count * length) for start, count in kept_first.runs)
            return Index(
                (i * length + start, count)
                for i in kept_first
                for start, count in survivors(
                    rest, sizes, keep, {**around, first.name: i} if isinstance(first, Axis) else around
                ).runs
            )


@cache
def parse(text: str) -> tuple[Dim, ...]:
    """Return one Dim per tensor dimension of `text`, which is a table's own and trusted."""
    words = re.findall(r"[()+]|[^\s()+]+", text)
    dims = []
    while words:
        dims.append(_atom(words))
    return tuple(dims)


def _atom(words: list[str]) -> Dim:
    word = words.pop(0)
    if word != "(":
        return Axis(word)
    blocks: list[Dim] = []
    factors: list[Dim] = []
    while (word := words[0]) != ")":
        if word == "+":
            words.pop(0)
            blocks.append(_joined(factors))
            factors = []
        else:
            factors.append(_atom(words))
    words.pop(0)
    blocks.append(_joined(factors))
    return blocks[0] if len(blocks) == 1 else Sum(tuple(blocks))


def _joined(factors: list[Dim]) -> Dim:
    return factors[0] if len(factors) == 1 else Product(tuple(factors))
