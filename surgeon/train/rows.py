"""Rows of packed pieces as a data set, and batches of them as a model takes them.

A batch has `input_ids`, `position_ids`, which begin at 0 with every piece and again with padding, and `labels`, which
are shifted already: what each token is to predict, or -100. There is no attention mask: without one transformers takes
positions that begin again for another document, and lets none see into another.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np  # noqa: TID253
import torch  # noqa: TID253
from numpy.typing import ArrayLike, NDArray  # noqa: TID253
from torch import Tensor  # noqa: TID253
from torch.utils.data import Dataset  # noqa: TID253

if TYPE_CHECKING:
    from surgeon.train.packing import Packing
    from surgeon.train.store import TokenStore

IGNORED = -100  # the label of what is not trained
Numbers = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Row:
    """One row of tokens, each array int64 of shape (T,). `index` says where in the store a token lies."""

    ids: Numbers
    positions: Numbers
    labels: Numbers
    index: Numbers

    def __len__(self) -> int:
        return len(self.ids)


class RowDataset(Dataset[Row]):
    """The rows of a packing of a store's pieces. May be pickled, for workers that fetch rows."""

    def __init__(self, store: "TokenStore", packing: "Packing") -> None:
        self.store = store
        self.packing = packing

    def __len__(self) -> int:
        return len(self.packing)

    @property
    def num_tokens(self) -> int:
        """How many tokens all rows have, without padding."""
        return int(self.store.lengths[self.packing.pieces].sum())

    def chosen(self, rows: ArrayLike) -> "RowDataset":
        """Return the rows with these numbers."""
        return RowDataset(self.store, self.packing.chosen(rows))

    def __getitem__(self, index: int) -> Row:
        pieces = [self.store.piece(int(number)) for number in self.packing.row(index)]
        return Row(
            np.concatenate([ids for ids, _, _ in pieces]).astype(np.int64),
            np.concatenate([np.arange(len(ids)) for ids, _, _ in pieces]),
            np.concatenate([labels for _, labels, _ in pieces]),
            np.concatenate([np.arange(start, start + len(ids)) for ids, _, start in pieces]),
        )


@dataclass(frozen=True)
class Collator:
    """Makes a batch of rows, each padded at its right to the longest one, int64 of shape (B, S).

    With `flatten` the rows become one, (1, their sum), for attention that takes the lengths of documents: then
    `cu_seq_lens_q` and `_k`, int32, say where each begins and the last one ends, and `max_length_q` and `_k` how long
    the longest is. S is a multiple of `pad_to_multiple_of`. With `with_index` `token_index` says where in the store
    each token lies, -1 for padding.
    """

    pad_id: int
    pad_to_multiple_of: int | None = None
    flatten: bool = False
    with_index: bool = False

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        groups = [list(rows)] if self.flatten else [[row] for row in rows]
        width = max(sum(map(len, group)) for group in groups)
        width += -width % (self.pad_to_multiple_of or 1)
        wanted = {"input_ids": "ids", "position_ids": "positions", "labels": "labels"}
        wanted |= {"token_index": "index"} if self.with_index else {}
        padding = {"ids": self.pad_id, "labels": IGNORED, "index": -1}
        batch: dict[str, Any] = {}
        for key, name in wanted.items():
            out = np.empty((len(groups), width), np.int64)
            for line, group in zip(out, groups, strict=True):
                used = sum(map(len, group))
                line[:used] = np.concatenate([getattr(row, name) for row in group])
                line[used:] = np.arange(width - used) if name == "positions" else padding[name]
            batch[key] = torch.from_numpy(out)
        return batch | self._lengths(batch["position_ids"]) if self.flatten else batch

    def _lengths(self, positions: Tensor) -> dict[str, Any]:
        """Return where the documents of a single row, positions of shape (1, S), begin, as FlashAttention takes it."""
        starts = (positions[0] == 0).nonzero()[:, 0]
        ends = torch.cat([starts, torch.tensor([positions.shape[1]])]).int()
        longest = int(ends.diff().max())
        return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
