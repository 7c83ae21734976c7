"""The maps of function-preserving growth: how a wider axis is made of a narrower one, so that C S = I.

Sources: Net2Net; HyperCloning (arXiv:2409.12903); zero padding (arXiv:2104.11390); bert2BERT (arXiv:2110.07143). Here
for any size.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from surgeon.anatomy.axes import Index, Scale


@dataclass(frozen=True, slots=True, init=False)
class AxisMap:
    """How a wider axis is made of a narrower one.

    What writes the axis applies S, what reads it applies C, and C S = I. Position j of the new axis is written as
    `write[j]` times position `index[j]` of the old one, and read with weight `read[j]`; where index[j] is -1 it is new.
    New positions are either `zeroed`: written as zero and read with fresh weights, or the reverse.
    """

    index: Index
    write: Scale
    read: Scale
    zeroed: bool

    def __init__(self, index: Iterable[int], write: Iterable[float], read: Iterable[float], *, zeroed: bool) -> None:
        object.__setattr__(self, "index", Index.of(index))
        object.__setattr__(self, "write", Scale.of(write))
        object.__setattr__(self, "read", Scale.of(read))
        object.__setattr__(self, "zeroed", zeroed)

    @property
    def is_exact(self) -> bool:
        """Whether a norm over the axis sees the same mean square: every old position weighs the same in the new."""
        weights: dict[int, float] = defaultdict(float)
        for i, s in zip(self.index, self.write, strict=True):
            if i >= 0:
                weights[i] += s * s
        ratio = len(self.index) / len(weights)
        return all(math.isclose(weight, ratio, rel_tol=1e-12) for weight in weights.values())


def tile(size: int, times: int) -> AxisMap:
    """Return the map of `times` copies laid end to end, each read with its share."""
    new_size = size * times
    index = Index([(0, size)] * times)
    return AxisMap(index, Scale.all(1.0, new_size), Scale.all(1 / times, new_size), zeroed=True)


def append(size: int, new_size: int) -> AxisMap:
    """Return the map that adds new positions, written at random and not read: what they hold changes nothing yet."""
    weights = _old_then_new(1.0, size, new_size)
    return AxisMap(_appended(size, new_size), weights, weights, zeroed=False)


def isometric_pad(size: int, new_size: int) -> AxisMap:
    """Return the map that adds zeroed positions and scales the old ones by sqrt(new / old).

    The mean square is then what it was, so a norm needs no other epsilon: exact for any size.
    """
    ratio = math.sqrt(new_size / size)
    write, read = _old_then_new(ratio, size, new_size), _old_then_new(1 / ratio, size, new_size)
    return AxisMap(_appended(size, new_size), write, read, zeroed=True)


def zero_pad(size: int, new_size: int) -> AxisMap:
    """Return the map that adds zeroed positions and leaves the old ones as they are, as in arXiv:2104.11390.

    A norm then divides by a smaller mean square: approximate.
    """
    weights = _old_then_new(1.0, size, new_size)
    return AxisMap(_appended(size, new_size), weights, weights, zeroed=True)


def uneven(size: int, new_size: int) -> AxisMap:
    """Return the map that repeats the first positions once more, as in bert2BERT's FPI (arXiv:2110.07143).

    Exact but for norms, which see the repeated positions weigh more: approximate unless new is a multiple of old.
    """
    times, more = divmod(new_size, size)  # the first `more` positions are there once more than the others
    index = Index([(0, size)] * times + [(0, more)])
    read = Scale([(1 / (times + 1), more), (1 / times, size - more)] * times + [(1 / (times + 1), more)])
    return AxisMap(index, Scale.all(1.0, new_size), read, zeroed=True)


def _appended(size: int, new_size: int) -> Index:
    return Index([(0, size), (-1, new_size - size)])


def _old_then_new(factor: float, size: int, new_size: int) -> Scale:
    return Scale([(factor, size), (0.0, new_size - size)])
