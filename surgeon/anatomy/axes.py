"""Named axes, written as in einops: "(kv_heads group q_dim) hidden".

A dimension is a name, a number, or a parenthesised product; "+" joins what is stored one after the other. Both nest:
GPT-NeoX stores, head by head, its query, key and value: "(kv_heads (group q_dim + k_dim + v_dim)) hidden".
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, product
from math import prod
from typing import Protocol


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


@dataclass(frozen=True, slots=True)
class Places:
    """The positions of a new dimension: for each, the old position that it comes from (-1: none) and a factor."""

    index: tuple[int, ...]
    scale: tuple[float, ...]


class AxisMaps(Protocol):
    """Says where the positions of an axis come from; `block` are the axes that it is multiplied with, itself included.

    The block tells the heads of queries (which have a "group") from those of keys. None: the axis stays as it is.
    """

    def __call__(self, axis: str, block: frozenset[str]) -> Places | None: ...


def shape(dims: tuple[Dim, ...], sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Return the shape that `sizes` gives a tensor of these dimensions. Raises KeyError for an axis without size."""
    return tuple(dim.size(sizes) for dim in dims)


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
            return maps(name, block | {name}) or Places(tuple(range(length)), (1.0,) * length)
        case Sum(blocks):
            index: list[int] = []
            scale: list[float] = []
            offset = 0
            for part in blocks:
                inside = places(part, sizes, maps, block)
                index += [i + offset if i >= 0 else -1 for i in inside.index]
                scale += inside.scale
                offset += part.size(sizes)
            return Places(tuple(index), tuple(scale))
        case Product(factors):
            inner = block | {factor.name for factor in factors if isinstance(factor, Axis)}
            parts = [places(factor, sizes, maps, inner) for factor in factors]
            lengths = [factor.size(sizes) for factor in factors]
            return _multiply(parts, lengths)


def _multiply(parts: list[Places], lengths: list[int]) -> Places:
    index: list[int] = []
    scale: list[float] = []
    for point in product(*(zip(part.index, part.scale, strict=True) for part in parts)):
        flat, factor = 0, 1.0
        for (i, s), length in zip(point, lengths, strict=True):
            flat = -1 if i < 0 or flat < 0 else flat * length + i
            factor *= s
        index.append(flat)
        scale.append(factor)
    return Places(tuple(index), tuple(scale))


Keep = Callable[[str, int, Mapping[str, int]], bool]  # axis, position on it, positions on the axes around it


def survivors(
    dim: Dim, sizes: Mapping[str, int], keep: Keep, outer: Mapping[str, int] | None = None
) -> tuple[int, ...]:
    """Return the positions of `dim`, ascending, of which `keep` keeps every coordinate.

    `keep` gets a position on an axis together with those on the axes before it in a product, so that each of
    "kv_heads" may keep other positions of "group".
    """
    around = outer or {}
    match dim:
        case Axis(name):
            positions = range(dim.size(sizes))
            return tuple(positions if name.isdigit() else (i for i in positions if keep(name, i, around)))
        case Sum(blocks):
            ends = accumulate((block.size(sizes) for block in blocks), initial=0)
            parts = (survivors(block, sizes, keep, around) for block in blocks)
            return tuple(start + i for start, part in zip(ends, parts, strict=False) for i in part)
        case Product(factors):
            first, rest = factors[0], factors[1] if len(factors) == 2 else Product(factors[1:])
            kept, length = list[int](), rest.size(sizes)
            for i in survivors(first, sizes, keep, around):
                inner = {**around, first.name: i} if isinstance(first, Axis) else around
                kept += [i * length + j for j in survivors(rest, sizes, keep, inner)]
            return tuple(kept)


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
