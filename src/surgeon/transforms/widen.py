"""Make a model wider with its function kept: one map per axis, carried through every tensor by what it does.

Sources: HyperCloning (arXiv:2409.12903), bert2BERT (arXiv:2110.07143), arXiv:2104.11390 (zero padding), Net2Net. Here
for any width, with tied embeddings, rotary heads and noise that keeps the function.
"""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

from surgeon.anatomy.anatomy import Anatomy
from surgeon.anatomy.axes import Dim, Index, Places, Run, Scale, axes_of, places
from surgeon.anatomy.families import Row, written_and_read
from surgeon.plan.expressions import Add, Affine, Expr, Gather, Read, Uniform
from surgeon.plan.plan import Plan
from surgeon.transforms.layers import initial_std
from surgeon.transforms.widths import Widths, is_final_norm, is_scaled

RESIDUAL = frozenset({"hidden", "embed"})  # "embed" has a map only where it is the residual stream itself
ADVANCED = "rows that would repeat others come from the next layer"
ZEROED, ACTIVE = 0.0, 1.0  # the factors that say, in Places, how a new position (-1) is written


def widen(anatomy: Anatomy, widths: Widths, *, noise: float = 0.5, advanced: bool = False, seed: int = 0) -> Plan:
    """Return the plan of a model with these widths that computes what this one computes.

    `noise` breaks the symmetry of copies and fills the weights that read new zeroed positions: it is a standard
    deviation, relative to the weights that it is added to. Any value keeps the function, but above 1 rounding grows
    from layer to layer. With `advanced`, rows that would repeat a layer's own come from the next layer instead
    (bert2BERT's AKI); the function is then not kept.
    """
    grower = Grower(anatomy, widths, noise, seed)
    tensors = {name: grower.tensor(name) for name in anatomy.spec.tensors}
    if advanced:
        tensors = {name: grower.advanced(name) for name in tensors}
    axes = {axis: axis_map.index for axis, axis_map in widths.maps.items()}
    reasons = (ADVANCED,) if advanced and not widths.approximate else widths.approximate
    return Plan(dict(widths.config), tensors, tuple(range(anatomy.depth)), approximate=reasons, axes=axes)


