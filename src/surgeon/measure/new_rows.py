"""Rows for tokens that a model does not have, from the rows that it has: of pieces, or by way of a helper's rows.

A helper is a model that has the new tokens. What it says of a new token beside the tokens that both have, the anchors,
is carried over to the model's rows. Sums go in float64, products in float32; rows are made block by block.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from surgeon.checkpoint.source import Source, ranges_by_file
from surgeon.errors import MeasureError
from surgeon.models.device import wide
from surgeon.plan.arithmetic import TORCH_DTYPES

BLOCK = 4096  # rows at once
RIDGE = 1e-3  # of the mean variance of the helper's channels
SHORTLIST = 512  # anchors of which a matching pursuit chooses
PURSUED = 128  # tokens at once in a matching pursuit

Blocks = Callable[[], Iterator[Tensor]]  # the new rows, in order, each call anew


@dataclass(frozen=True, eq=False)
class Matrix:
    """A stored tensor with a position for each token along `dim`, read block by block as rows of float32."""

    source: Source
    name: str
    dim: int = 0

    @property
    def num_rows(self) -> int:
        return self.source.tensors[self.name].spec.shape[self.dim]

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield all rows, shape (rows, columns), with the number of the first one."""
        stored = self.source.tensors[self.name]
        dtype, shape = TORCH_DTYPES[stored.spec.dtype], stored.spec.shape
        part = self.source.parts(ranges_by_file(self.source.tensors, {self.name}))[stored.file]
        is_table = self.dim == 0
        width = math.prod(shape[1:]) if is_table else 1
        step = BLOCK * 4 if is_table else self.num_rows
        with part.opened() as file:
            for first in range(0, self.num_rows if is_table else 1, step):
                count = min(step, self.num_rows - first) * (width if is_table else math.prod(shape) // self.num_rows)
                data = torch.empty(count * dtype.itemsize, dtype=torch.uint8)
                file.read_into(data.numpy().data, stored.start + first * width * dtype.itemsize)
                block = data.view(dtype)
                rows = block.view(-1, width) if is_table else block.view(shape).movedim(self.dim, 0).flatten(1)
                yield first, rows.to(torch.float32)

    def rows(self, ids: Sequence[int]) -> Tensor:
        """Return the rows of tokens, in their order, shape (ids, columns)."""
        wanted = np.asarray(ids, dtype=np.int64)
        order = np.argsort(wanted, kind="stable")
        ordered, found = wanted[order], None
        for first, block in self.blocks():
            start, stop = np.searchsorted(ordered, (first, first + len(block)))
            if found is None:
                found = torch.empty(len(wanted), block.shape[1])
            found[torch.from_numpy(order[start:stop])] = block[torch.from_numpy(ordered[start:stop] - first)]
        assert found is not None, "a model has rows"
        return found

    def mean(self) -> Tensor:
        """Return the mean of all rows, shape (columns,), in float64."""
        return sum((wide(block).sum(0) for _, block in self.blocks()), torch.zeros(())) / self.num_rows


def of_pieces(matrix: Matrix, pieces: Sequence[Sequence[int]]) -> Blocks:
    """Return the rows of tokens as the means of the rows of their pieces; without a piece the mean of all rows."""
    mean = matrix.mean().float()
    used = sorted({piece for token in pieces for piece in token})
    rows, places = matrix.rows(used), {piece: place for place, piece in enumerate(used)}

    def blocks() -> Iterator[Tensor]:
        for at in range(0, len(pieces), BLOCK):
            chosen = pieces[at : at + BLOCK]
            flat = torch.tensor([places[piece] for token in chosen for piece in token], dtype=torch.int64)
            sizes = torch.tensor([len(token) for token in chosen])
            begins = sizes.cumsum(0) - sizes
            made = torch.nn.functional.embedding_bag(flat, rows, begins, mode="mean")
            yield torch.where((sizes == 0)[:, None], mean, made)

    return blocks


@dataclass(frozen=True, eq=False)
class Helper:
    """A helper's rows: of the anchors, shape (A, H), and where those of the `missing` tokens are read."""

    matrix: Matrix
    anchors: Tensor
    missing: Sequence[int]

    @classmethod
    def of(cls, matrix: Matrix, anchors: Sequence[int], missing: Sequence[int]) -> "Helper":
        """Return the helper with the rows of `anchors` read. Raises MeasureError where they are not finite."""
        rows = matrix.rows(anchors)
        if not bool(rows.isfinite().all()):
            raise MeasureError(f"{matrix.source.label} has rows that are not finite", hint="Choose another --helper.")
        return cls(matrix, rows, missing)

    def new(self) -> Iterator[Tensor]:
        """Yield the helper's rows of the missing tokens, in blocks."""
        wanted, done = np.asarray(self.missing, dtype=np.int64), 0
        for first, block in self.matrix.blocks():
            stop = int(np.searchsorted(wanted, first + len(block)))
            if stop > done:
                yield block[torch.from_numpy(wanted[done:stop] - first)]
            done = stop


def by_ridge(rows: Tensor, helper: Helper) -> Blocks:
    """Return rows by the linear map from the helper's rows to the model's that fits the anchors best.

    `rows` are the model's of the anchors, shape (A, D). Both are centred: with G and E the centred rows,
    W = (G'G + r I)^-1 G'E, with r = RIDGE times the mean of the diagonal of G'G, and a row is
    mean(E) + (g - mean(G)) W.
    """
    centre, target = wide(helper.anchors).mean(0), wide(rows).mean(0)
    gram = torch.zeros(len(centre), len(centre), dtype=torch.float64)
    cross = torch.zeros(len(centre), len(target), dtype=torch.float64)
    for at in range(0, len(rows), BLOCK):
        g = wide(helper.anchors[at : at + BLOCK]) - centre
        gram += g.T @ g
        cross += g.T @ (wide(rows[at : at + BLOCK]) - target)
    ridge = RIDGE * gram.diagonal().mean()
    if not bool(ridge > 0):
        raise MeasureError("the helper's rows of the anchors are all the same", hint="Choose another --helper.")
    solved = torch.linalg.solve(gram + ridge * torch.eye(len(centre), dtype=torch.float64), cross)
    shift, map_ = (target - centre @ solved).float(), solved.float()

    def blocks() -> Iterator[Tensor]:
        for g in helper.new():
            yield torch.addmm(shift, g, map_)

    return blocks


def by_cosines(rows: Tensor, helper: Helper) -> Blocks:
    """Return rows as the means of all anchors' rows, weighed by the helper's cosines to the token, signed.

    The weights sum to 1. Source: CLP-Transfer, arXiv:2301.09626. A sum over all anchors is linear in the token's
    direction, so one product of two matrices holds it: of 46 thousand anchors the weights are nearly the same, and the
    rows nearly the mean.
    """
    directions = torch.nn.functional.normalize(helper.anchors, dim=1)
    weighed, total = wide(directions.T) @ wide(rows), wide(directions).sum(0)

    def blocks() -> Iterator[Tensor]:
        for g in helper.new():
            exact = wide(g)
            yield ((exact @ weighed) / (exact @ total)[:, None]).float()

    return blocks


@dataclass(frozen=True, eq=False)
class Pursuit:
    """The anchors that a matching pursuit chose for each missing token, shape (N, K), and their coefficients."""

    chosen: Tensor
    weights: Tensor

    def rows(self, rows: Tensor) -> Blocks:
        """Return the rows of the missing tokens by the model's rows of the anchors, shape (A, D)."""

        def blocks() -> Iterator[Tensor]:
            for at in range(0, len(self.chosen), BLOCK):
                chosen, weights = self.chosen[at : at + BLOCK], self.weights[at : at + BLOCK]
                yield torch.nn.functional.embedding_bag(chosen, rows, per_sample_weights=weights, mode="sum")

        return blocks


def pursue(helper: Helper, k: int, *, device: str, progress: Any = None) -> Pursuit:
    """Return each missing token's row of the helper as a sum of `k` anchors' rows: orthogonal matching pursuit.

    Of the SHORTLIST anchors with the largest products with the row, the one with the largest product with what is left
    is taken, and the coefficients of all that were taken are solved anew. Rows are not normalised.
    Source: arXiv:2506.06607, where all anchors compete at each step.
    """
    atoms = helper.anchors.to(device)
    k = min(k, len(atoms), max(1, atoms.shape[1] // 4))
    found: list[tuple[Tensor, Tensor]] = []
    for block in helper.new():
        for part in torch.split(block.to(device), PURSUED):
            found.append(_pursued(atoms, part, k))
            if progress is not None:
                progress(len(part))
    chosen, weights = (torch.cat([each[i] for each in found]).cpu() for i in (0, 1))
    return Pursuit(chosen, weights)


def _pursued(atoms: Tensor, tokens: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the chosen atoms of each token, shape (B, K), and their coefficients."""
    listed = (tokens @ atoms.T).abs().topk(min(SHORTLIST, len(atoms)), dim=1).indices
    near = atoms[listed]  # (B, S, H)
    left = tokens.clone()
    basis: list[Tensor] = []
    taken: list[Tensor] = []
    free = torch.ones(listed.shape, dtype=torch.bool, device=tokens.device)
    rows = torch.arange(len(tokens), device=tokens.device)
    for _ in range(k):
        products = torch.bmm(near, left[:, :, None]).squeeze(2).abs().masked_fill(~free, -1.0)
        best = products.argmax(1)
        taken.append(best)
        free[rows, best] = False
        direction = near[rows, best]
        for _ in range(2):  # twice: the atoms are far from orthogonal
            for other in basis:
                direction = direction - other * (other * direction).sum(1, keepdim=True)
        direction = torch.nn.functional.normalize(direction, dim=1)
        basis.append(direction)
        left = left - direction * (direction * left).sum(1, keepdim=True)
    places = torch.stack(taken, 1)
    chosen = wide(near[rows[:, None], places])  # (B, K, H)
    gram = chosen @ chosen.transpose(1, 2)
    gram += 1e-9 * gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(k, device=gram.device)
    weights = torch.linalg.solve(gram, (chosen @ wide(tokens)[:, :, None]))[:, :, 0]
    return listed.gather(1, places), weights.float()
