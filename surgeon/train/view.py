"""What each token of a batch sees of the others: the seam between a loss and how the states behind it come about."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

from torch import Tensor  # noqa: TID253

from surgeon.errors import PlanError
from surgeon.train.halves import Halves


class View:
    """How the states in front of the head are computed. `has_encoder`: of a model that has one."""

    has_encoder: ClassVar[bool] = False

    def states(
        self, halves: Halves, input_ids: Tensor, position_ids: Tensor | None, chosen: Tensor, **options: Any
    ) -> Tensor:
        """Return the states of a batch, shape (B, S, D), at least of the tokens `chosen`, (B, S): those trained."""
        raise NotImplementedError

    def reading(self, model: Any) -> AbstractContextManager[None]:
        """Return a context in which the head reads them; one that changes nothing, unless a view says otherwise."""
        return nullcontext()


class Causal(View):
    """Every token sees those of its document before it, as the model itself has it."""

    def states(
        self, halves: Halves, input_ids: Tensor, position_ids: Tensor | None, chosen: Tensor, **options: Any
    ) -> Tensor:
        """Return the states of the model's own forward pass."""
        return halves.states(input_ids, position_ids, **options)


def check_view(view: View, halves: Halves) -> None:
    """Raises PlanError for a model with an encoder in a view without one, and the other way round."""
    if view.has_encoder != bool(halves.model.config.is_encoder_decoder):
        has, lacks = ("one stack of layers", "two") if view.has_encoder else ("an encoder and a decoder", "one stack")
        raise PlanError(
            f"{type(halves.model).__name__} has {has}; what is trained here has {lacks}",
            hint="Encoder-decoders are trained with --gist, and are no teachers.",
        )
