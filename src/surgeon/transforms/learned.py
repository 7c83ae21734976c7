"""Learned growth: what can be learned of a growth, and the plan of a result whose growth was learned.

A growth is linear in the weights of the small model: W' = S (sum over layers l of d_l W_l) R^T + N, where what writes a
widened axis has the map S, what reads it R, and each new layer its weights d. Exact growth is one choice of S, R and d.
Here they are free and begin there: what is stored, and trained, are their differences from it, so that differences of
zero are the exact growth to the last bit. S and R are not tied, or they could only turn, and never scale. The noise N
is that of the exact growth. Gains and shifts of norms map nothing; they are free, and begin at the exact values.

Which maps there are follows from the axes of each tensor alone: one S and one R for the residual stream of the whole
model, and for each layer maps of its neurons, of low rank, and of its heads, which are moved as wholes: a map inside of
a head would mix dimensions that rotate at different speeds. The weights d are shared by the tensors of one name.

Sources: LiGO (arXiv:2303.00980), whose readers have the map of the writers, so that no start of it is exact; Mango
(arXiv:2310.10699) for one pair of maps for the whole model.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate
from math import prod

from surgeon.anatomy.anatomy import EXPERT_NUMBER
from surgeon.anatomy.axes import Axis, Dim, Index, Places, Product, Sum, axes_of, places
from surgeon.anatomy.families import Row, written_and_read
from surgeon.plan.expressions import Add, Affine, Cast, Constant, Expr, Gather, Mapped, Read, Weighted
from surgeon.plan.plan import Plan
from surgeon.transforms.grow import Growth
from surgeon.transforms.widen import RESIDUAL, Grower, with_factor_of_new
from surgeon.transforms.widths import is_scaled

MAPPED_KINDS = ("linear", "conv1d", "bias", "embedding", "head")
HEADS = ("kv_heads", "group")  # moved together where a dimension has both: each head may come from all
WHOLE = (*RESIDUAL, "projected")  # axes that all layers share
NEURONS = ("ffn", "expert_ffn")
RANK = 16  # of the maps of neurons: those of two layers have nothing in common, so each layer has maps of its own
TRAINED = "the maps of the growth were trained, so the result computes something else than its source"


@dataclass(frozen=True)
class Start:
    """What a learned tensor begins as: zeros, or random with this standard deviation, or the values of a tensor.

    `like` names the tensor of the result whose values it begins with.
    """

    shape: tuple[int, ...]
    std: float = 0.0
    like: str = ""


@dataclass(frozen=True)
class Learned:
    """What can be learned of a growth, by name, and the plan that reads it as tensors of these names behind `prefix`.

    With all of them as they begin, it makes the tensors of the exact growth.
    """

    starts: Mapping[str, Start]
    plan: Plan


def learned(growth: Growth, prefix: str) -> Learned:
    """Return what can be learned of a growth in depth and width, and the plan of its result.

    Raises PlanError for a model without a table of its tensors.
    """
    growth.deeper.require_family(partial=True)
    maker = _Maker(growth, prefix, {})
    tensors = {name: maker.tensor(name, exact) for name, exact in growth.plan.tensors.items()}
    reasons = (*growth.plan.approximate, TRAINED)
    return Learned(maker.starts, replace(growth.plan, tensors=tensors, approximate=reasons))


@dataclass(frozen=True, eq=False)
class _Maker:
    """Makes the learned form of each tensor, and notes what it reads."""

    growth: Growth
    prefix: str
    starts: dict[str, Start]

    @cached_property
    def grower(self) -> Grower | None:
        """The maps of the exact growth; its noise is in the exact tensors already."""
        growth = self.growth
        return None if growth.widths is None else Grower(growth.deeper, growth.widths, 0.0, growth.seed)

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        """The sizes of the result's axes."""
        widths = self.growth.widths
        return {**self.growth.deeper.sizes, **({} if widths is None else widths.sizes)}

    def tensor(self, name: str, exact: Expr) -> Expr:
        """Return a tensor of the result: its exact form, and what the learned differences add to it."""
        deeper = self.growth.deeper
        row, part = deeper.row(name)
        spec = deeper.spec.tensors[name]
        if row.kind in ("gain", "shift"):
            self.starts[name] = Start(deeper.shape_of(name, self.sizes), like=name)
            return Cast(Read(self.prefix + name), spec.dtype)
        if part in ("buffer", "other") or row.kind not in MAPPED_KINDS:
            return exact
        terms = self._terms(name, row)
        widths = self.growth.widths
        if widths is not None and is_scaled(row) and widths.embedding_factor != 1.0:
            terms = [Affine(term, widths.embedding_factor) for term in terms]
        return Add((exact, *terms)) if terms else exact

    def _terms(self, name: str, row: Row) -> list[Expr]:
        """Return what is added to a tensor, of (S + dS) X (R + dR)^T - S X0 R^T, where X = X0 + dX.

        The three terms are dS X R^T, (S X + dS X) dR^T and S dX R^T.
        """
        before, mixed = self.growth.deep.tensors[name], self._mixed(name)
        is_zero = isinstance(before, Constant) and not before.value
        mix = [] if mixed is None else [mixed]
        parts = [*([] if is_zero else [before]), *mix]
        if not parts:
            return []
        write, read = written_and_read(row)
        whole = _sum(parts)
        by_write = self._maps(name, row.axes, write, "write")(whole)
        terms = [self._read(term, row, read) for term in by_write]
        written = _sum([self._written(whole, row, write), *by_write])
        terms += self._maps(name, row.axes, read, "read")(written)
        return terms + [self._read(self._written(term, row, write), row, read) for term in mix]

    def _written(self, expr: Expr, row: Row, dim: int | None) -> Expr:
        grower = self._grower(row, dim)
        return expr if dim is None or grower is None else grower.written(expr, row, dim)

    def _read(self, expr: Expr, row: Row, dim: int | None) -> Expr:
        grower = self._grower(row, dim)
        return expr if dim is None or grower is None else grower.read(expr, row, dim)

    def _grower(self, row: Row, dim: int | None) -> Grower | None:
        """Return the maps of the exact growth where they change a dimension; others may have axes without a size."""
        changes = dim is not None and self.grower is not None and axes_of(row.axes[dim]) & self.grower.widths.axes
        return self.grower if changes else None

    # --- depth ------------------------------------------------------------------------------------------------

    def _mixed(self, name: str) -> Expr | None:
        """Return the learned mixture of all layers that have a tensor like this one; None where the depth stays."""
        small, deeper = self.growth.anatomy, self.growth.deeper
        if small.depth == deeper.depth:
            return None
        for old, new in zip(small.stacks, deeper.stacks, strict=True):
            if (place := new.locate(name)) is None:
                continue
            layer, rest = place
            like = small.spec.tensors.get, deeper.spec.tensors[name]
            names = [each for i in range(old.depth) if like[0](each := old.name(i, rest)) == like[1]]
            if not names:
                return None
            weights = f"{old.prefix}*.{EXPERT_NUMBER.sub('*', rest)}.depth"
            self.starts[weights] = Start((new.depth, len(names)))
            return Weighted(tuple(map(Read, names)), Read(self.prefix + weights), layer)
        return None

    # --- width ------------------------------------------------------------------------------------------------

    def _maps(self, name: str, axes: tuple[Dim, ...], dim: int | None, side: str) -> "Callable[[Expr], list[Expr]]":
        """Return the function from a tensor to what the learned differences of a dimension's maps make of it."""
        grower = self.grower
        if dim is None or grower is None or not axes_of(axes[dim]) & grower.widths.axes:
            return lambda expr: []
        old, new = self.growth.deeper.sizes, self.sizes
        found = []
        for number, chain in enumerate(_chains(axes[dim], old)):
            group = _group(chain.axes, grower.widths.axes)
            if group:
                key = self._key(name, chain.axes, group, side)
                found.append((number, chain, group, key))

        def apply(expr: Expr) -> list[Expr]:
            terms = []
            for number, chain, group, key in found:
                target = _chains(axes[dim], new)[number]
                taken = _taken(grower, expr, (dim, axes[dim].size(old)), chain, group, side)
                mapped = self._mapped(taken, dim, chain.axes, group, key)
                terms.append(_placed(mapped, dim, target.positions, axes[dim].size(new)))
            return terms

        return apply

    def _key(self, name: str, axes: tuple[Axis, ...], group: slice, side: str) -> str:
        """Return the name of a map. Layers have their own, but of what all share; and each module its own heads."""
        names = [axis.name for axis in axes]
        if names[group][0] in WHOLE:
            return f"{'projected' if names[group][0] == 'projected' else 'hidden'}.{side}"
        place = self.growth.deeper.locate(name)
        module = name.rpartition(".")[0].rpartition(".")[0] if place else "model"
        return f"{module}:{'.'.join(names)}.{side}"

    def _mapped(self, expr: Expr, dim: int, axes: tuple[Axis, ...], group: slice, key: str) -> Expr:
        """Return a tensor whose blocks along a dimension are mapped by what is learned under `key`."""
        old, new = (prod(axis.size(sizes) for axis in axes[group]) for sizes in (self.growth.deeper.sizes, self.sizes))
        inner = prod(axis.size(self.sizes) for axis in axes[group.stop :])
        if axes[group][0].name not in NEURONS or RANK * (old + new) >= old * new:
            self.starts[key] = Start((new, old))
            return Mapped(expr, Read(self.prefix + key), dim, inner)
        up, down = f"{key}.up", f"{key}.down"
        self.starts[up], self.starts[down] = Start((new, RANK)), Start((RANK, old), std=old**-0.5)
        return Mapped(Mapped(expr, Read(self.prefix + down), dim, inner), Read(self.prefix + up), dim, inner)


