"""The rows whose gradients are taken, in batches of about the same length; or packed, as they are trained."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from surgeon.attribution.gradients import RowGradients, Spans
from surgeon.train.data import Collator, RowDataset
from surgeon.train.packing import one_per_row, pack
from surgeon.train.store import IGNORED, TokenStore

BATCH_TOKENS = 2048  # of a batch, with padding, where its number of rows is not given

Numbers = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Batches:
    """Pieces of a store in batches, each piece a row whose gradient is taken.

    By default a sequence is one piece and a batch has as many as fit BATCH_TOKENS, or `batch_size`. With `packed`,
    pieces share sequences of that many tokens, as a run packs them.
    """

    store: TokenStore
    pieces: Numbers
    collate: Collator
    batch_size: int | None = None
    packed: int | None = None
    seed: int = 0

    def __iter__(self) -> "Iterator[tuple[Numbers, dict[str, Any], Tensor, Spans | None]]":
        return (self.batch(rows) for rows in self._sequences())

    def batch(self, rows: RowDataset) -> "tuple[Numbers, dict[str, Any], Tensor, Spans | None]":
        """Return the pieces of a batch, the batch, how many tokens of each piece are trained, and their spans."""
        pieces = rows.packing.pieces
        made = self.collate([rows[index] for index in range(len(rows))])
        counts = [int((self.store.piece(int(piece))[1] != IGNORED).sum()) for piece in pieces]
        spans = None
        if self.packed is not None:
            lengths = [self.store.lengths[rows.packing.row(index)].tolist() for index in range(len(rows))]
            spans = Spans.of(lengths, made["input_ids"].shape[1])
        return pieces, made, torch.tensor(counts), spans

    def _sequences(self) -> Iterator[RowDataset]:
        lengths = self.store.lengths[self.pieces]
        if self.packed is not None:
            packing = pack(lengths, self.packed, seed=self.seed)
            size = self.batch_size or max(1, BATCH_TOKENS // self.packed)
            for start in range(0, len(packing), size):
                chosen = packing.chosen(np.arange(start, min(start + size, len(packing))))
                yield RowDataset(self.store, chosen.of(self.pieces))
            return
        order = self.pieces[np.argsort(-lengths, kind="stable")]  # the longest first: what does not fit fails at once
        start = 0
        while start < len(order):
            size = self.batch_size or max(1, BATCH_TOKENS // int(self.store.lengths[order[start]]))
            taken = order[start : start + size]
            yield RowDataset(self.store, one_per_row(self.store.lengths[taken]).of(taken))
            start += size

    def order(self) -> Numbers:
        """Return all pieces in the order of the batches."""
        return np.concatenate([rows.packing.pieces for rows in self._sequences()])


def gradients_of(
    rows: Batches, gradients: RowGradients, groups: Sequence[Numbers], *, taught: bool = False
) -> NDArray[np.float32]:
    """Return the gradient of the mean loss of each group of pieces, shape (groups, width).

    A group is a query: a record, in one piece or several; its loss is the mean over the trained tokens of all.
    """
    where = {int(piece): number for number, group in enumerate(groups) for piece in group}
    sums = np.zeros((len(groups), gradients.width), np.float64)
    totals = np.zeros(len(groups))
    for pieces, batch, counts, spans in replace(rows, pieces=np.array(sorted(where))):
        made = gradients(batch, counts, spans, taught=taught).numpy()
        for piece, count, gradient in zip(pieces.tolist(), counts.tolist(), made, strict=True):
            sums[where[piece]] += count * gradient
            totals[where[piece]] += count
    return (sums / np.maximum(totals, 1)[:, None]).astype(np.float32)
