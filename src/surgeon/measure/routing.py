"""The importance of experts by their gates and their outputs.

Source: REAP (arXiv:2510.13999): S_j = mean, over the tokens that reach expert j, of g_j · |f_j|₂, with the gates of a
token's chosen experts summing to 1. Experts run one slot at a time, which costs no more than all slots at once and
gives each expert's part of the sum.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.errors import MeasureError
from surgeon.measure.activations import Watcher
from surgeon.models.device import wide


class Routing(Watcher):
    """Sums each expert's contributions, and counts its tokens."""

    def __init__(self, depth: int, experts: int) -> None:
        self._sum = torch.zeros(depth, experts, dtype=torch.float64)
        self._count = torch.zeros(depth, experts, dtype=torch.float64)

    @contextmanager
    def watch(self, layer: int, module: nn.Module) -> Iterator[None]:
        """Return a context in which a layer's experts, if it has any, are counted."""
        experts = next((part for name, part in module.named_modules() if name.rpartition(".")[2] == "experts"), None)
        if experts is None:
            yield
            return
        original = experts.forward
        if len(inspect.signature(original).parameters) < 3:
            raise MeasureError(
                "the experts of this model are given states without the tokens' choices, so they cannot be scored",
                hint="Use --score magnitude.",
            )

        def forward(hidden: Tensor, chosen: Tensor, gates: Tensor, *rest: Any) -> Tensor:
            parts = (
                original(hidden, chosen[:, slot : slot + 1], gates[:, slot : slot + 1], *rest)
                for slot in range(chosen.shape[1])
            )
            total = torch.zeros_like(hidden)
            for slot, part in enumerate(parts):
                total += part
                self._count_slot(layer, chosen[:, slot], part.view(len(chosen), -1), gates.sum(-1))
            return total

        experts.forward = forward
        try:
            yield
        finally:
            del experts.forward

    def add_up(self, of_all: Callable[[Tensor], Tensor]) -> None:
        """Make the sums those of all processes."""
        self._sum, self._count = of_all(self._sum), of_all(self._count)

    def result(self, ranking: str = "activation") -> dict[str, Tensor]:
        """Return "experts", shape (L, E): 0 for an expert that no token reached."""
        return {"experts": self._sum / self._count.clamp(min=1)}

    def _count_slot(self, layer: int, chosen: Tensor, part: Tensor, gates: Tensor) -> None:
        contribution = wide(torch.linalg.vector_norm(part.float(), dim=-1) / gates.float())
        if self.batch is not None and self.batch.real is not None:
            real = self.batch.real.flatten()
            chosen, contribution = chosen[real], contribution[real]
        self._sum[layer].index_add_(0, chosen.cpu(), contribution.cpu())
        self._count[layer] += torch.bincount(chosen.cpu(), minlength=self._count.shape[1])
