"""Make a model wider with its function kept: one map per axis, carried through every tensor by what it does.

Sources: HyperCloning (arXiv:2409.12903), bert2BERT (arXiv:2110.07143), arXiv:2104.11390 (zero padding), Net2Net. Here
for any width, with tied embeddings, rotary heads and noise that keeps the function.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

from surgeon.anatomy.anatomy import Anatomy
from surgeon.anatomy.axes import Dim, Places, axes_of, places, shape
from surgeon.anatomy.families import Row
from surgeon.plan.plan import Add, Affine, Expr, Gather, Plan, Read, Uniform
from surgeon.transforms.widths import Widths

RESIDUAL = frozenset({"hidden", "embed"})  # "embed" has a map only where it is the residual stream itself
ADVANCED = "rows that would repeat others come from the next layer"
QUIET, LOUD = 0.0, 1.0  # the factors that tell, in Places, how a new position (-1) is written


def widen(anatomy: Anatomy, widths: Widths, *, noise: float = 0.5, advanced: bool = False, seed: int = 0) -> Plan:
    """Return the plan of a model with these widths that computes what this one computes.

    `noise` is the standard deviation, relative to the weights that it is added to, of what breaks the symmetry of
    copies and fills the weights that read new quiet positions; any value keeps the function, but above 1 rounding
    grows from layer to layer. With `advanced`, rows that would repeat a layer's own come from the next layer instead
    (bert2BERT's AKI), which does not.
    """
    grower = _Grower(anatomy, widths, noise, seed)
    tensors = {name: grower.tensor(name) for name in anatomy.spec.tensors}
    if advanced:
        tensors = {name: grower.advanced(name) for name in tensors}
    config = {**anatomy.spec.config, **widths.config}
    axes = {axis: found.index for axis, found in widths.maps.items()}
    reasons = (ADVANCED,) if advanced and not widths.approximate else widths.approximate
    return Plan(config, tensors, tuple(range(anatomy.depth)), approximate=reasons, axes=axes)


@dataclass(frozen=True, eq=False)
class _Grower:
    """Makes the wide form of each tensor."""

    anatomy: Anatomy
    widths: Widths
    noise: float
    seed: int

    def tensor(self, name: str) -> Expr:
        """Return tensor `name`, grown along every axis that has a map."""
        row, part = self.anatomy.row(name)
        if part == "buffer" or not any(axes_of(dim) & self.widths.axes for dim in row.axes):
            return self._final_norm(name, row, Read(name))
        if row.kind in ("gain", "shift"):
            return self._norm(name, row)
        write, read = dims(row)
        expr: Expr = Read(name)
        additions: list[Expr] = []
        new_shape = shape(row.axes, {**self.anatomy.sizes, **self.widths.sizes})
        if write is not None:
            written = self._places(row.axes[write], "write")
            mean = self.widths.mean_fill if axes_of(row.axes[write]) & RESIDUAL else 0.0
            expr = _gather(expr, write, written, mean=mean)
            if row.kind not in ("bias", "logit"):
                additions += self._new_rows(name, write, written, new_shape)
        if read is not None:
            seen = self._places(row.axes[read], "read")
            expr = _gather(expr, read, seen)
            additions += self._noise(name, row.axes[read], read, new_shape)
        if row.kind == "embedding" and self.widths.embedding_factor != 1.0:
            expr = Affine(expr, self.widths.embedding_factor)
        return Add((expr, *additions)) if additions else expr

    def advanced(self, name: str) -> Expr:
        """Return tensor `name` with the rows that repeat others taken from the next layer."""
        row, _ = self.anatomy.row(name)
        place = self.anatomy.stacks[0].locate(name)
        write, _ = dims(row)
        own = self.tensor(name)
        if place is None or write is None or place[0] + 1 == self.anatomy.depth:
            return own
        written = self._places(row.axes[write], "write")
        repeats = [i in written.index[:j] for j, i in enumerate(written.index)]
        if not any(repeats):
            return own
        following = self.tensor(self.anatomy.stacks[0].name(place[0] + 1, place[1]))
        keep = tuple(range(len(repeats)))
        mine = Gather(own, write, keep, tuple(float(not repeat) for repeat in repeats))
        theirs = Gather(following, write, keep, tuple(float(repeat) for repeat in repeats))
        return Add((mine, theirs))

    def _places(self, dim: Dim, side: str) -> Places:
        return _cached_places(self, dim, side)

    def map_of(self, axis: str, block: frozenset[str], side: str) -> Places | None:
        """Return where the positions of an axis come from, seen from the side that writes or that reads it."""
        found = self.widths.map(axis, block)
        if found is None:
            return None
        weights = found.write if side == "write" else found.read
        new = QUIET if found.quiet else LOUD
        scale = tuple(new if i < 0 else weight for i, weight in zip(found.index, weights, strict=True))
        return Places(found.index, scale)

    def _new_rows(self, name: str, dim: int, written: Places, new_shape: tuple[int, ...]) -> list[Expr]:
        """Return random weights for the positions that are written loud: their readers do not listen yet."""
        new = [j for j, (i, s) in enumerate(zip(written.index, written.scale, strict=True)) if i < 0 and s != QUIET]
        return [self._random_at(name, "rows", dim, new, new_shape, ratio=1.0)] if new else []

    def _noise(self, name: str, axes: Dim, dim: int, new_shape: tuple[int, ...]) -> list[Expr]:
        """Return what may be added to the weights that read an axis without a change of the function.

        On new quiet positions, anything: they hold zero. On copies of one position, numbers that cancel: copy k is
        paired with the last copy, written with weights s_k and s_last, so that +1/s_k and -1/s_last sum to nothing.
        """
        if not self.noise:
            return []
        seen, written = self._places(axes, "read"), self._places(axes, "write")
        additions: list[Expr] = []
        quiet = [j for j, (i, s) in enumerate(zip(seen.index, seen.scale, strict=True)) if i < 0 and s == QUIET]
        if quiet:
            additions.append(self._random_at(name, "quiet", dim, quiet, new_shape, ratio=self.noise))
        copies: dict[int, list[int]] = {}
        for j, i in enumerate(seen.index):
            if i >= 0:
                copies.setdefault(i, []).append(j)
        most = max(map(len, copies.values()))
        for k in range(most - 1):
            index, scale = [-1] * len(seen.index), [1.0] * len(seen.index)
            for i, found in copies.items():
                if len(found) > k + 1:
                    first, last = found[k], found[-1]
                    index[first] = index[last] = i
                    scale[first], scale[last] = 1.0 / written.scale[first], -1.0 / written.scale[last]
            old_shape = (*new_shape[:dim], max(copies) + 1, *new_shape[dim + 1 :])
            drawn = self._drawn(name, old_shape, self.noise / most, f"copy {k}")
            additions.append(Gather(drawn, dim, tuple(index), tuple(scale)))
        return additions

    def _random_at(
        self, name: str, what: str, dim: int, where: list[int], new_shape: tuple[int, ...], *, ratio: float
    ) -> Expr:
        block = (*new_shape[:dim], len(where), *new_shape[dim + 1 :])
        index = [-1] * new_shape[dim]
        for k, j in enumerate(where):
            index[j] = k
        drawn = self._drawn(name, block, ratio, what)
        return Gather(drawn, dim, tuple(index), (1.0,) * len(index))

    def _drawn(self, name: str, new_shape: tuple[int, ...], ratio: float, what: str) -> Expr:
        fresh = float(self.anatomy.spec.config.get(self.anatomy.require_family().init_std) or 0.02)
        return Uniform(new_shape, Read(name), ratio, self.seed, f"{name}/{what}", fallback=fresh)

    def _norm(self, name: str, row: Row) -> Expr:
        """Return a norm's gain or shift. A gain follows its position; a shift is written like the axis itself."""
        family = self.anatomy.require_family()
        dim = len(row.axes) - 1
        written = self._places(row.axes[dim], "write")
        if row.kind == "shift":
            return self._final_norm(name, row, _gather(Read(name), dim, written))
        ones = replace(written, scale=(1.0,) * len(written.index))
        expr = _gather(Read(name), dim, ones, fill=family.init_gain)
        if "q_dim" in axes_of(row.axes[dim]) and (factors := self.widths.query_gain):
            return self._query_gain(expr, row.axes[dim], dim, factors)
        return self._final_norm(name, row, expr)

    def _query_gain(self, expr: Expr, axes: Dim, dim: int, factors: tuple[float, ...]) -> Expr:
        """Return queries' gain in a wider head: old dims carry the scale of the logits, their copies are silent."""
        offset = 1.0 - self.anatomy.require_family().init_gain
        sizes = {**self.anatomy.sizes, **self.widths.sizes}

        def per_dim(axis: str, block: frozenset[str]) -> Places | None:
            return Places(tuple(range(len(factors))), factors) if axis == "q_dim" else None

        found = places(axes, sizes, per_dim)
        effective = Affine(expr, 1.0, offset) if offset else expr
        scaled = Gather(effective, dim, found.index, found.scale)
        return Affine(scaled, 1.0, -offset) if offset else scaled

    def _final_norm(self, name: str, row: Row, expr: Expr) -> Expr:
        """Return the final norm with the factor that a tied head needs: it reads with the embedding, not with C."""
        factor = self.widths.tied_factor
        inside_layer = any(stack.locate(name) for stack in self.anatomy.stacks)
        if factor == 1.0 or inside_layer or row.kind not in ("gain", "shift"):
            return expr
        offset = 1.0 - self.anatomy.require_family().init_gain if row.kind == "gain" else 0.0
        return Affine(expr, factor, (factor - 1.0) * offset)


@lru_cache(maxsize=512)
def _cached_places(grower: _Grower, dim: Dim, side: str) -> Places:
    return places(dim, grower.anatomy.sizes, lambda axis, block: grower.map_of(axis, block, side))


def dims(row: Row) -> tuple[int | None, int | None]:
    """Return which dimension of a tensor writes an axis, and which reads one."""
    last = len(row.axes) - 1
    match row.kind:
        case "linear":
            return last - 1, last
        case "conv1d":
            return last, last - 1
        case "head":
            return None, last
        case _:
            return last, None


def _gather(expr: Expr, dim: int, found: Places, *, fill: float = 0.0, mean: float = 0.0) -> Expr:
    """Return `expr` with its positions along `dim` as `found` says; unchanged where that is what it has."""
    if found.index == tuple(range(len(found.index))) and set(found.scale) <= {1.0}:
        return expr
    scale = tuple(1.0 if i < 0 else s for i, s in zip(found.index, found.scale, strict=True))
    return Gather(expr, dim, found.index, scale, fill=fill, mean=mean)
