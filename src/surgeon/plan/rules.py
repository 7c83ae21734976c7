"""The expressions that make one tensor of several models', and their rules; mixing.py, regressing.py compute them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


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


# Expressions: their parts are those of `plan/plan.py`


@dataclass(frozen=True, slots=True)
class Mix:
    """One tensor of several models' `parts` of one shape, by a rule, rounded once to `dtype`.

    With a `base`, the rule is applied to the differences from it. `densities` are the parts of each that stay, where
    the rule thins them out. `streams` name the random stream of each, so that a draw depends neither on the order of
    the parts nor on the files that hold them.
    """

    parts: tuple[Any, ...]
    base: Any
    weights: tuple[float, ...]
    rule: Rule
    dtype: str
    densities: tuple[float, ...] = ()
    streams: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Regress:
    """A linear map, or its bias, that does on each model's text what that model's map does (`plan/regressing.py`).

    `maps` are the models' weights, `biases` their biases where they have one, `grams` the Gram matrices of the inputs,
    None where a model has no text.
    """

    maps: tuple[Any, ...]
    biases: tuple[Any, ...]
    grams: tuple[Any, ...]
    weights: tuple[float, ...]
    alpha: float
    dtype: str
    is_transposed: bool = False  # stored as inputs x outputs
    is_bias: bool = False  # which of the two this is
