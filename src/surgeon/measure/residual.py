"""Scores of the residual stream: the angular distance across blocks, block influence, and relative magnitude.

Angular distance of the states before any two layers, for blocks of every size at once. Source: Gromov et al. 2024,
arXiv:2403.17887: d(s, e) = arccos(cosine of x_s and x_e) / π, of the last token of a sample, averaged over samples. The
x_e of the last e is taken before the final norm, which would change its direction. Block influence: arXiv:2403.03853;
relative magnitude: arXiv:2312.09299; both are means over all tokens.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from surgeon.models.device import wide
from surgeon.models.passage import Batch


class Observer:
    """Sees the states between layers while batches go through them. A subclass overrides what it needs.

    `kept_states` is how many states of each token it keeps until its group of rows is done.
    """

    kept_states = 0

    def begin(self, batch: Batch) -> None:
        """See a batch before the first layer."""

    def see(self, layer: int, batch: Batch, before: Tensor, after: Tensor) -> None:
        """See the states before and after a layer, shape (B, T, D)."""

    def end_group(self) -> None:
        """See the end of a group of rows: the hidden states of its batches are the final ones now."""

    def add_up(self, of_all: Callable[[Tensor], Tensor]) -> None:
        """Make the sums those of all processes: `of_all` returns the sum of a tensor over them."""


class Angular(Observer):
    """Collects states for the matrix of their distances: of the last token of each row, or of `all_tokens`."""

    def __init__(self, depth: int, *, all_tokens: bool) -> None:
        self._all_tokens = all_tokens
        self.kept_states = depth + 1 if all_tokens else 0  # those of last tokens are few
        self._sum = torch.zeros(depth + 1, depth + 1, dtype=torch.float64)
        self._count = 0
        self._states: list[list[Tensor]] = [[] for _ in range(depth + 1)]

    def begin(self, batch: Batch) -> None:
        """Keep the states before the first layer."""
        self._keep(0, batch, batch.hidden)

    def see(self, layer: int, batch: Batch, before: Tensor, after: Tensor) -> None:
        """Keep the states after a layer, shape (B, T, D)."""
        self._keep(layer + 1, batch, after)

    def end_group(self) -> None:
        """Add the distances of the collected states to the sum, and free the states."""
        states = [torch.cat(parts) for parts in self._states]
        step = (1 << 22) // (len(states) * states[0].shape[-1]) + 1  # rows whose states fit a cache
        for at in range(0, len(states[0]), step):
            self._sum += distances(torch.stack([state[at : at + step] for state in states], 1)).sum(0)
        self._count += len(states[0])
        self._states = [[] for _ in self._states]

    def add_up(self, of_all: Callable[[Tensor], Tensor]) -> None:
        """Make the sums those of all processes."""
        self._sum, self._count = of_all(self._sum), int(of_all(torch.tensor(self._count)))

    def result(self) -> list[list[float | None]]:
        """Return the matrix, entry [s][e] in units of π: s from 0 to depth - 1, e to depth, None where e <= s."""
        mean = (self._sum / self._count).tolist()
        return [[value if e > s else None for e, value in enumerate(row)] for s, row in enumerate(mean[:-1])]

    def _keep(self, place: int, batch: Batch, states: Tensor) -> None:
        chosen = batch.chosen(states) if self._all_tokens else last_tokens(batch, states)
        self._states[place].append(chosen.clone())


def last_tokens(batch: Batch, states: Tensor) -> Tensor:
    """Return the states of each row's last token that is no padding, shape (B, D)."""
    if batch.real is None:
        return states[:, -1]
    places = torch.arange(states.shape[1], device=states.device)
    last = (batch.real * (places + 1)).argmax(-1)
    return states[torch.arange(len(states), device=states.device), last]


def distances(states: Tensor) -> Tensor:
    """Return the distances of all pairs of states of each row, from (N, L + 1, D) to (N, L + 1, L + 1), in float64.

    One Gram matrix a row gives them all. In float64, for the arc cosine of a number near 1 loses half its digits.
    """
    unit = torch.nn.functional.normalize(wide(states), dim=-1, eps=0.0)
    return (unit @ unit.mT).clamp(-1.0, 1.0).arccos().cpu() / math.pi


class Influence(Observer):
    """Sums block influence and relative magnitude of each layer over tokens."""

    def __init__(self, depth: int) -> None:
        self._cosine = torch.zeros(depth, dtype=torch.float64)
        self._magnitude = torch.zeros(depth, dtype=torch.float64)
        self._count = 0

    def begin(self, batch: Batch) -> None:
        """Count the batch's tokens."""
        self._count += batch.hidden[..., 0].numel() if batch.real is None else int(batch.real.sum())

    def see(self, layer: int, batch: Batch, before: Tensor, after: Tensor) -> None:
        """Add the scores of a layer, from its input and output, shape (B, T, D)."""
        x, y = batch.chosen(before).float(), batch.chosen(after).float()
        size = torch.linalg.vector_norm(y, dim=-1)
        product = torch.linalg.vector_norm(x, dim=-1) * size
        self._cosine[layer] += wide((x * y).sum(-1) / product).sum().cpu()
        self._magnitude[layer] += wide(torch.linalg.vector_norm(y - x, dim=-1) / size).sum().cpu()

    def add_up(self, of_all: Callable[[Tensor], Tensor]) -> None:
        """Make the sums those of all processes."""
        self._cosine, self._magnitude = of_all(self._cosine), of_all(self._magnitude)
        self._count = int(of_all(torch.tensor(self._count)))

    def block_influence(self) -> list[float]:
        """Return 1 minus the mean cosine of each layer's input and output."""
        return [1.0 - value for value in (self._cosine / self._count).tolist()]

    def relative_magnitude(self) -> list[float]:
        """Return the mean size of each layer's update, relative to its output."""
        return list((self._magnitude / self._count).tolist())
