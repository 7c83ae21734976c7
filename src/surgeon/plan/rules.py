"""The rules by which one tensor is made of several models' tensors: their settings, and what they have in common."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A rule and its settings, the same for all tensors of a merge.

    `normalize`: the weights are divided by their sum; where differences vote, by that of those that agree. `scale`
    multiplies what is added to the base. `seed` decides what random differences lose.
    """

    name: str
    normalize: bool = True
    scale: float = 1.0
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What all merges by one rule have in common.

    `of_differences`: the rule is about what each model adds to the base, which it needs; it `may_have_base` too where
    it can go without. `models` are how many it takes at least and at most. `votes`, `trims` and `drops` are the three
    things that can happen to a difference: opposite signs lose, small numbers go, random numbers go.
    """

    of_differences: bool = False
    may_have_base: bool = False
    models: tuple[int, int] = (1, 1000)
    normalize: bool = True
    has_weights: bool = True
    votes: bool = False
    trims: bool = False
    drops: bool = False

    @property
    def thins(self) -> bool:
        """Whether only a part of each difference stays."""
        return self.trims or self.drops


KINDS: Mapping[str, Kind] = {
    "linear": Kind(),
    "task-arithmetic": Kind(of_differences=True, normalize=False),
    "ties": Kind(of_differences=True, votes=True, trims=True),
    "dare": Kind(of_differences=True, normalize=False, drops=True),
    "dare-ties": Kind(of_differences=True, normalize=False, drops=True, votes=True),
    "slerp": Kind(models=(2, 2)),
    "nuslerp": Kind(models=(2, 2), may_have_base=True),
    "model-stock": Kind(of_differences=True, models=(2, 1000), has_weights=False),
    "karcher": Kind(),
}
