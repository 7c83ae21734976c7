"""The loss of a model with layers left out: of any number of choices in one streamed pass.

Choices that leave out the same of the first layers share their states up to there, so that scoring every layer's
removal costs half of what as many passes would, exactly. Sources of the scores: Kim et al. 2024 (Shortened LLaMA,
arXiv:2402.02834), one layer at a time; SLEB (arXiv:2402.09025), greedily, round after round.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from surgeon.errors import MeasureError
from surgeon.models.streaming import HEAD_TOKENS, Batch, StreamedModel

STATES_BYTES = 2_000_000_000  # what the states of a group of rows may take in memory
Progress = Callable[[int], None]  # is told how many more tokens went through how many layers, multiplied


def groups(rows: int, bytes_per_row: int, budget: int = STATES_BYTES) -> list[tuple[int, int]]:
    """Return ranges of rows whose states fit in memory together, as even as they can be; a row is never cut."""
    most = max(1, budget // bytes_per_row)
    count = math.ceil(rows / most)
    edges = [rows * i // count for i in range(count + 1)] if rows else []
    return list(pairwise(edges))


def losses_without(
    model: StreamedModel,
    tokens: Tensor,
    removed: Sequence[frozenset[int]],
    *,
    real: Tensor | None = None,
    progress: Progress | None = None,
) -> list[float]:
    """Return the mean next-token loss, in nats, of the model without each of these sets of layers.

    `tokens` has shape (R, T); the loss is taken inside rows, over targets that are no padding.
    """
    totals = torch.zeros(len(removed), dtype=torch.float64)
    count = 0
    row_bytes = tokens.shape[1] * model.hidden_size * 4 * (len(set(removed)) + 1)
    with torch.no_grad():
        for start, stop in groups(len(tokens), row_bytes):
            batches = model.embed(tokens[start:stop], None if real is None else real[start:stop])
            paths = _through(model, batches, removed, progress)
            count += sum(int(targets_of(batch)[1].sum()) for batch in batches)
            with model.head() as head:
                for variants, states in paths:
                    sums = [loss_sum(head, batch, state) for batch, state in zip(batches, states, strict=True)]
                    totals[variants] += sum(total for total, _ in sums)
    return [mean_loss(float(total), count) for total in totals]


def _through(
    model: StreamedModel,
    batches: Sequence[Batch],
    removed: Sequence[frozenset[int]],
    progress: Progress | None,
) -> list[tuple[list[int], list[Tensor]]]:
    """Return the final states, once for choices that agree, with the numbers of the choices."""
    paths = [(list(range(len(removed))), [batch.hidden for batch in batches])]
    for index in range(model.depth):
        following, takers = [], []
        for variants, states in paths:
            takes = [v for v in variants if index not in removed[v]]
            if len(takes) < len(variants):
                following.append(([v for v in variants if index in removed[v]], states))
            if takes:
                takers.append((takes, states))
        paths = following
        if takers:
            with model.layer(index) as apply:
                while takers:  # let go of each path's states once they are through: the next of all would double them
                    takes, states = takers.pop()
                    moved = [apply(batch, state) for batch, state in zip(batches, states, strict=True)]
                    paths.append((takes, moved))
                    if progress:
                        progress(sum(batch.tokens.numel() for batch in batches))
    return paths


def targets_of(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the next tokens, shape (B, T - 1), and which of them count: a token that follows a token, no padding."""
    following = batch.tokens[:, 1:]
    if batch.real is None:
        return following, torch.ones_like(following, dtype=torch.bool)
    return following, batch.real[:, 1:] & batch.real[:, :-1]


def losses_of(head: Callable[[Tensor], Tensor], batch: Batch, states: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Yield the sum of next-token losses, in nats, of a few of a batch's tokens at a time, and how many they are."""
    following, counted = targets_of(batch)
    flat, targets = states[:, :-1][counted], following[counted]
    size = min(HEAD_TOKENS, batch.tokens.shape[1])  # no more than the model has positions for
    for at in range(0, len(flat), size):
        logits, wanted = head(flat[at : at + size]).float(), targets[at : at + size]
        yield torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"), len(wanted)


def loss_sum(head: Callable[[Tensor], Tensor], batch: Batch, states: Tensor) -> tuple[float, int]:
    """Return the sum of a batch's next-token losses, in nats, and of how many tokens it is."""
    total, count = 0.0, 0
    for loss, number in losses_of(head, batch, states):
        total += float(loss)
        count += number
    return total, count


def mean_loss(total: float, count: int) -> float:
    """Return the mean loss of a next token. Raises MeasureError when there is none."""
    if not count:
        raise MeasureError("a text of one token predicts nothing", hint="Give --data with more text.")
    return total / count


def perplexities(losses: Sequence[float]) -> list[float]:
    """Return exp of each loss; infinite where that is beyond a float."""
    return [math.exp(loss) if loss < 700 else math.inf for loss in losses]


def one_by_one(model: StreamedModel, tokens: Tensor, *, progress: Progress | None = None) -> list[float]:
    """Return the perplexity of the model without layer i, for each i."""
    choices = [frozenset({layer}) for layer in range(model.depth)]
    return perplexities(losses_without(model, tokens, choices, progress=progress))


def greedy(
    model: StreamedModel,
    tokens: Tensor,
    count: int,
    *,
    protect: tuple[int, int] = (1, 1),
    progress: Progress | None = None,
) -> tuple[list[int], list[float]]:
    """Return `count` layers in the order in which they go, and the perplexity behind each removal.

    Round after round the layer goes whose removal costs least. The first and last of the layers that are left are
    protected, as many as `protect` says.
    """
    most = max(0, min(model.depth - sum(protect), model.depth - 1))
    if count > most:
        raise MeasureError(
            f"cannot remove {count} of {model.depth} layers when the first {protect[0]} and the last {protect[1]} stay",
            hint=f"At most {most} can go; --protect 0,0 protects none.",
        )
    order: list[int] = []
    after: list[float] = []
    for _ in range(count):
        left = [layer for layer in range(model.depth) if layer not in order]
        candidates = left[protect[0] : len(left) - protect[1]]
        choices = [frozenset({*order, layer}) for layer in candidates]
        losses = losses_without(model, tokens, choices, progress=progress)
        best = min(range(len(losses)), key=lambda i: losses[i])
        order.append(candidates[best])
        after += perplexities([losses[best]])
    return order, after
