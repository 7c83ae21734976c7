"""What a candidate is worth on rows of text: its loss, and how far it is from the whole model, token by token."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from surgeon.measure.scoring import targets_of
from surgeon.models.device import head_tokens
from surgeon.models.passage import Batch
from surgeon.search.figures import Figures


@dataclass
class FigureSums:
    """The sums of a candidate, by rows, and its states of the batch at hand: None where they are the whole model's."""

    rows: int
    first: int = 0
    states: Tensor | None = None
    values: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.values = torch.zeros(5, self.rows, dtype=torch.float64)

    def begin(self, first: int, states: Tensor | None) -> None:
        self.first, self.states = first, states

    def add(self, rows: Tensor, *values: Tensor) -> None:
        """Add values of tokens, shape (N,) each, to the sums of their rows, and count them."""
        for sums, value in zip(self.values, (*values, torch.ones_like(values[0])), strict=True):
            sums.index_add_(0, self.first + rows, value.cpu().double())

    def figures(self) -> Figures:
        """Return the sums of all rows."""
        return Figures(*(tuple(sums.tolist()) for sums in self.values))


def compare(
    head: Callable[[Tensor], Tensor],
    batch: Batch,
    whole: Tensor,
    candidates: Sequence[FigureSums],
    *,
    true_head: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Add to each candidate's sums what it gives for the tokens of a batch, beside the whole model's `whole` states.

    `true_head` is the head of that whole model, where it is another one than the candidates'. Where one has more rows,
    these only pad the vocabulary: no text has them.
    """
    following, counted = targets_of(batch)
    chosen = counted.to(whole.device)
    rows, targets = counted.cpu().nonzero()[:, 0], following[chosen]
    states = [None if each.states is None else each.states[:, :-1][chosen] for each in candidates]
    reference = whole[:, :-1][chosen]
    size = min(head_tokens(whole.device), batch.tokens.shape[1])  # no more than the model has positions for
    for at in range(0, len(reference), size):
        few = slice(at, at + size)
        truth = nn.functional.log_softmax((true_head or head)(reference[few]).float(), -1)
        p, best = truth.exp(), truth.argmax(-1)
        for each, own in zip(candidates, states, strict=True):
            guess = truth if own is None else nn.functional.log_softmax(head(own[few]).float(), -1)
            loss = -guess.gather(-1, targets[few, None])[:, 0]
            if own is None:
                one = torch.ones_like(loss)
                each.add(rows[few], loss, torch.zeros_like(loss), one, one)
                continue
            known = min(truth.shape[-1], guess.shape[-1])
            kl = (p[:, :known] * (truth[:, :known] - guess[:, :known])).sum(-1)
            overlap = torch.minimum(p[:, :known], guess[:, :known].exp()).sum(-1)
            each.add(rows[few], loss, kl, overlap, (guess.argmax(-1) == best).float())