@dataclass(frozen=True, eq=False)
class Grower:
    """Makes the wide form of each tensor."""

    anatomy: Anatomy
    widths: Widths
    noise: float
    seed: int

    def tensor(self, name: str) -> Expr:
        """Return tensor `name`, grown along every axis that has a map."""
        row, part = self.anatomy.row(name)
        if part in ("buffer", "other") or not any(axes_of(dim) & self.widths.axes for dim in row.axes):
            return self._final_norm(name, row, Read(name))
        if row.kind in ("gain", "shift"):
            return self._norm(name, row)
        write, read = written_and_read(row)
        expr: Expr = Read(name)
        additions: list[Expr] = []
        new_shape = self.anatomy.shape_of(name, {**self.anatomy.sizes, **self.widths.sizes})
        if write is not None and axes_of(row.axes[write]) & self.widths.axes:
            expr = self.written(expr, row, write)
            if row.kind not in ("bias", "logit"):
                additions += self._new_rows(name, write, self.positions(row.axes[write], "write"), new_shape)
        if read is not None and axes_of(row.axes[read]) & self.widths.axes:
            expr = self.read(expr, row, read)
            additions += self._noise(name, row.axes[read], read, new_shape)
        if is_scaled(row) and self.widths.embedding_factor != 1.0:
            expr = Affine(expr, self.widths.embedding_factor)
        return Add((expr, *additions)) if additions else expr

    def written(self, expr: Expr, row: Row, dim: int) -> Expr:
        """Return `expr` with the dimension that writes as S has it: the old numbers at their new places."""
        mean = self.widths.mean_fill if axes_of(row.axes[dim]) & RESIDUAL else 0.0
        return gathered(expr, dim, self.positions(row.axes[dim], "write"), mean=mean)

    def read(self, expr: Expr, row: Row, dim: int) -> Expr:
        """Return `expr` with the dimension that reads as C has it."""
        return gathered(expr, dim, self.positions(row.axes[dim], "read"))

    def advanced(self, name: str) -> Expr:
        """Return tensor `name` with the rows that repeat others taken from the next layer."""
        row, _ = self.anatomy.row(name)
        stack = next((stack for stack in self.anatomy.stacks if stack.locate(name)), None)
        place = stack.locate(name) if stack else None
        write, _ = written_and_read(row)
        own = self.tensor(name)
        if stack is None or place is None or write is None or not axes_of(row.axes[write]) & self.widths.axes:
            return own
        next_name = stack.name(place[0] + 1, place[1])
        if self.anatomy.rows.get(next_name, (None,))[0] != row:  # the last layer, or a next one of another kind
            return own
        written = self.positions(row.axes[write], "write")
        first_time, repeated = _repeats(written.index)
        if repeated.factors <= {0.0}:
            return own
        following = self.tensor(next_name)
        everywhere = Index.up_to(len(repeated))
        return Add((Gather(own, write, everywhere, first_time), Gather(following, write, everywhere, repeated)))

    def positions(self, dim: Dim, side: str) -> Places:
        """Return where the positions of a dimension come from, seen from the side that writes or reads it."""
        return _cached_positions(self, dim, side)

    def map_of(self, axis: str, block: frozenset[str], side: str) -> Places | None:
        """Return where the positions of an axis come from, seen from the side that writes or that reads it."""
        axis_map = self.widths.map(axis, block)
        if axis_map is None:
            return None
        weights = axis_map.write if side == "write" else axis_map.read
        return with_factor_of_new(Places(axis_map.index, weights), ZEROED if axis_map.zeroed else ACTIVE)

    def _new_rows(self, name: str, dim: int, written: Places, new_shape: tuple[int, ...]) -> list[Expr]:
        """Return random weights for new active positions: what reads them has weights of zero yet."""
        new = _numbered_new(written, zeroed=False)
        return [self._random_at(name, "rows", dim, new, new_shape, ratio=1.0)] if new.highest >= 0 else []

    def _noise(self, name: str, axes: Dim, dim: int, new_shape: tuple[int, ...]) -> list[Expr]:
        """Return numbers to add to the weights that read an axis, which do not change the function.

        On new zeroed positions any number will do. On copies of one position the numbers cancel: copy k is paired
        with the last copy, written with weights s_k and s_last, so that +1/s_k and -1/s_last sum to zero.
        """
        if not self.noise:
            return []
        read, written = self.positions(axes, "read"), self.positions(axes, "write")
        additions: list[Expr] = []
        zeroed = _numbered_new(read, zeroed=True)
        if zeroed.highest >= 0:  # "quiet" names the random stream: another name were other bytes
            additions.append(self._random_at(name, "quiet", dim, zeroed, new_shape, ratio=self.noise))
        pairs = _paired_copies(written)
        old_shape = (*new_shape[:dim], read.index.highest + 1, *new_shape[dim + 1 :])
        for k, pair in enumerate(pairs):
            random = self._random(name, old_shape, self.noise / (len(pairs) + 1), f"copy {k}")
            additions.append(Gather(random, dim, pair.index, pair.scale))
        return additions

    def _random_at(
        self, name: str, stream: str, dim: int, index: Index, new_shape: tuple[int, ...], *, ratio: float
    ) -> Expr:
        """Return random numbers along `dim`, the ones that `index` numbers, and zero elsewhere."""
        block = (*new_shape[:dim], index.highest + 1, *new_shape[dim + 1 :])
        return Gather(self._random(name, block, ratio, stream), dim, index, _ones(len(index)))

    def _random(self, name: str, new_shape: tuple[int, ...], ratio: float, stream: str) -> Expr:
        fallback = initial_std(self.anatomy)
        return Uniform(new_shape, Read(name), ratio, self.seed, f"{name}/{stream}", fallback=fallback)

    def _norm(self, name: str, row: Row) -> Expr:
        """Return a norm's gain or shift. A gain follows its position; a shift is written like the axis itself."""
        family = self.anatomy.require_family()
        dim = len(row.axes) - 1
        written = self.positions(row.axes[dim], "write")
        expr: Expr = Read(name)
        for outer in range(dim):  # one norm for each head
            copied = self.positions(row.axes[outer], "write")
            expr = gathered(expr, outer, replace(copied, scale=_ones(len(copied.index))), fill=family.init_gain)
        is_query = "q_dim" in axes_of(row.axes[dim]) and bool(self.widths.query_gain)
        if row.kind == "shift":
            expr = gathered(expr, dim, written)
            return self._query_gain(expr, row.axes[dim], dim, 0.0) if is_query else self._final_norm(name, row, expr)
        expr = gathered(expr, dim, replace(written, scale=_ones(len(written.index))), fill=family.init_gain)
        if is_query:
            return self._query_gain(expr, row.axes[dim], dim, 1.0 - family.init_gain)
        return self._final_norm(name, row, expr)

    def _query_gain(self, expr: Expr, axes: Dim, dim: int, offset: float) -> Expr:
        """Return the gain or shift of queries in a wider head: old dims carry the scale of the logits, copies are zero.

        `offset` is what the code adds to it.
        """
        factors = self.widths.query_gain
        sizes = {**self.anatomy.sizes, **self.widths.sizes}

        def per_dim(axis: str, block: frozenset[str]) -> Places | None:
            return Places(Index.up_to(len(factors)), factors) if axis == "q_dim" else None

        scaling = places(axes, sizes, per_dim)
        effective = Affine(expr, 1.0, offset) if offset else expr
        scaled = Gather(effective, dim, scaling.index, scaling.scale)
        return Affine(scaled, 1.0, -offset) if offset else scaled

    def _final_norm(self, name: str, row: Row, expr: Expr) -> Expr:
        """Return the final norm with the factor that a tied head needs: it reads with the embedding, not with C."""
        factor = self.widths.tied_factor
        if factor == 1.0 or row.kind not in ("gain", "shift") or not is_final_norm(self.anatomy, name):
            return expr
        offset = 1.0 - self.anatomy.require_family().init_gain if row.kind == "gain" else 0.0
        return Affine(expr, factor, (factor - 1.0) * offset)


