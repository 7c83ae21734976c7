"""A quadratic that predicts what a cut costs from what its pieces cost alone and in pairs. It proposes, nothing more.

Prediction: scale x the sum of what each piece costs alone, + eta x the sum of what pairs cost beyond that, + for each
width a factor of its axis x what that width costs alone, + a correction for each piece and width. The factors and the
corrections are fitted to cuts that were measured, the corrections with a ridge, so that a few measurements move them
little. Each axis has a factor of its own because a repair makes up for neurons, and hardly for channels.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations
from operator import mul

from surgeon.search.cuts import Candidate, Pieces, Space

RIDGE = 1.0  # of the corrections: as much as one measurement says about a piece that is in it
PRIOR = 0.05  # of the factors: of the mean square of what they multiply, towards 1
ALIKE = 30  # measurements that say as much as the prior that pairs have the factor of single pieces
FITTED_FROM = 3  # cuts of two pieces or more, or of a width; fewer say nothing about a factor


@dataclass(frozen=True)
class Surrogate:
    """A prediction in nats. `alone` is by piece, and by (axis, size) of a width, the size of the model included, which
    costs nothing; `together` by two pieces that both go.

    A pair that was not measured has no cost beyond its parts; one with a piece between two layers has the mean of those
    layers' pairs.
    """

    alone: Mapping[object, float]
    together: Mapping[tuple[int, int], float] = field(default_factory=dict)
    scale: float = 1.0
    eta: float = 1.0
    widths: Mapping[str, float] = field(default_factory=dict)  # the factor of each axis, 1 where there is none
    corrections: Mapping[object, float] = field(default_factory=dict)

    @cached_property
    def beyond(self) -> Mapping[tuple[int, int], float]:
        """What each measured pair costs beyond its two pieces."""
        return {
            (one, other): cost - self.alone[one] - self.alone[other] for (one, other), cost in self.together.items()
        }

    @cached_property
    def sizes(self) -> Mapping[str, Sequence[tuple[int, float]]]:
        """The sizes of each axis that were measured, ascending, and what each costs alone."""
        found: dict[str, list[tuple[int, float]]] = {}
        for feature, cost in self.alone.items():
            if isinstance(feature, tuple):
                found.setdefault(feature[0], []).append((feature[1], cost))
        return {axis: sorted(costs) for axis, costs in found.items()}

    def interaction(self, one: int, other: int) -> float:
        """Return what two pieces cost together beyond what they cost alone."""
        pair = (min(one, other), max(one, other))
        if pair in self.beyond:
            return self.beyond[pair]
        layers = [_layers_of(piece) for piece in pair]
        if len(layers[0]) == len(layers[1]) == 1:
            return 0.0
        found = [self.beyond.get((a, b), 0.0) for a in layers[0] for b in layers[1] if a < b]
        return math.fsum(found) / len(found) if found else 0.0

    def parts(self, candidate: Candidate) -> tuple[float, float, dict[str, float]]:
        """Return the sums of a cut that the factors multiply: of single pieces, of pairs, and of widths by axis."""
        singles = math.fsum(self.alone.get(piece, 0.0) for piece in candidate.pieces)
        pairs = math.fsum(self.interaction(one, other) for one, other in combinations(candidate.pieces, 2))
        return singles, pairs, {axis: self.narrowed(axis, size) for axis, size in candidate.widths}

    def narrowed(self, axis: str, size: int) -> float:
        """Return what a width costs alone; between two of its axis that were measured, what their line says."""
        known = self.sizes.get(axis, ())
        above = next((pair for pair in known if pair[0] >= size), None)
        below = next((pair for pair in reversed(known) if pair[0] <= size), None)
        if above is None or below is None:
            return (above or below or (size, 0.0))[1]
        share = (size - below[0]) / (above[0] - below[0]) if above != below else 0.0
        return below[1] + share * (above[1] - below[1])

    def __call__(self, candidate: Candidate) -> float:
        """Return the predicted cost of a cut."""
        singles, pairs, widths = self.parts(candidate)
        narrowed = math.fsum(self.widths.get(axis, 1.0) * cost for axis, cost in widths.items())
        corrected = math.fsum(self.corrections.get(feature, 0.0) for feature in candidate.features)
        return self.scale * singles + self.eta * pairs + narrowed + corrected

    def fitted(self, measured: Mapping[Candidate, float]) -> "Surrogate":
        """Return the surrogate with its factors and corrections fitted to the costs of cuts that were measured."""
        known = {
            cut: cost for cut, cost in measured.items() if (len(cut.pieces) > 1 or cut.widths) and math.isfinite(cost)
        }
        plain = replace(self, scale=1.0, eta=1.0, widths={}, corrections={})
        if len(known) < FITTED_FROM:
            return plain
        axes = list(dict.fromkeys(axis for cut in known for axis, _ in cut.widths))
        rows = [(one + two, two, *(own.get(axis, 0.0) for axis in axes)) for one, two, own in map(self.parts, known)]
        scale, more, *widths = _factors(rows, list(known.values()))
        factors = dict(zip(axes, (max(each, 0.0) for each in widths), strict=True))
        scaled = replace(plain, scale=max(scale, 0.0), eta=max(scale + more, 0.0), widths=factors)
        residuals = [cost - scaled(cut) for cut, cost in known.items()]
        return replace(scaled, corrections=_corrections(list(known), residuals))


def _layers_of(piece: int) -> tuple[int, ...]:
    """Return the pieces that are the whole layers which a piece takes from."""
    return (piece,) if piece % 2 == 0 else (piece - 1, piece + 1)


def _factors(rows: Sequence[Sequence[float]], costs: Sequence[float]) -> list[float]:
    """Return the factor of each column by least squares, with a ridge towards 1, of the second strongly towards 0.

    The second column is what pairs cost again: a few cuts that lack the same layers fit any factor of it, and then
    cuts with many pairs are predicted to cost less than nothing.
    """
    columns = range(len(rows[0]))
    matrix = [[math.fsum(row[i] * row[j] for row in rows) for j in columns] for i in columns]
    for i in columns:
        matrix[i][i] += (ALIKE / len(rows) if i == 1 else PRIOR) * matrix[i][i] + 1e-12
    start = [0.0 if i == 1 else 1.0 for i in columns]
    left = [cost - math.fsum(map(mul, row, start)) for row, cost in zip(rows, costs, strict=True)]
    right = [math.fsum(row[i] * rest for row, rest in zip(rows, left, strict=True)) for i in columns]
    return [first + change for first, change in zip(start, solve(matrix, right), strict=True)]


def _corrections(cuts: Sequence[Candidate], residuals: Sequence[float]) -> dict[object, float]:
    """Return the correction of each piece and width: the ridge's answer to what the quadratic misses.

    It is solved for the cuts, which are few: c = Z^T (Z Z^T + ridge I)^-1 r, where Z is 1 if a cut has a piece.
    """
    sets = [set(cut.features) for cut in cuts]
    matrix = [[float(len(one & other)) + RIDGE * (one is other) for other in sets] for one in sets]
    weights = solve(matrix, residuals)
    found: dict[object, float] = {}
    for features, weight in zip((cut.features for cut in cuts), weights, strict=True):
        for feature in features:
            found[feature] = found.get(feature, 0.0) + weight
    return found


def solve(matrix: Sequence[Sequence[float]], right: Sequence[float]) -> list[float]:
    """Return x of A x = b for a matrix that is symmetric and positive definite."""
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    size = len(rows)
    for at in range(size):
        for below in range(at + 1, size):
            factor = rows[below][at] / rows[at][at]
            if factor:
                rows[below] = [low - factor * high for low, high in zip(rows[below], rows[at], strict=True)]
    answer = [0.0] * size
    for at in reversed(range(size)):
        known = math.fsum(rows[at][later] * answer[later] for later in range(at + 1, size))
        answer[at] = (rows[at][size] - known) / rows[at][at]
    return answer


# --- its best cuts ----------------------------------------------------------------------------------------------

STARTS = 24


def best_cuts(
    surrogate: Surrogate, space: Space, count: int, *, most: int, seed: int = 0, starts: int = STARTS
) -> list[Pieces]:
    """Return up to `most` distinct cuts of `count` pieces in the order of their prediction, the best first.

    Descents by the best move begin at the cheapest pieces and at random ones; `seed` decides the random ones. All cuts
    that they look at are ranked.
    """
    if count == 0:
        return [()]
    table = _Table(surrogate, space)
    drawn = random.Random(seed)  # noqa: S311  (no secret)
    seen: dict[Pieces, float] = {}
    for start in range(starts):
        order = sorted(space.free, key=lambda piece: (surrogate.alone.get(piece, 0.0), piece))
        if start:
            order.sort(key=lambda piece: surrogate.alone.get(piece, 0.0) * drawn.expovariate(1.0))
        state = _first_fitting(order, count)
        if state is None:
            drawn.shuffle(order)
            state = _first_fitting(order, count) or _leftmost(space, count)
        if state is None:
            return []
        while True:
            around = table.around(state, space)
            seen[state] = table.cost(state)
            seen |= around
            best = min(around, key=lambda moved: (around[moved], moved), default=state)
            if best == state or around[best] >= seen[state]:
                break
            state = best
    return sorted(seen, key=lambda pieces: (seen[pieces], pieces))[:most]


def _first_fitting(order: Sequence[int], count: int) -> Pieces | None:
    """Return the first `count` pieces of an order that do not overlap; None where they are too few."""
    chosen: set[int] = set()
    for piece in order:
        if len(chosen) < count and not chosen & {piece - 1, piece + 1}:
            chosen.add(piece)
    return tuple(sorted(chosen)) if len(chosen) == count else None


def _leftmost(space: Space, count: int) -> Pieces | None:
    return _first_fitting(space.free, count)


class _Table:
    """The surrogate of cuts in depth as a matrix, which many cuts are looked up in."""

    def __init__(self, surrogate: Surrogate, space: Space) -> None:
        free = space.free
        corrections = surrogate.corrections
        self._alone = {
            piece: surrogate.scale * surrogate.alone.get(piece, 0.0) + corrections.get(piece, 0.0) for piece in free
        }
        self._pairs = {
            one: {other: surrogate.eta * surrogate.interaction(one, other) for other in free if other != one}
            for one in free
        }

    def cost(self, pieces: Pieces) -> float:
        """Return the cost of a cut."""
        pairs = math.fsum(self._pairs[one][other] for one, other in combinations(pieces, 2))
        return math.fsum(self._alone[piece] for piece in pieces) + pairs

    def around(self, pieces: Pieces, space: Space) -> dict[Pieces, float]:
        """Return the cost of each cut that is one move away: only what changes is added up."""
        whole, gone = self.cost(pieces), set(pieces)
        pull = {
            piece: self._alone[piece] + math.fsum(row[other] for other in pieces if other != piece)
            for piece, row in self._pairs.items()
        }
        found: dict[Pieces, float] = {}
        for moved in space.moves(pieces):
            went = gone.difference(moved)
            came = [piece for piece in moved if piece not in gone]
            change = sum(pull[piece] for piece in came) - sum(pull[piece] for piece in went)
            change -= sum(self._pairs[one][other] for one in came for other in went)
            change += sum(self._pairs[one][other] for one, other in combinations(came, 2))
            change += sum(self._pairs[one][other] for one, other in combinations(went, 2))
            found[moved] = whole + change
        return found


# --- what it is made from ---------------------------------------------------------------------------------------


def telling_pairs(
    alone: Mapping[int, float], count: int, *, bound: float = 2.0, limit: int | None = None
) -> list[tuple[int, int]]:
    """Return the pairs of layers to measure, by their pieces: with a layer of the costliest third, and neighbours.

    A layer that alone costs more than `bound` times the `count` cheapest together is in no good cut, and in no pair.
    Of more than `limit` those whose two layers cost least alone are taken.
    """
    layers = sorted((piece for piece in alone if piece % 2 == 0), key=lambda piece: (alone[piece], piece))
    most = bound * math.fsum(max(alone[piece], 0.0) for piece in layers[: max(count, 2)])
    layers = [piece for piece in layers if alone[piece] <= most]
    costly = set(layers[len(layers) - len(layers) // 3 :])
    pairs = [pair for pair in combinations(sorted(layers), 2) if costly.intersection(pair) or pair[1] - pair[0] == 2]
    if limit is not None and len(pairs) > limit:
        pairs = sorted(sorted(pairs, key=lambda pair: (alone[pair[0]] + alone[pair[1]], pair))[:limit])
    return pairs
