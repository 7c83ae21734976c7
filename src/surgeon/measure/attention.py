"""Measures of attention maps: how many directions, and how many columns, hold the energy of a map.

Source: Sanyal et al. 2024 (Inheritune: when attention collapses), arXiv:2404.08634v4, section 2 and appendix A. A map
is T x T, after the softmax. Its rank and its mass are taken of each sequence alone, and averaged afterwards: the map of
the mean has another rank. All of them depend on T, so that figures of different T must not be compared.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from surgeon.errors import MeasureError
from surgeon.measure.activations import Watcher
from surgeon.models.device import wide
from surgeon.models.maps import HINT, looking
from surgeon.models.passage import Batch

MEASURES: Mapping[str, str] = {
    "rank": "directions that hold the energy",
    "stable_rank": "all energy over that of the first direction",
    "column_mass": "columns that hold the energy",
    "sink": "attention on the first token",
    "top_column": "share of the energy in the largest column",
    "rank_without_sink": "rank with the first column set to 0",
    "entropy": "entropy of a row over that of equal weights",
}
# A share of the energy that is reached but for rounding is reached: float32 eigenvalues err by some 1e-7 of the sum.
ROUNDING = 1e-6


@contextmanager
def one_thread() -> Iterator[None]:
    """Return a context in which torch computes in one thread: small eigenproblems are slower in more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measures_of(maps: Tensor, energy: float) -> Tensor:
    """Return the measures of maps, from shape (..., T, T) to (..., M), in the order of MEASURES, in float64.

    With s the singular values, ||A|| the Frobenius norm and E the share `energy`: rank is the least k for which the
    first k s² are E of their sum; stable_rank is ||A||² / s₁²; column_mass is the least number of columns whose squares
    are E of ||A||². The s² are the eigenvalues of A Aᵀ. A map without its first column may be all zeros: its rank is 0.
    """
    maps = maps.detach().float().cpu()
    whole, rest = _energies(maps), _energies(maps[..., 1:])
    columns, sink = wide(maps.square().sum(-2)), wide(maps[..., 0])
    measures = {
        "rank": _count(whole, energy),
        "stable_rank": whole.sum(-1) / whole[..., 0],
        "column_mass": _count(columns.sort(-1, descending=True).values, energy),
        "sink": sink.mean(-1),
        "top_column": columns.amax(-1) / columns.sum(-1),
        # What is left of a map that was all in its first column is rounding.
        "rank_without_sink": _count(torch.where(rest < ROUNDING * whole.sum(-1, keepdim=True), 0.0, rest), energy),
        "entropy": _entropy(maps),
    }
    return torch.stack([measures[name] for name in MEASURES], -1)


def _energies(maps: Tensor) -> Tensor:
    """Return the squares of the singular values, descending, from (..., T, C) to (..., T), in float64.

    In float32 LAPACK gives up on a rare matrix whose eigenvalues span too much; in float64 it does not.
    """
    gram = maps @ maps.mT
    with one_thread():
        try:
            values: Tensor = torch.linalg.eigvalsh(gram)
        except RuntimeError:  # LinAlgError
            values = torch.linalg.eigvalsh(wide(gram))
    return wide(values).clamp(min=0).flip(-1)


def _count(parts: Tensor, share: float) -> Tensor:
    """Return how many parts, descending along the last dim, reach a share of their sum; 0 where that is 0."""
    total = parts.sum(-1, keepdim=True)
    short = parts.cumsum(-1) < (share - ROUNDING) * total
    return wide(torch.where(total[..., 0] > 0, short.sum(-1) + 1, 0))


def _entropy(maps: Tensor) -> Tensor:
    """Return the mean over rows but the first of the entropy of row i over log i, the most that i weights can have."""
    places = torch.arange(2, maps.shape[-1] + 1).log()
    rows: Tensor = -torch.special.xlogy(maps, maps).sum(-1)[..., 1:]
    return wide((rows / places).mean(-1))


def calibration(length: int, energy: float) -> dict[str, dict[str, float]]:
    """Return the measures of maps whose meaning is known, T = `length`, by the name of the pattern."""
    places = torch.arange(length)
    own, first = torch.eye(length), torch.zeros(length, length)
    first[:, 0] = 1
    causal = (places[:, None] >= places).float()
    window = causal * (places[:, None] - places < 8)
    noise = torch.randn(length, length, generator=torch.Generator().manual_seed(0))
    patterns = {
        "all on token 0": first,
        "90 % token 0, 10 % self": 0.9 * first + 0.1 * own,
        "80 % token 0, 20 % self": 0.8 * first + 0.2 * own,
        "50 % token 0, 50 % self": 0.5 * first + 0.5 * own,
        "uniform causal": causal / causal.sum(-1, keepdim=True),
        "uniform, not causal": torch.full((length, length), 1 / length),
        "random logits, causal": noise.masked_fill(causal == 0, -math.inf).softmax(-1),
        "local window of 8": window / window.sum(-1, keepdim=True),
        "previous token": own[(places - 1).clamp(min=0)],
        "self": own,
    }
    return {
        name: dict(zip(MEASURES, measures_of(map_, energy).tolist(), strict=True)) for name, map_ in patterns.items()
    }


class AttentionMaps(Watcher):
    """Reduces the maps of each layer to MEASURES, one set for each sequence and head.

    `names` holds the path of the attention in each layer that has one, such as "self_attn".
    """

    def __init__(self, label: str, energy: float) -> None:
        self._label, self._energy = label, energy
        self._parts: dict[int, list[Tensor]] = {}
        self._seen: dict[int, Batch | None] = {}  # the batch whose map was seen last
        self.names: dict[int, str] = {}

    @contextmanager
    def watch(self, layer: int, module: nn.Module) -> Iterator[None]:
        """Return a context in which the maps of a layer are seen."""
        with looking(module, partial(self._look, layer, module)):
            yield

    def of_layers(self) -> dict[int, Tensor]:
        """Return the measures of each layer that has attention, shape (R, H, M), in the order of MEASURES."""
        return {layer: torch.cat(parts) for layer, parts in self._parts.items()}

    def _look(self, layer: int, module: nn.Module, attention: nn.Module, maps: Tensor) -> None:
        assert self.batch is not None, "a layer runs on a batch"
        if self._seen.get(layer) is self.batch:
            raise MeasureError(f"layer {layer} of {self._label} has more than one attention", hint=HINT)
        self._seen[layer] = self.batch
        self.names[layer] = next(name for name, part in module.named_modules() if part is attention)
        if maps.shape[-1] != maps.shape[-2]:
            shape = list(maps.shape)
            raise MeasureError(f"layer {layer} of {self._label} has maps of shape {shape}, not T x T", hint=HINT)
        self._parts.setdefault(layer, []).append(measures_of(maps, self._energy))
