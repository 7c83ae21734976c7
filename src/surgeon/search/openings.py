"""The cuts that scores alone would make, at the size that is searched: a search measures some of them first. Pure.

What single pieces and pairs cost bare does not say what a cut costs once it is repaired: a block of layers, bad bare,
may be the best repaired. So the cuts that are known to repair well are looked at, whatever the surrogate says of them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from surgeon.search.cuts import Candidate, Pieces, Space, Widths

BLOCKS = 3  # of the closest blocks


@dataclass(frozen=True)
class Openings:
    """Scores of a model's layers, out of one pass; empty where no layer may go.

    `distances` is the angular distance between the states before layer s and before layer e, entry [s][e]; `values` are
    other scores, a number per layer each. The lower, the less the removal is thought to change.
    """

    distances: Sequence[Sequence[float | None]] = ()
    values: Sequence[Sequence[float]] = ()

    def cuts(self, space: Space, counts: Mapping[Widths, int]) -> list[Candidate]:
        """Return the cuts that meet the target, the kinds in turns: depth by each score, one width, both by half.

        `counts` are the fewest pieces that have to go with each set of widths; the one with the fewest sizes changed is
        cut in depth alone.
        """
        if not counts:
            return []
        plain = min(counts, key=lambda widths: (len(widths), -counts[widths]))
        deep = [list(self._blocks(space, counts[plain]))[:BLOCKS]]
        deep += [[pieces] for each in self.values if (pieces := _lowest(each, space, counts[plain])) is not None]
        narrow: list[list[Candidate]] = []
        for axis in dict.fromkeys(axis for widths in counts for axis, _ in widths):
            alone = {widths: n for widths, n in counts.items() if {each for each, _ in widths} == {axis}}
            if widths_only := sorted((widths for widths, n in alone.items() if n == 0), key=lambda own: -own[0][1]):
                narrow.append([Candidate((), widths_only[0])])
            both = [widths for widths, n in alone.items() if n and widths != plain]
            if both:
                half = min(both, key=lambda widths: (abs(2 * alone[widths] - counts[plain]), widths))
                blocks = self._blocks(space, alone[half])
                narrow += [[Candidate(pieces, half)] for pieces in list(blocks)[:1]]
        kinds = [[Candidate(pieces, plain) for pieces in each] for each in deep] + narrow
        ordered = [each for turn in zip_longest(*kinds) for each in turn if each is not None and each.features]
        return list(dict.fromkeys(ordered))

    def _blocks(self, space: Space, count: int) -> Iterator[Pieces]:
        """Yield the blocks of `count` layers that may go, the closest first."""
        free = set(space.layers)
        found: list[tuple[float, Pieces]] = []
        for start in range(space.depth - count + 1 if self.distances else 0):
            pieces = tuple(2 * layer for layer in range(start, start + count))
            distance = self.distances[start][start + count]
            if count and distance is not None and free.issuperset(pieces):
                found.append((distance, pieces))
        yield from (pieces for _, pieces in sorted(found))


def _lowest(values: Sequence[float], space: Space, count: int) -> Pieces | None:
    """Return the layers of the lowest values; None where so many cannot go."""
    if not 0 < count <= len(space.layers):
        return None
    return tuple(sorted(sorted(space.layers, key=lambda piece: (values[piece // 2], piece))[:count]))