def _sum(parts: list[Expr]) -> Expr:
    return parts[0] if len(parts) == 1 else Add(tuple(parts))


@dataclass(frozen=True)
class _Chain:
    """Axes of a dimension that are multiplied with each other, outermost first, and where their positions are in it."""

    axes: tuple[Axis, ...]
    positions: Index


def _chains(dim: Dim, sizes: Mapping[str, int]) -> "tuple[_Chain, ...]":
    return _cached_chains(dim, tuple(sorted((axis, sizes[axis]) for axis in axes_of(dim))))


@lru_cache(maxsize=64)
def _cached_chains(dim: Dim, sizes: tuple[tuple[str, int], ...]) -> tuple[_Chain, ...]:
    known = dict(sizes)
    return tuple(_Chain(axes, Index.of(positions)) for axes, positions in _paths(dim, known))


def _paths(dim: Dim, sizes: Mapping[str, int]) -> list[tuple[tuple[Axis, ...], list[int]]]:
    match dim:
        case Axis():
            return [((dim,), list(range(dim.size(sizes))))]
        case Sum(blocks):
            starts = accumulate((block.size(sizes) for block in blocks), initial=0)
            return [
                (axes, [start + place for place in inside])
                for start, block in zip(starts, blocks, strict=False)
                for axes, inside in _paths(block, sizes)
            ]
        case Product(factors):
            paths: list[tuple[tuple[Axis, ...], list[int]]] = [((), [0])]
            for factor in factors:
                size = factor.size(sizes)
                paths = [
                    ((*axes, *more), [place * size + i for place in outer for i in inner])
                    for axes, outer in paths
                    for more, inner in _paths(factor, sizes)
                ]
            return paths


