"""One map per axis: how a wider axis is made of a narrower one.

The algebra of function-preserving growth (Net2Net; HyperCloning, arXiv:2409.12903; here for any size): what writes the
axis applies S, what reads it applies C, and C S = I. Position j of the new axis is written as `write[j]` times position
`index[j]` of the old one, and read with weight `read[j]`; where index[j] is -1 it is new.
"""

import math
from collections import Counter, defaultdict
from dataclasses import dataclass

from surgeon.errors import PlanError


@dataclass(frozen=True, slots=True)
class AxisMap:
    """A wider axis. New positions are either `quiet`: written as zero and read with fresh weights, or the reverse."""

    index: tuple[int, ...]
    write: tuple[float, ...]
    read: tuple[float, ...]
    quiet: bool

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
    return AxisMap(tuple(range(size)) * times, (1.0,) * (size * times), (1 / times,) * (size * times), quiet=True)


def append(size: int, new_size: int) -> AxisMap:
    """Return the map that adds new positions, written at random and not read: what they hold changes nothing yet."""
    index = (*range(size), *[-1] * (new_size - size))
    weights = (1.0,) * size + (0.0,) * (new_size - size)
    return AxisMap(index, weights, weights, quiet=False)


def isometric_pad(size: int, new_size: int) -> AxisMap:
    """Return the map that adds quiet positions and scales the old ones by sqrt(new / old).

    The mean square is then what it was, so a norm needs no other epsilon: exact for any size.
    """
    ratio = math.sqrt(new_size / size)
    index = (*range(size), *[-1] * (new_size - size))
    new = (0.0,) * (new_size - size)
    return AxisMap(index, (ratio,) * size + new, (1 / ratio,) * size + new, quiet=True)


def zero_pad(size: int, new_size: int) -> AxisMap:
    """Return the map that adds quiet positions and leaves the old ones as they are, as in arXiv:2104.11390.

    A norm then divides by a smaller mean square: approximate.
    """
    index = (*range(size), *[-1] * (new_size - size))
    weights = (1.0,) * size + (0.0,) * (new_size - size)
    return AxisMap(index, weights, weights, quiet=True)


def uneven(size: int, new_size: int) -> AxisMap:
    """Return the map that repeats the first positions once more, as in bert2BERT's FPI (arXiv:2110.07143).

    Exact but for norms, which see the repeated positions weigh more: approximate unless new is a multiple of old.
    """
    index = tuple(j % size for j in range(new_size))
    counts = Counter(index)
    return AxisMap(index, (1.0,) * new_size, tuple(1 / counts[i] for i in index), quiet=True)


def rotary_places(head_dim: int, rotary_dim: int, times: int, style: str) -> tuple[int, ...]:
    """Return, for each dim of a head `times` as wide, the old dim that goes there, -1 where it is new.

    Old pair i becomes pair `times` * i, whose frequency in the wider head is the old one, bit for bit. `style` says how
    pairs lie: "halves" (i and i + rotary_dim / 2) or "pairs" (2i and 2i + 1). Dims that do not turn follow in order.
    """
    new = [-1] * (head_dim * times)
    half = rotary_dim // 2
    for i in range(half):
        if style == "halves":
            new[times * i], new[times * i + times * half] = i, i + half
        else:
            new[2 * times * i], new[2 * times * i + 1] = 2 * i, 2 * i + 1
    for k in range(head_dim - rotary_dim):
        new[times * rotary_dim + k] = rotary_dim + k
    return tuple(new)


def grown_size(request: int | str, size: int, name: str) -> int:
    """Return the new size of an axis: `request` itself, or "2x" of `size`. Raises PlanError unless it is larger."""
    text = str(request).strip().lower()
    number = text.removesuffix("x")
    if not (number.isascii() and number.isdigit() and len(number) < 10):
        raise PlanError(f"cannot read {request!r} as a size of {name}", hint="Write 768, or 2x.")
    new = int(number) * (1 if number == text else size)
    if new < size:
        raise PlanError(f"cannot grow {name} from {size} to {new}", hint="Growing only makes larger.")
    return new
