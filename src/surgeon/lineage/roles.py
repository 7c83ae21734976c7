"""The tensors of a checkpoint by what they do, out of its family's table: which to read, and what their axes are.

A role is the name of a tensor inside its layer, or outside of all layers without the name of the base. No family is
named here: hidden is found by the axes, in whichever dimension it is stored.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np

from surgeon.anatomy.anatomy import Anatomy
from surgeon.anatomy.axes import Axis, Dim, Product, Sum, axes_of
from surgeon.anatomy.families import Row
from surgeon.lineage.maps import AxisMap
from surgeon.lineage.numbers import Array

HIDDEN, HEADS, KV_HEADS = "hidden", "heads", "kv_heads"
RESIDUAL = Axis(HIDDEN)
MATRICES = ("linear", "conv1d")


@dataclass(frozen=True, eq=False)
class Roles:
    """The tensors of each layer by their roles, layers of all stacks numbered together, and those outside."""

    anatomy: Anatomy

    @cached_property
    def layers(self) -> tuple[Mapping[str, str], ...]:
        """For each layer the name of the tensor of each role."""
        found: list[dict[str, str]] = [{} for _ in range(self.anatomy.num_layers)]
        for name, (_, part) in self.anatomy.rows.items():
            if part not in ("buffer", "other") and (place := self.anatomy.locate(self._current(name))):
                found[place[0]][place[1]] = name
        return tuple(found)

    @cached_property
    def outside(self) -> Mapping[str, str]:
        """The name of the tensor of each role that lies outside of the layers."""
        base = self.anatomy.require_family().base
        return {
            self._current(name).removeprefix(base): name
            for name, (row, part) in self.anatomy.rows.items()
            if part not in ("buffer", "other") and self.anatomy.locate(self._current(name)) is None
        }

    def stack(self, layer: int) -> int:
        """Return the number of the stack that a layer belongs to: an encoder's layers are not a decoder's."""
        first = 0
        for number, stack in enumerate(self.anatomy.stacks):
            first += stack.depth
            if layer < first:
                return number
        raise AssertionError(layer)

    def row(self, name: str) -> Row:
        """Return the table's row of a tensor."""
        return self.anatomy.row(name)[0]

    def dims(self, name: str) -> tuple[tuple[Dim, ...], Dim]:
        """Return the dimensions of a tensor seen as a matrix: those of its rows, and that of its columns."""
        *outer, last = self.row(name).axes
        return tuple(outer), last

    @cached_property
    def table_of_tokens(self) -> str | None:
        """The name of the tensor with a row for each token, the embedding's before the head's."""
        found = [
            (row.kind != "embedding", role, name)
            for role, name in self.outside.items()
            if (row := self.row(name)).kind in ("embedding", "head")
            and len(row.axes) == 2
            and row.axes[0] == Axis("vocab")
            and self.size(row.axes[1]) == self.sizes[HIDDEN]
        ]
        return min(found)[2] if found else None

    def gains(self, layer: int) -> Mapping[str, str]:
        """Return the gains and shifts of the hidden state in a layer, by their roles."""
        return {
            role: name
            for role, name in self.layers[layer].items()
            if (row := self.row(name)).kind in ("gain", "shift") and row.axes == (RESIDUAL,)
        }

    def added(self, name: str) -> float:
        """Return what the model adds to a stored gain: 1 in families that store it less 1."""
        family = self.anatomy.require_family()
        return 1.0 if self.row(name).kind == "gain" and family.init_gain == 0 else 0.0

    def matrices(self, layer: int) -> Mapping[str, str]:
        """Return the matrices of a layer by their roles; of experts that are stored apart only the first one's."""
        found = {
            role: name
            for role, name in self.layers[layer].items()
            if self.row(name).kind in MATRICES and len(self.row(name).axes) >= 2
        }
        return {role: name for role, name in found.items() if ".experts." not in role or ".experts.0." in role}

    @property
    def sizes(self) -> Mapping[str, int]:
        """The sizes of the axes."""
        return self.anatomy.sizes

    def size(self, dim: Dim) -> int | None:
        """Return the length of a dimension, None where it has an axis without a size."""
        return dim.size(self.sizes) if axes_of(dim) <= self.sizes.keys() else None

    def head_width(self, name: str) -> int:
        """Return how many rows of a tensor belong to one head, 1 where they belong to none."""
        outer, _ = self.dims(name)
        dim = outer[-1] if outer else Axis("1")
        block = dim.blocks[0] if isinstance(dim, Sum) else dim
        if not isinstance(block, Product) or block.factors[0] != Axis(KV_HEADS):
            return 1
        inner = [factor for factor in block.factors[1:] if factor != Axis("group")]
        return prod(factor.size(self.sizes) for factor in inner)

    def _current(self, name: str) -> str:
        return self.anatomy.require_family().current(name)


