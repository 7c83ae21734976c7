"""Pairings: which attention half and which MLP half each layer of a result is made of.

A sequential decoder is a string of halves, attention 0, MLP 0, attention 1, MLP 1 ... Every part of it that still
alternates so is an ordinary model with fewer layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Literal

from surgeon.errors import PlanError

Half = Literal["attention", "mlp"]
ATTENTION: Half = "attention"
MLP: Half = "mlp"


@dataclass(frozen=True)
class Pairing:
    """Layer j of a result is the attention half of source layer attention[j] and the MLP half of source layer mlp[j].

    Both lists ascend and interleave: attention[0] <= mlp[0] < attention[1] <= mlp[1] and so on.
    """

    attention: tuple[int, ...]
    mlp: tuple[int, ...]

    @classmethod
    def of_layers(cls, kept: Sequence[int]) -> "Pairing":
        """Return the pairing of whole layers."""
        return cls(tuple(kept), tuple(kept))

    @property
    def halves(self) -> tuple[tuple[int, Half], ...]:
        """The halves in the order in which they run, each as (source layer, half)."""
        pairs = zip(self.attention, self.mlp, strict=True)
        return tuple(chain.from_iterable(((a, ATTENTION), (m, MLP)) for a, m in pairs))

    def check(self, depth: int) -> None:
        """Raises PlanError where this is no model made of the halves of `depth` layers, in their order."""
        if len(self.attention) != len(self.mlp) or not self.attention:
            raise PlanError(
                f"{len(self.attention)} attentions and {len(self.mlp)} MLPs do not make whole layers",
                hint="A layer is one of each.",
            )
        places = [2 * layer + (half == MLP) for layer, half in self.halves]
        if not all(one < other for one, other in pairwise(places)) or not 0 <= places[0] <= places[-1] < 2 * depth:
            raise PlanError(
                f"attentions {list(self.attention)} and MLPs {list(self.mlp)} do not alternate in the order of {depth} "
                "layers",
                hint="The MLP of a layer comes no earlier than its attention, and before the next one.",
            )
