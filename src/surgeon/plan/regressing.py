"""The map that does on several models' texts, as closely as one can, what each of them does on its own: RegMean.

Of maps W_j (outputs x inputs) with inputs x on text j, and the Gram matrices G_j = E[x x^T]:

    minimise  sum_j c_j E |W x - W_j x|^2,   each G_j with its off-diagonal numbers times alpha

The solution is written as the mean of the maps and a correction, with a ridge towards that mean, so that equal maps
stay what they are bit for bit. A model without a Gram matrix is taken to see what the others see on average. Solved in
float64. Source: arXiv:2212.09849, equation 2; the ridge, and a bias as one more input that is always 1, are added here.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from surgeon.plan.expressions import Regress
from surgeon.plan.summing import MakeRows

RIDGE = 1e-6  # of the mean of the diagonal: harmless in float64 (condition numbers are near 1e4), enough for no tokens


def regressed(
    expr: Regress,
    maps: Sequence[tuple[MakeRows, MakeRows | None]],
    grams: Sequence[MakeRows | None],
    shape: tuple[int, ...],
) -> MakeRows:
    """Return the function that makes rows of the solved map, of this stored shape, or of its bias.

    `maps` make rows of each model's weight and bias, `grams` of its Gram matrix. Where experts are stacked, a row is an
    expert, which is solved alone.
    """
    if len(shape) < 3:
        return _of_map(expr, maps, grams, shape)

    def solved(expert: int) -> Tensor:
        own = [(_of_expert(weight, expert), bias and _of_expert(bias, expert)) for weight, bias in maps]
        seen = [rows and _of_expert(rows, expert) for rows in grams]
        whole = shape[2] if expr.is_bias and expr.is_transposed else shape[1]
        return _of_map(expr, own, seen, shape[1:])(0, whole)

    return lambda start, stop: torch.stack([solved(expert) for expert in range(start, stop)])


def _of_expert(rows: MakeRows, expert: int) -> MakeRows:
    whole = rows(expert, expert + 1)[0]
    return lambda start, stop: whole[start:stop]


def _of_map(
    expr: Regress,
    maps: Sequence[tuple[MakeRows, MakeRows | None]],
    grams: Sequence[MakeRows | None],
    shape: tuple[int, ...],
) -> MakeRows:
    """Return `regressed` of one map: outputs are independent, so only of a transposed one all are solved at once."""
    has_bias = maps[0][1] is not None
    size = shape[0] if expr.is_transposed else shape[1]
    solving = Solving([None if rows is None else rows(0, size + has_bias).to(torch.float64) for rows in grams], expr)

    def solved(first: int, last: int) -> Tensor:
        return solving([_columns(weight, bias, (first, last), shape, expr) for weight, bias in maps])

    if expr.is_bias:
        return lambda start, stop: solved(start, stop)[:, -1].clone()
    if not expr.is_transposed:
        return lambda start, stop: solved(start, stop)[:, :size].contiguous()
    whole = solved(0, shape[1])[:, :size].T.contiguous()
    return lambda start, stop: whole[start:stop]


def _columns(
    weight: MakeRows, bias: MakeRows | None, outputs: tuple[int, int], shape: tuple[int, ...], expr: Regress
) -> Tensor:
    """Return some outputs of a model's map in float64, outputs x inputs, with its bias as the last column."""
    first, last = outputs
    stored = weight(0, shape[0])[:, first:last].T if expr.is_transposed else weight(first, last)
    whole = stored.to(torch.float64)
    return whole if bias is None else torch.cat([whole, bias(first, last).to(torch.float64)[:, None]], dim=1)


class Solving:
    """Solves maps, outputs x inputs, by the models' Gram matrices, which are factored once."""

    def __init__(self, grams: Sequence[Tensor | None], expr: Regress) -> None:
        total = math.fsum(expr.weights)
        self._shares = [weight / total for weight in expr.weights]
        self._grams: list[Tensor] = []
        self._factor: Tensor | None = None  # without one, the mean is the solution
        known = [gram for gram in grams if gram is not None]
        if not known:
            return
        usual = torch.stack(known).mean(0) if len(known) < len(grams) else known[0]
        whole = torch.zeros_like(usual)
        for share, gram in zip(self._shares, grams, strict=True):
            shrunk = usual if gram is None else gram
            shrunk = expr.alpha * shrunk + (1 - expr.alpha) * torch.diag(shrunk.diagonal())
            self._grams.append(shrunk)
            whole += share * shrunk
        if ridge := RIDGE * float(whole.diagonal().mean()):
            self._factor = torch.linalg.cholesky(whole + ridge * torch.eye(len(whole), dtype=torch.float64))

    def __call__(self, maps: Sequence[Tensor]) -> Tensor:
        """Return the solved map of those of the models."""
        mean = maps[0].clone()
        for share, each in zip(self._shares[1:], maps[1:], strict=True):
            mean += share * (each - maps[0])
        if self._factor is None:
            return mean
        pulled = torch.zeros_like(mean)
        for share, each, gram in zip(self._shares, maps, self._grams, strict=True):
            pulled += share * ((each - mean) @ gram)
        return mean + torch.cholesky_solve(pulled.T, self._factor).T
