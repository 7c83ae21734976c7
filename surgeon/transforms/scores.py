"""The scores that choose which layers go, in one table."""

from collections.abc import Mapping
from dataclasses import dataclass


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
