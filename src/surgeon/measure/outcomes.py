"""What a candidate is worth on rows of text: its loss, and how far it is from the whole model, token by token."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from surgeon.measure.scoring import targets_of
from surgeon.models.device import head_tokens
from surgeon.models.passage import Batch


@dataclass(frozen=True)
class Outcome:
    """What a candidate is worth on R rows of text: sums over the tokens of each row, shape (R,), in float64.

    `loss` is the next-token loss in nats, `kl` the divergence KL(whole model || candidate), `overlap` the probability
    that both share, Σ_v min(p_v, q_v), `agreeing` how often both think the same token the most likely. The last two
    count where the loss does: at every token with a token after it. `tokens` is how many these are, shape (R,).
    """

    loss: Tensor
    kl: Tensor
    overlap: Tensor
    agreeing: Tensor
    tokens: Tensor

    @property
    def mean_loss(self) -> float:
        """The mean next-token loss, in nats."""
        return self._mean(self.loss)

    @property
    def mean_kl(self) -> float:
        """The mean divergence from the whole model, in nats per token."""
        return self._mean(self.kl)

    @property
    def perplexity(self) -> float:
        """The exponential of the mean loss, infinite where that overflows."""
        return math.exp(self.mean_loss) if self.mean_loss < 700 else math.inf

    @property
    def acceptance(self) -> float:
        """The share of a draft's tokens that exact speculative sampling accepts: 1 - total variation."""
        return self._mean(self.overlap)

    @property
    def agreement(self) -> float:
        """How often the candidate's most likely token is the whole model's: greedy decoding accepts it."""
        return self._mean(self.agreeing)

    def over(self, other: "Outcome", of: str = "loss") -> tuple[float, float]:
        """Return by how much the mean of "loss" or "kl" is above another outcome's on these rows, and its error.

        The error is that of a mean of paired differences: rows weigh as many tokens as they have.
        """
        differences, weights = getattr(self, of) - getattr(other, of), self.tokens
        mean = float(differences.sum() / weights.sum())
        rows = len(differences)
        if rows < 2:
            return mean, math.inf
        spread = (differences - mean * weights).square().sum() * rows / (rows - 1)
        return mean, float(spread.sqrt() / weights.sum())

    def _mean(self, sums: Tensor) -> float:
        return float(sums.sum() / self.tokens.sum())


@dataclass
class OutcomeSums:
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

    def outcome(self) -> Outcome:
        return Outcome(*self.values)


def compare(
    head: Callable[[Tensor], Tensor],
    batch: Batch,
    whole: Tensor,
    candidates: Sequence[OutcomeSums],
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
