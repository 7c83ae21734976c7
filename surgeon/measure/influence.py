"""How much each layer changes the state: block influence and relative magnitude, over all tokens.

Sources: block influence, 1 - E[cosine of a layer's input and output], Men et al. 2024, arXiv:2403.03853; relative
magnitude, E[|f(x)| / |x + f(x)|] of the residual branch f, Samragh et al. 2023, arXiv:2312.09299.
"""

import torch  # noqa: TID253
from torch import Tensor  # noqa: TID253

from surgeon.measure.device import wide
from surgeon.measure.streaming import Batch


class Influence:
    """Sums both scores of each layer over tokens."""

    def __init__(self, depth: int) -> None:
        self._cosine = torch.zeros(depth, dtype=torch.float64)
        self._magnitude = torch.zeros(depth, dtype=torch.float64)
        self._count = 0

    def begin(self, batch: Batch) -> None:
        """Count the batch's tokens."""
        self._count += batch.hidden[..., 0].numel() if batch.real is None else int(batch.real.sum())

    def see(self, layer: int, batch: Batch, before: Tensor, after: Tensor) -> None:
        """Take in the states before and behind a layer, shape (B, T, D)."""
        x, y = batch.chosen(before).float(), batch.chosen(after).float()
        size = torch.linalg.vector_norm(y, dim=-1)
        product = torch.linalg.vector_norm(x, dim=-1) * size
        self._cosine[layer] += wide((x * y).sum(-1) / product).sum().cpu()
        self._magnitude[layer] += wide(torch.linalg.vector_norm(y - x, dim=-1) / size).sum().cpu()

    def end_group(self) -> None:
        """Nothing waits for the end of a group."""

    def block_influence(self) -> list[float]:
        """Return 1 minus the mean cosine, a number a layer."""
        return [1.0 - value for value in (self._cosine / self._count).tolist()]

    def relative_magnitude(self) -> list[float]:
        """Return the mean share of what a layer adds, a number a layer."""
        return list((self._magnitude / self._count).tolist())
