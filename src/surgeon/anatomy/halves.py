"""The halves of a layer, its attention and its MLP, and pairings: which halves a shallower model is made of.

A sequential decoder is the row A0 M0 A1 M1 ... of halves, each of which adds to the states. Every part of it that still
alternates A M A M ... is a model of fewer layers, of which layer j has the attention of one source layer and the MLP of
the same or a later one.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from surgeon.errors import PlanError

Half = Literal["attention", "mlp"]
ATTENTION: Half = "attention"
MLP: Half = "mlp"
HALVES: tuple[Half, Half] = (ATTENTION, MLP)


@dataclass(frozen=True, slots=True, order=True)
class Pairing:
    """The halves that are kept: layer j has the attention of source layer `attention[j]`, the MLP of layer `mlp[j]`."""

    attention: tuple[int, ...]
    mlp: tuple[int, ...]

    @classmethod
    def of_layers(cls, kept: Iterable[int]) -> "Pairing":
        """Return the pairing that keeps whole layers."""
        layers = tuple(kept)
        return cls(layers, layers)

    @classmethod
    def of_halves(cls, kept: Iterable[tuple[int, Half]]) -> "Pairing":
        """Return the pairing that keeps these halves, in their order."""
        halves = sorted(kept, key=place)
        lists = {half: tuple(layer for layer, own in halves if own == half) for half in HALVES}
        return cls(lists[ATTENTION], lists[MLP])

    @property
    def halves(self) -> tuple[tuple[int, Half], ...]:
        """The halves that are kept, in the order in which they run."""
        kept = [*((layer, ATTENTION) for layer in self.attention), *((layer, MLP) for layer in self.mlp)]
        return tuple(sorted(kept, key=place))

    @property
    def is_of_layers(self) -> bool:
        """Whether whole layers are kept."""
        return self.attention == self.mlp

    def to_dict(self) -> dict[str, list[int]]:
        """Return both lists for JSON."""
        return {ATTENTION: list(self.attention), MLP: list(self.mlp)}

    def check(self, depth: int) -> None:
        """Raises PlanError for halves that do not exist, and for those that do not come in turns."""
        if missing := sorted({layer for layer in (*self.attention, *self.mlp) if not 0 <= layer < depth}):
            raise PlanError(f"layers {missing} do not exist", hint=f"This model has layers 0 to {depth - 1}.")
        if len(self.attention) != len(self.mlp):
            raise PlanError(
                f"{len(self.attention)} attentions and {len(self.mlp)} MLPs make no layers of one attention and one MLP"
                " each",
                hint="Remove as many of the one as of the other.",
            )
        kept = self.halves
        for (layer, half), (following, other) in pairwise(kept):
            if half == other:
                name = {ATTENTION: "attentions", MLP: "MLPs"}[half]
                raise PlanError(
                    f"the {name} of layers {layer} and {following} would follow each other",
                    hint="An attention and an MLP have to come in turns.",
                )
        if kept and kept[0][1] != ATTENTION:
            raise PlanError(f"the MLP of layer {kept[0][0]} would come before any attention", hint="Remove it too.")


def place(half: tuple[int, Half]) -> int:
    """Return the place of a half in the row A0 M0 A1 M1 ... of its model."""
    return 2 * half[0] + (half[1] == MLP)