def _group(axes: tuple[Axis, ...], widened: frozenset[str]) -> slice | None:
    """Return which of the axes of a chain are mapped, as one: the stream, the neurons, or the heads. None: none are."""
    names = [axis.name for axis in axes]
    first = next((i for i, name in enumerate(names) if name in (*WHOLE, *NEURONS, *HEADS)), None)
    if first is None:
        return None
    end = first + 1 + (names[first : first + 2] == list(HEADS))
    return slice(first, end) if widened & set(names[first:end]) else None


def _taken(grower: Grower, expr: Expr, at: tuple[int, int], chain: _Chain, group: slice, side: str) -> Expr:
    """Return the positions of a chain alone, those of the mapped axes as before, all others as the growth has them.

    `at` is the dimension, and its length before.
    """
    inside = {axis.name for axis in chain.axes[group]}

    def maps(axis: str, block: frozenset[str]) -> Places | None:
        return None if axis in inside else grower.map_of(axis, block, side)

    where = with_factor_of_new(places(Product(chain.axes), grower.anatomy.sizes, maps), 1.0)
    index = where.index.of_old(chain.positions)
    dim, length = at
    is_whole = Places(index, where.scale).are_same and len(index) == length
    return expr if is_whole else Gather(expr, dim, index, where.scale)


def _placed(expr: Expr, dim: int, positions: Index, length: int) -> Expr:
    """Return the positions of a chain at their places in a dimension of this length, and zeros elsewhere."""
    if positions.is_whole and len(positions) == length:
        return expr
    index = [-1] * length
    for i, place in enumerate(positions):
        index[place] = i
    return Gather(expr, dim, index, [1.0] * length)
