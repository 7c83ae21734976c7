"""Evenly spaced positions to keep of an axis, without scores.

Source: weight selection (arXiv:2311.18823), here along whole axes: a head stays or goes as a whole, and a rotary head
keeps the dims whose frequencies a smaller head has.
"""

from collections.abc import Iterator, Sequence

from surgeon.anatomy.anatomy import Anatomy
from surgeon.anatomy.config import rope_types, rotary_share
from surgeon.errors import PlanError
from surgeon.transforms.axis_maps import rotary_places
from surgeon.transforms.widths import EXTENSIBLE_ROPE

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
    """Return the dims to keep of every head: each n-th rotary pair, and evenly spaced dims of the rest.

    So the smaller head has the frequencies of the pairs that stay.
    Raises PlanError, with the legal sizes, where a head of `new` dims has other frequencies.
    """
    old, turning = anatomy.sizes["head_dim"], _turning(anatomy)
    kept = turning_dims(anatomy, new)
    rest = uniform(old - turning, new - len(kept)) if new > len(kept) else ()
    return (*kept, *(turning + i for i in rest))


def turning_dims(anatomy: Anatomy, new: int) -> tuple[int, ...]:
    """Return which of a head's turning dims a head of `new` dims keeps, () where none turn.

    Raises PlanError, with the sizes that are legal, where a head of `new` dims has other frequencies.
    """
    family, old, turning = anatomy.require_family(), anatomy.sizes["head_dim"], _turning(anatomy)
    if not turning or new == old:
        return tuple(range(turning))
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
    assert family.rotary is not None, "rotary dims"
    times = old // new
    spread = rotary_places(turning // times, turning // times, times, family.rotary)
    return tuple(j for j, i in enumerate(spread) if i >= 0)


def check_head_dim(anatomy: Anatomy, kept: Sequence[int]) -> None:
    """Raises PlanError unless the dims `kept` of a head, ascending, turn by the frequencies of a head of that size."""
    legal, turning = turning_dims(anatomy, len(kept)), _turning(anatomy)
    given = tuple(i for i in kept if i < turning)
    if given != legal:
        raise PlanError(
            f"of the {turning} rotary dims a head of {len(kept)} has {list(legal)}, not {list(given)}",
            hint=f"Keep for example {list(uniform_head_dim(anatomy, len(kept)))}.",
        )


def _turning(anatomy: Anatomy) -> int:
    """Return how many dims of a head are rotary: the first ones."""
    if anatomy.require_family().rotary is None:
        return 0
    return int(anatomy.sizes["head_dim"] * rotary_share(anatomy.spec.config))


def _legal_sizes(anatomy: Anatomy) -> Iterator[int]:
    """Yield the smaller sizes of a head whose frequencies are among those of this one."""
    old, turning, share = anatomy.sizes["head_dim"], _turning(anatomy), rotary_share(anatomy.spec.config)
    for new in range(1, old):
        count = int(new * share)
        if old % new == 0 and count and count % 2 == 0 and count * (old // new) == turning:
            yield new


def _rounded(above: int, below: int) -> int:
    """Return the whole number nearest to above / below, of two the even one."""
    whole, rest = divmod(above, below)
    return whole + (2 * rest > below or (2 * rest == below and whole % 2))
