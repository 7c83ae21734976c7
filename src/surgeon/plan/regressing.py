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

    `maps` make rows of each model's weight and bias, `grams` of its Gram matrix.
    """
    size = shape[0] if expr.is_transposed else shape[1]
    weights = [_columns(weight, bias, shape, expr) for weight, bias in maps]
    size += maps[0][1] is not None
    solved = solve(weights, [None if rows is None else rows(0, size).to(torch.float64) for rows in grams], expr)
    if expr.is_bias:
        whole = solved[:, -1].clone()
    else:
        whole = solved[:, :-1] if maps[0][1] is not None else solved
        whole = (whole.T if expr.is_transposed else whole).contiguous()
    return lambda start, stop: whole[start:stop]


def _columns(weight: MakeRows, bias: MakeRows | None, shape: tuple[int, ...], expr: Regress) -> Tensor:
    """Return a model's map in float64, outputs x inputs, with its bias as the last column."""
    whole = weight(0, shape[0]).to(torch.float64)
    whole = whole.T if expr.is_transposed else whole
    return whole if bias is None else torch.cat([whole, bias(0, len(whole)).to(torch.float64)[:, None]], dim=1)


def solve(maps: Sequence[Tensor], grams: Sequence[Tensor | None], expr: Regress) -> Tensor:
    """Return the solved map, outputs x inputs, of the maps and Gram matrices of the models."""
    total = math.fsum(expr.weights)
    shares = [weight / total for weight in expr.weights]
    mean = maps[0].clone()
    for share, each in zip(shares[1:], maps[1:], strict=True):
        mean += share * (each - maps[0])
    known = [gram for gram in grams if gram is not None]
    if not known:
        return mean
    usual = torch.stack(known).mean(0) if len(known) < len(grams) else known[0]
    whole = torch.zeros_like(usual)
    pulled = torch.zeros_like(mean)
    for share, each, gram in zip(shares, maps, grams, strict=True):
        shrunk = usual if gram is None else gram
        shrunk = expr.alpha * shrunk + (1 - expr.alpha) * torch.diag(shrunk.diagonal())
        whole += share * shrunk
        pulled += share * ((each - mean) @ shrunk)
    ridge = RIDGE * float(whole.diagonal().mean())
    if not ridge:
        return mean
    factor = torch.linalg.cholesky(whole + ridge * torch.eye(len(whole), dtype=torch.float64))
    return mean + torch.cholesky_solve(pulled.T, factor).T
