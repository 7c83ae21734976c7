"""Choose which layers go, from scores: pure, so that the same scores can be cut again for another number."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from surgeon.errors import PlanError


@dataclass(frozen=True, slots=True)
class Method:
    """How a score is used: whether one block goes or any layers, how many first and last layers its authors keep.

    `measured` says whether it has numbers, `width` what ranks neurons, heads, channels and experts beside it.
    """

    block: bool
    protect: tuple[int, int] = (0, 0)
    measured: bool = True
    width: str = "activation"


METHODS: Mapping[str, Method] = {
    "angular": Method(block=True),
    "block-influence": Method(block=False),
    "relative-magnitude": Method(block=False),
    "perplexity": Method(block=False),
    "taylor": Method(block=False, protect=(4, 2)),
    "magnitude": Method(block=False, protect=(4, 2), width="magnitude"),
    "random": Method(block=False, measured=False, width="random"),
    "last": Method(block=True, protect=(0, 1), measured=False),
    "uniform": Method(block=True, measured=False, width="uniform"),
}
GREEDY_PROTECT = (1, 1)  # SLEB removes neither the first nor the last of the layers that are left


@dataclass(frozen=True)
class Choice:
    """The layers that go, the score of having them go, and the next best choice with its score.

    Scores are None where the method has none. The lower, the less a choice is thought to change.
    """

    dropped: tuple[int, ...]
    score: float | None = None
    next_best: tuple[int, ...] | None = None
    next_score: float | None = None


def choose_layers(
    name: str,
    count: int,
    depth: int,
    *,
    values: Sequence[Any] | None = None,
    order: Sequence[int] | None = None,
    contiguous: bool | None = None,
    protect: tuple[int, int] | None = None,
    seed: int = 0,
) -> Choice:
    """Return which `count` of `depth` layers go by the score `name`.

    `values` are its scores (of "angular" the matrix); `order` is the order of a greedy removal instead. `contiguous`
    and `protect` (how many first and last layers stay) override what the method's authors do.

    Raises PlanError when so many layers cannot go.
    """
    if name not in METHODS:
        raise PlanError(f"unknown score {name!r}", hint=f"One of: {', '.join(METHODS)}.")
    first, last = METHODS[name].protect if protect is None else protect
    block = METHODS[name].block if contiguous is None else contiguous
    free = range(first, depth - last)
    if count == 0:
        return Choice(())
    if not 0 < count <= len(free) or count == depth:
        raise PlanError(
            f"cannot remove {count} of {depth} layers when the first {first} and the last {last} stay",
            hint="Ask for more layers, or protect fewer: --protect 0,0.",
        )
    if order is not None:
        return _by_order(order, count)
    if name == "random":
        drawn = random.Random(seed)  # noqa: S311  (no secret)
        start = drawn.choice(range(first, depth - last - count + 1))
        return Choice(tuple(range(start, start + count)) if block else tuple(sorted(drawn.sample(free, count))))
    if name in ("last", "uniform"):
        return Choice(tuple(free[-count:]))
    assert values is not None, f"{name} has values"
    return _best_block(name, values, count, free) if block else _lowest(name, values, count, free)


def _by_order(order: Sequence[int], count: int) -> Choice:
    if count > len(order):
        raise PlanError(
            f"the greedy order goes {len(order)} layers deep, not {count}", hint="Score again: leave out --scores-from."
        )
    return Choice(tuple(sorted(order[:count])))


def _best_block(name: str, values: Sequence[Any], count: int, free: range) -> Choice:
    starts = range(free.start, free.stop - count + 1)

    def cost(start: int) -> float:
        if name == "angular":
            return float(values[start][start + count])
        return math.fsum(values[start : start + count])

    _check_numbers(name, [cost(start) for start in starts])
    ranked = sorted(starts, key=lambda start: (cost(start), start))
    best = ranked[0]
    following = ranked[1] if len(ranked) > 1 else None
    return Choice(
        tuple(range(best, best + count)),
        cost(best),
        None if following is None else tuple(range(following, following + count)),
        None if following is None else cost(following),
    )


def _lowest(name: str, values: Sequence[Any], count: int, free: range) -> Choice:
    single = [float(row[layer + 1]) if name == "angular" else float(row) for layer, row in enumerate(values)]
    _check_numbers(name, single)
    ranked = sorted(free, key=lambda layer: (single[layer], layer))
    best = tuple(sorted(ranked[:count]))
    total = math.fsum(single[layer] for layer in best)
    if len(ranked) == count:
        return Choice(best, total)
    following = tuple(sorted([*ranked[: count - 1], ranked[count]]))
    return Choice(best, total, following, math.fsum(single[layer] for layer in following))


def _check_numbers(name: str, costs: Sequence[float]) -> None:
    """Refuse to rank what is no number: any order would do."""
    if any(map(math.isnan, costs)):
        raise PlanError(
            f"the scores {name!r} are not all numbers (NaN): the model overflows on this text",
            hint="Score in float32, or on other data.",
        )