@lru_cache(maxsize=512)
def _cached_positions(grower: Grower, dim: Dim, side: str) -> Places:
    return places(dim, grower.anatomy.sizes, lambda axis, block: grower.map_of(axis, block, side))


def gathered(expr: Expr, dim: int, positions: Places, *, fill: float = 0.0, mean: float = 0.0) -> Expr:
    """Return `expr` with these positions along `dim`; `expr` itself where they change nothing."""
    if positions.are_same:
        return expr
    return Gather(expr, dim, positions.index, with_factor_of_new(positions, 1.0).scale, fill=fill, mean=mean)


# The maps of a dimension are the same for many tensors, so each is made once and shared.


@lru_cache(maxsize=64)
def _ones(length: int) -> Scale:
    return Scale.all(1.0, length)


@lru_cache(maxsize=64)
def with_factor_of_new(positions: Places, factor: float) -> Places:
    """Return the places with another factor at new positions."""
    scale = Scale((factor if run.first < 0 else run.scale, run.length) for run in positions.runs)
    return Places(positions.index, scale)


@lru_cache(maxsize=64)
def _numbered_new(positions: Places, *, zeroed: bool) -> Index:
    """Return the index that numbers the new positions, those zeroed or those active: 0, 1 ..., and -1 elsewhere."""
    runs, count = [], 0
    for run in positions.runs:
        is_one = run.first < 0 and (run.scale == ZEROED) == zeroed
        runs.append((count if is_one else -1, run.length))
        count += run.length if is_one else 0
    return Index(runs)


@lru_cache(maxsize=64)
def _repeats(index: Index) -> tuple[Scale, Scale]:
    """Return factors that are 1 where a position comes for the first time, and factors that are 1 elsewhere."""
    first_place = {i: j for j, i in reversed(list(enumerate(index)))}
    repeated = [first_place[i] < j for j, i in enumerate(index)]
    return Scale.of(float(not repeat) for repeat in repeated), Scale.of(map(float, repeated))


@lru_cache(maxsize=64)
def _paired_copies(written: Places) -> tuple[Places, ...]:
    """Return, for each k, the places that give noise to copy k of each position and to its last copy, none elsewhere.

    Their factors are 1 / s_k and -1 / s_last, as of the weights with which the copies are written.
    """
    cuts = sorted({end for run in written.runs if run.first >= 0 for end in (run.first, run.first + run.length)})
    copies: dict[int, list[Run]] = {}  # of the old positions from one cut to the next: where they are in the new axis
    for run in written.runs:
        inside = (
            cuts[bisect_left(cuts, run.first) : bisect_right(cuts, run.first + run.length)] if run.first >= 0 else ()
        )
        for first, end in pairwise(inside):
            copies.setdefault(first, []).append(Run(run.at + first - run.first, first, end - first, run.scale))
    most = max(map(len, copies.values()))
    return tuple(
        _sparse(
            [
                run._replace(scale=sign / run.scale)
                for runs in copies.values()
                if len(runs) > k + 1
                for run, sign in ((runs[k], 1.0), (runs[-1], -1.0))
            ],
            len(written.index),
        )
        for k in range(most - 1)
    )


def _sparse(runs: list[Run], length: int) -> Places:
    """Return the places of an axis of this length that has these runs, and new positions between them."""
    filled: list[tuple[int, int, float]] = []
    at = 0
    for run in [*sorted(runs), Run(length, -1, 0, 1.0)]:
        filled += [(-1, run.at - at, 1.0), (run.first, run.length, run.scale)]
        at = run.at + run.length
    return Places.of_runs(filled)
