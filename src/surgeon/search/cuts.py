"""Cuts in depth as sets of removed pieces, and the moves from one cut to the next. Pure.

The halves of a decoder stand in a string A0 M0 A1 M1 ... A piece is two neighbours in it, by the place of the first:
piece 2i is layer i, piece 2i + 1 the MLP of layer i with the attention of layer i + 1. What is left alternates whenever
no two removed pieces overlap, and every such rest is the rest of one set of pieces only.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

Pieces = tuple[int, ...]  # ascending; two of them are never neighbours
Widths = tuple[tuple[str, int], ...]  # sizes that differ from the source's, by axis


@dataclass(frozen=True, order=True)
class Candidate:
    """A cut: the pieces that go, and the widths of the result where they are not the source's."""

    pieces: Pieces
    widths: Widths = ()

    @property
    def features(self) -> tuple[object, ...]:
        """What a surrogate adds up: its pieces, and its widths one by one."""
        return (*self.pieces, *self.widths)


def kept_halves(pieces: Iterable[int], depth: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the layers whose attention stays, and those whose MLP stays: layer j of the result is their j-th pair."""
    gone = {place for piece in pieces for place in (piece, piece + 1)}
    stay = [place for place in range(2 * depth) if place not in gone]
    return tuple(place // 2 for place in stay[::2]), tuple(place // 2 for place in stay[1::2])


def pieces_of(attention: Sequence[int], mlp: Sequence[int], depth: int) -> Pieces:
    """Return the pieces that are gone where these attentions and these MLPs stay."""
    stay = {2 * layer for layer in attention} | {2 * layer + 1 for layer in mlp}
    pieces: list[int] = []
    place = 0
    while place < 2 * depth:
        if place in stay:
            place += 1
            continue
        assert place + 1 not in stay, "halves alternate, so gaps have an even length"
        pieces.append(place)
        place += 2
    return tuple(pieces)


@dataclass(frozen=True)
class Space:
    """The cuts in depth that may be chosen: the pieces that may go, of a model of `depth` layers."""

    depth: int
    free: tuple[int, ...]
    _free: frozenset[int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_free", frozenset(self.free))

    @classmethod
    def of(cls, depth: int, *, layers: bool = True, halves: bool, protect: tuple[int, int] = (0, 0)) -> "Space":
        """Return the space of a model: its layers, and with `halves` the pieces between two layers too."""
        first, last = 2 * protect[0], 2 * (depth - protect[1]) - 2
        places = range(first, last + 1) if layers else range(0)
        return cls(depth, tuple(place for place in places if halves or place % 2 == 0))

    @property
    def layers(self) -> tuple[int, ...]:
        """The pieces that are whole layers."""
        return tuple(piece for piece in self.free if piece % 2 == 0)

    @property
    def most(self) -> int:
        """How many pieces can go at once: one layer stays at the least."""
        count, last = 0, -2
        for piece in self.free:
            if piece - last >= 2:
                count, last = count + 1, piece
        return min(count, self.depth - 1)

    def moves(self, pieces: Pieces) -> Iterator[Pieces]:
        """Yield the cuts of as many pieces that are one move away, each once.

        A move restores one piece and removes another, or slides a half that stays through the gap beside it.
        """
        seen = {pieces}
        for moved in (*self._swaps(pieces), *self._slides(pieces)):
            if moved not in seen:
                seen.add(moved)
                yield moved

    def additions(self, pieces: Pieces) -> Iterator[Pieces]:
        """Yield the cuts that remove one piece more."""
        gone = set(pieces)
        for piece in self.free:
            if not gone & {piece - 1, piece, piece + 1}:
                yield tuple(sorted((*pieces, piece)))

    def _swaps(self, pieces: Pieces) -> Iterator[Pieces]:
        for place in range(len(pieces)):
            rest = (*pieces[:place], *pieces[place + 1 :])
            for moved in self.additions(rest):
                if moved != pieces:
                    yield moved

    def _slides(self, pieces: Pieces) -> Iterator[Pieces]:
        for start, stop in _chains(pieces):
            chain = pieces[start:stop]
            for count in range(1, len(chain) + 1):
                for shift, part in ((1, range(stop - count, stop)), (-1, range(start, start + count))):
                    moved = tuple(piece + shift if at in part else piece for at, piece in enumerate(pieces))
                    apart = all(later - earlier >= 2 for earlier, later in itertools.pairwise(moved))
                    if apart and all(moved[at] in self._free for at in part):
                        yield moved


def _chains(pieces: Pieces) -> list[tuple[int, int]]:
    """Return the ranges of pieces that stand end to end, so that they are one gap."""
    chains: list[tuple[int, int]] = []
    for at, piece in enumerate(pieces):
        if chains and piece - pieces[at - 1] == 2:
            chains[-1] = (chains[-1][0], at + 1)
        else:
            chains.append((at, at + 1))
    return chains
