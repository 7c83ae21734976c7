"""What each token of a batch sees of the others: the seam between a loss and how the states behind it come about."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from torch import Tensor  # noqa: TID253

from surgeon.train.halves import Halves


class View(Protocol):
    """How the states in front of the head are computed."""

    def states(self, halves: Halves, input_ids: Tensor, position_ids: Tensor | None, **options: Any) -> Tensor:
        """Return the states of a batch, shape (B, S, D), at least where something is trained."""

    def reading(self, model: Any) -> AbstractContextManager[None]:
        """Return a context in which the head reads them."""


class Causal:
    """Every token sees those of its document before it, as the model itself has it."""

    def states(self, halves: Halves, input_ids: Tensor, position_ids: Tensor | None, **options: Any) -> Tensor:
        """Return the states of the model's own forward pass."""
        return halves.states(input_ids, position_ids, **options)

    def reading(self, model: Any) -> AbstractContextManager[None]:
        """Return a context that changes nothing."""
        return nullcontext()
