"""A teacher that is given a record without its gist: it sees the prompt itself, as the uncompressed model does."""

from collections.abc import Sequence
from typing import Any

import torch  # noqa: TID253
from torch import Tensor  # noqa: TID253

from surgeon.train.teacher import OnlineTeacher
from surgeon.train.view import View


class WithoutGist(OnlineTeacher):
    """An online teacher from whom gist tokens, of which it may know nothing, are taken away. `ids` are theirs."""

    def __init__(self, model: Any, ids: tuple[int, ...], *, view: View | None = None) -> None:
        super().__init__(model, view=view)
        self._ids = ids

    def see(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        token_index: Tensor | None,
        chosen: Tensor,
        *,
        layers: Sequence[int],
    ) -> tuple[tuple[Tensor, ...], dict[int, Tensor]]:
        """Return the teacher's states of the tokens `chosen`, none of them a gist's, (N, D), and behind `layers`."""
        assert position_ids is not None, "positions tell documents apart"
        ids, positions, order = without_gist(input_ids, position_ids, self._ids)
        return super().see(ids, positions, None, chosen.gather(1, order), layers=layers)


def without_gist(input_ids: Tensor, position_ids: Tensor, ids: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return a batch without its gist tokens, and which token each of its places holds, all of shape (B, T).

    Documents stay where they were, and their positions have no gap. What is left over at the end of a row is a document
    of its own, as padding is.
    """
    is_gist = torch.isin(input_ids, torch.tensor(ids, device=input_ids.device))
    kept = (~is_gist).sum(1)
    order = is_gist.long().argsort(dim=1, stable=True)[:, : int(kept.max())]
    before = is_gist.long().cumsum(1)  # gist tokens up to each token, of the row
    first = torch.zeros_like(before).masked_fill(position_ids == 0, 1) * (before - is_gist.long())
    # Of a document's first token it is those of the documents before it; `cummax` hands it on to the others.
    before = before - first.cummax(1).values
    positions = (position_ids - before).gather(1, order)
    place = torch.arange(order.shape[1], device=order.device).expand_as(order)
    padding = place >= kept[:, None]
    positions = torch.where(padding, place - kept[:, None], positions)
    return input_ids.gather(1, order), positions, order
