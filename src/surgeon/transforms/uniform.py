"""Evenly spaced positions: what to keep of an axis when nothing says which positions matter.

Source: weight selection (arXiv:2311.18823), here along whole axes: a head is kept or not, and of a head's rotary
dimensions those stay whose frequencies a smaller head has.
"""

from collections.abc import Iterator, Sequence

from surgeon.anatomy.anatomy import Anatomy
from surgeon.anatomy.rotary import EXTENSIBLE_ROPE, rope_types, rotary_dims, wider_head
from surgeon.errors import PlanError

INSTEAD = "Cut the number of heads instead."


def uniform(old: int, new: int) -> tuple[int, ...]:
    """Return `new` of `old` positions, ascending, evenly spaced: every n-th, or from the first to the last.

    Where new does not divide old, position i is i * (old - 1) / (new - 1), rounded half to even as torch.round does.
    Raises PlanError unless new is 1 to old.
    """
    if not 1 <= new <= old:
        raise PlanError(f"cannot keep {new} of {old} positions", hint=f"Keep 1 to {old}.")
    if old % new == 0:
        return tuple(range(0, old, old // new))
    return tuple(_rounded(i * (old - 1), new - 1) for i in range(new))


def uniform_head_dim(anatomy: Anatomy, new: int) -> tuple[int, ...]:
    """Return the dimensions to keep of each head: every n-th rotary pair, and of the rest evenly spaced ones.

    The frequencies of the smaller head are then those of the kept pairs.
    Raises PlanError, with the sizes that are legal, where a head of `new` dimensions has other frequencies.
    """
    old, rotating = anatomy.sizes["head_dim"], _num_rotating(anatomy)
    pairs = kept_rotary_dims(anatomy, new)
    rest = uniform(old - rotating, new - len(pairs)) if new > len(pairs) else ()
    return (*pairs, *(rotating + i for i in rest))


def kept_rotary_dims(anatomy: Anatomy, new: int) -> tuple[int, ...]:
    """Return which rotary dimensions a head of `new` dimensions keeps, () where none rotate.

    Raises PlanError, with the sizes that are legal, where a head of `new` dimensions has other frequencies.
    """
    family, old, rotating = anatomy.require_family(), anatomy.sizes["head_dim"], _num_rotating(anatomy)
    if not rotating or new == old:
        return tuple(range(rotating))
    wrong = sorted(rope_types(anatomy.spec.config) - EXTENSIBLE_ROPE)
    if wrong:
        raise PlanError(
            f"rope type {wrong[0]!r} derives its frequencies from the whole head, so a smaller one changes them",
            hint=INSTEAD,
        )
    legal = list(_legal_sizes(anatomy))
    if new not in legal:
        raise PlanError(
            f"a rotary head of {old} dims cannot shrink to {new}: the frequencies would be others",
            hint=f"Sizes of a head that fit: {', '.join(map(str, legal))}." if legal else INSTEAD,
        )
    assert family.rotary is not None, "some dimensions rotate"
    times = old // new
    spread = wider_head(rotating // times, rotating // times, times, family.rotary)
    return tuple(j for j, i in enumerate(spread) if i >= 0)


def check_head_dim(anatomy: Anatomy, kept: Sequence[int]) -> None:
    """Raises PlanError unless the dimensions `kept` of a head, ascending, have the frequencies of a head so small."""
    legal, rotating = kept_rotary_dims(anatomy, len(kept)), _num_rotating(anatomy)
    rotary = tuple(i for i in kept if i < rotating)
    if rotary != legal:
        raise PlanError(
            f"of a head's {rotating} rotary dims a head of {len(kept)} has {list(legal)}, not {list(rotary)}",
            hint=f"Keep such as {list(uniform_head_dim(anatomy, len(kept)))}.",
        )


def _num_rotating(anatomy: Anatomy) -> int:
    """Return how many dimensions of a head rotate with the position: the first ones."""
    if anatomy.require_family().rotary is None:
        return 0
    return rotary_dims(anatomy, anatomy.sizes["head_dim"])


def _legal_sizes(anatomy: Anatomy) -> Iterator[int]:
    """Yield the smaller sizes of a head whose frequencies are among those of this one."""
    old, rotating = anatomy.sizes["head_dim"], _num_rotating(anatomy)
    for new in range(1, old):
        count = rotary_dims(anatomy, new)
        if old % new == 0 and count and count % 2 == 0 and count * (old // new) == rotating:
            yield new


def _rounded(above: int, below: int) -> int:
    """Return the whole number nearest to above / below, of two the even one."""
    whole, rest = divmod(above, below)
    return whole + (2 * rest > below or (2 * rest == below and whole % 2))