Maps = Mapping[str, AxisMap]


def positions(dims: tuple[Dim, ...], child: Roles, parent: Roles, maps: Maps) -> Array | None:
    """Return the position of the candidate's dimensions that each of the child's is, -1 for none.

    Several dimensions are laid end to end, the last varying fastest, and their index is flat. None where an axis has
    another size and no map.
    """
    found = np.zeros(1, np.int64)
    for dim in dims:
        inner = _positions(dim, child, parent, maps)
        size = parent.size(dim)
        if inner is None or size is None:
            return None
        found = _times(found, inner, size)
    return found


def _positions(dim: Dim, child: Roles, parent: Roles, maps: Maps) -> Array | None:
    match dim:
        case Axis(name):
            if (known := maps.get(name)) is not None:
                return known.index if len(known.index) == child.size(dim) else None
            size = child.size(dim)
            return np.arange(size) if size is not None and size == parent.size(dim) else None
        case Sum(blocks):
            start, parts = 0, []
            for block in blocks:
                part, length = _positions(block, child, parent, maps), parent.size(block)
                if part is None or length is None:
                    return None
                parts.append(np.where(part < 0, -1, part + start))
                start += length
            return np.concatenate(parts)
        case Product(factors):
            if factors[:2] == (Axis(KV_HEADS), Axis("group")) and HEADS in maps:
                found, rest = maps[HEADS].index, factors[2:]
            else:
                found, rest = np.zeros(1, np.int64), factors
            for factor in rest:
                inner, size_of = _positions(factor, child, parent, maps), parent.size(factor)
                if inner is None or size_of is None:
                    return None
                found = _times(found, inner, size_of)
            return found


def _times(outer: Array, inner: Array, size: int) -> Array:
    """Return the flat index of two factors, of which the inner one has `size` positions in the candidate."""
    flat = outer[:, None] * size + inner[None, :]
    return np.where((outer[:, None] < 0) | (inner[None, :] < 0), -1, flat).reshape(-1)


def heads_of(columns: AxisMap, width: int) -> AxisMap | None:
    """Return the map of heads, out of one of all dims of the heads, of which each has `width`.

    A head is the one that most of its dims are.
    """
    if len(columns.index) % width or columns.size % width:
        return None
    blocks = columns.index.reshape(-1, width)
    found = np.full(len(blocks), -1)
    for number, block in enumerate(blocks):
        heads, counts = np.unique(block[block >= 0] // width, return_counts=True)
        if len(heads) and counts.max() * 2 > width:
            found[number] = heads[counts.argmax()]
    return AxisMap(found, columns.size // width, np.ones(len(found), np.float32), columns.strength)


def kv_heads_of(heads: AxisMap, child: Roles, parent: Roles) -> AxisMap | None:
    """Return the map of key-value heads, out of that of heads; None where a group of the child is of several."""
    group, old = child.sizes["group"], parent.sizes["group"]
    if len(heads.index) % group:
        return None
    of_heads = np.where(heads.index < 0, -1, heads.index // old).reshape(-1, group)
    found = of_heads.max(1)
    if np.any((of_heads != found[:, None]) & (of_heads >= 0)):
        return None
    return AxisMap(found, parent.sizes[KV_HEADS], np.ones(len(found), np.float32), heads.strength)
