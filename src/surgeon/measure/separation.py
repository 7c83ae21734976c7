"""How far apart a model's states of a text lie: the distance of each to its nearest neighbour.

Niu et al. 2024 (arXiv:2405.08707) take the last states of training sequences for patterns of a memory, which is told
from a good one by how far apart they lie. A distance by itself is set by the gain of the last norm; what says
something is its ratio to that of as many draws from a normal distribution of the same mean and covariance: states in
clusters, and states of repeated text, are nearer to each other than such draws are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from surgeon.errors import MeasureError
from surgeon.models.device import groups, row_bytes, wide
from surgeon.models.streaming import StreamedModel, row_sums
from surgeon.progress import meter

PER_ROW = 8  # states of a row: the last one, and others evenly before it
MOST = 4096  # states; all of them are compared with each other
BLOCK = 512  # states that are compared with all others at once
FEWEST = 16  # states; of fewer a covariance says nothing


@dataclass(frozen=True, eq=False)
class Separation:
    """The median distance of a state to its nearest neighbour, and the same of `normal` draws, of so many states."""

    distance: float
    normal: float
    states: int

    @property
    def ratio(self) -> float:
        """The distance in units of that of the normal draws: near 0 where the text repeats itself."""
        return self.distance / self.normal


def final_states(model: StreamedModel, tokens: Tensor) -> tuple[Tensor, Sequence[float]]:
    """Return PER_ROW states of each row that the head reads, (N, D) in float32 on the CPU, and the rows' loss sums.

    `tokens` has shape (R, T). Raises MeasureError where a loss is not finite.
    """
    model.check_head()
    model.check_predicts()
    length = tokens.shape[1]
    places = torch.arange(1, min(PER_ROW, length) + 1) * length // min(PER_ROW, length) - 1
    counted = torch.ones(len(tokens), length - 1, dtype=torch.bool)
    states, sums = [], []
    progress = meter("reading the text", tokens.numel(), model.depth)
    with torch.no_grad():
        for start, stop in groups(len(tokens), row_bytes(length, 2 * model.hidden_size), model.states_bytes):
            batches = model.start(tokens[start:stop])
            model.run(batches, progress=progress)
            with model.finish(batches) as head:
                for batch in batches:
                    states.append(batch.hidden[:, places.to(batch.hidden.device)].flatten(0, 1).float().cpu())
                    sums.append(row_sums(head, batch, batch.hidden, counted[: len(batch.tokens)]))
    losses = torch.cat(sums)
    if not bool(losses.isfinite().all()):
        raise MeasureError(f"{model.label} gives a loss that is not finite", hint="Its weights may not be finite.")
    return torch.cat(states), losses.tolist()


def separation(states: Tensor, *, seed: int = 0) -> Separation | None:
    """Return the separation of states, shape (N, D); of more than MOST every n-th is taken. None for too few."""
    chosen = wide(states[:: -(-len(states) // MOST)])
    if len(chosen) < FEWEST:
        return None
    centred = chosen - chosen.mean(0)
    values, vectors = torch.linalg.eigh(centred.mT @ centred / (len(chosen) - 1))
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(chosen.shape, generator=generator, dtype=torch.float64)
    normal = draws * values.clamp(min=0).sqrt() @ vectors.mT
    return Separation(float(nearest(centred).median()), float(nearest(normal).median()), len(chosen))


def nearest(states: Tensor) -> Tensor:
    """Return the distance of each state to the nearest other one, shape (N, D) to (N,)."""
    found = []
    for at in range(0, len(states), BLOCK):
        block = states[at : at + BLOCK]
        # Differences, not |a|² + |b|² - 2ab: of equal states that would leave rounding in place of zero.
        distances = torch.cdist(block, states, compute_mode="donot_use_mm_for_euclid_dist")
        distances[torch.arange(len(block)), torch.arange(at, at + len(block))] = torch.inf
        found.append(distances.min(1).values)
    return torch.cat(found)
