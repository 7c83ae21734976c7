"""The rows of a run: trained rows, held-out rows, and a sample of the trained rows that is evaluated as a probe."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.utils.data import Dataset

from surgeon.errors import DataError
from surgeon.models.varlen import lengths_of
from surgeon.progress import TOKENS, stage
from surgeon.train.packing import Numbers, one_per_row, pack, repeat, split
from surgeon.train.run_dir import HELD_OUT, TRAINED
from surgeon.train.settings import Settings
from surgeon.train.store import IGNORED, TokenStore, open_store
from surgeon.train.task import Task
from surgeon.train.tokenise import prepare

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from surgeon.train.packing import Packing


@dataclass(frozen=True, eq=False)
class TrainingRow:
    """One row of tokens, each array int64 of shape (T,). `index` is the place of each token in the store."""

    ids: Numbers
    positions: Numbers
    labels: Numbers
    index: Numbers

    def __len__(self) -> int:
        return len(self.ids)


class RowDataset(Dataset[TrainingRow]):
    """The rows of a packing of a store's pieces. It can be pickled, for worker processes."""

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

    def __getitem__(self, index: int) -> TrainingRow:
        pieces = [self.store.piece(int(number)) for number in self.packing.row(index)]
        return TrainingRow(
            np.concatenate([ids for ids, _, _ in pieces]).astype(np.int64),
            np.concatenate([np.arange(len(ids)) for ids, _, _ in pieces]),
            np.concatenate([labels for _, labels, _ in pieces]),
            np.concatenate([np.arange(start, start + len(ids)) for ids, _, start in pieces]),
        )


@dataclass(frozen=True)
class Collator:
    """Makes a batch of rows, each padded at its right to the longest one, int64 of shape (B, S).

    `trained`, shape (N,), are the places of trained tokens, counted along the rows: to search for them on a GPU
    would be to wait for it. With `flatten` the rows become one, (1, their sum), for attention that takes the
    lengths of documents: then `cu_seq_lens_q` and `_k`, int32, are the begins of the documents and the end of the
    last one, and `max_length_q` and `_k` the length of the longest. S is a multiple of `pad_to_multiple_of`. With
    `with_index`, `token_index` is the place of each token in the store, -1 for padding.
    """

    pad_id: int
    pad_to_multiple_of: int | None = None
    flatten: bool = False
    with_index: bool = False

    def __call__(self, rows: Sequence[TrainingRow]) -> dict[str, Any]:
        groups = [list(rows)] if self.flatten else [[row] for row in rows]
        width = max(sum(map(len, group)) for group in groups)
        width += -width % (self.pad_to_multiple_of or 1)
        names = {"input_ids": "ids", "position_ids": "positions", "labels": "labels"}
        names |= {"token_index": "index"} if self.with_index else {}
        padding = {"ids": self.pad_id, "labels": IGNORED, "index": -1}
        batch: dict[str, Any] = {}
        for key, name in names.items():
            out = np.empty((len(groups), width), np.int64)
            for line, group in zip(out, groups, strict=True):
                used = sum(map(len, group))
                line[:used] = np.concatenate([getattr(row, name) for row in group])
                line[used:] = np.arange(width - used) if name == "positions" else padding[name]
            batch[key] = torch.from_numpy(out)
        batch["trained"] = torch.from_numpy(np.flatnonzero(batch["labels"].numpy() != IGNORED))
        return batch | self._lengths(batch["position_ids"]) if self.flatten else batch

    def _lengths(self, positions: Tensor) -> dict[str, Any]:
        """Return the begins of the documents in one row, positions of shape (1, S), as FlashAttention takes them."""
        starts = (positions[0] == 0).nonzero()[:, 0]
        return lengths_of(torch.cat([starts, torch.tensor([positions.shape[1]])]).int())


@dataclass(frozen=True, eq=False)
class RunData:
    """The trained rows, and the evaluated ones by name: "validation" where there are any, and "probe".

    `stores` are the tokens of --data, and of --eval-data where it is given. `packed` says whether a row may hold
    several documents; `notes` are sentences for the user.
    """

    rows: RowDataset
    held_out: Mapping[str, RowDataset]
    collate: Collator
    stores: tuple[TokenStore, ...]
    packed: bool
    notes: tuple[str, ...]

    def describe(self, batch: Mapping[str, Any]) -> str:
        """Return the documents in a batch of trained rows, as text for people."""
        store = self.stores[0]
        index = batch["token_index"]
        pieces = np.searchsorted(store.offsets, np.unique(index[index >= 0].cpu().numpy()), side="right") - 1
        numbers_of: dict[str, list[str]] = {}
        for piece in np.unique(pieces).tolist():
            source = int(store.piece_sources[piece])
            first = sum(before.num_documents for before in store.sources[:source])
            numbers = numbers_of.setdefault(store.sources[source].data, [])
            number = str(int(store.documents[piece]) - first + 1)
            if number not in numbers:
                numbers.append(number)
        return "; ".join(f"document {_some(numbers)} of {data}" for data, numbers in numbers_of.items())

    def provenance(self) -> list[dict[str, Any]]:
        """Return the data for the receipt: each argument, the SHA-256 of its texts, and its tokens."""
        return [
            {
                "data": source.data,
                "sha256": source.sha256,
                "documents": source.num_documents,
                "tokens": source.num_tokens,
            }
            for store in self.stores
            for source in store.sources
        ]


def read_data(
    specs: Sequence[str],
    task: Task,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    directory: Path,
    sequence_length: int,
    packed: bool,
    flatten: bool,
    pad_to_multiple_of: int | None,
    max_rows: int | None,
    is_first: bool,
    wait: Callable[[], None],
) -> RunData:
    """Return the rows of a run, tokenised in `directory` by its first process while the others `wait`.

    With `max_rows` a run of fixed length reads only the data that it needs. Raises DataError, OutputError.
    """
    settings = task.settings
    limit = None if max_rows is None else max_rows * sequence_length
    requests = {TRAINED: (tuple(specs), limit)}
    if settings.eval_data:
        requests[HELD_OUT] = (settings.eval_data, None)
    stores = []
    for name, (data, max_tokens) in requests.items():
        if not is_first:
            wait()
            stores.append(open_store(directory / name))
            continue
        with stage("tokenising", max_tokens, TOKENS) as count:
            store = prepare(
                data,
                tokenizer,
                directory=directory / name,
                sequence_length=sequence_length,
                task=task,
                max_tokens=max_tokens,
                progress=count,
            )
        stores.append(store)
        wait()
    rows = assemble(tuple(stores), settings, tokenizer, sequence_length=sequence_length, packed=packed, flatten=flatten)
    return replace(rows, collate=replace(rows.collate, pad_to_multiple_of=pad_to_multiple_of))


def assemble(
    stores: tuple[TokenStore, ...],
    settings: Settings,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    sequence_length: int,
    packed: bool,
    flatten: bool,
) -> RunData:
    """Return the rows of stores under these settings. Reads no token."""
    store, notes = stores[0], list(dict.fromkeys(note for each in stores for of in each.sources for note in of.notes))
    fraction = settings.eval_fraction if len(stores) == 1 else 0.0
    trained_pieces, held = split(store.documents, fraction, seed=settings.seed)
    rows = partial(_rows, settings=settings, sequence_length=sequence_length, packed=packed)
    trained = rows(store, _seen(store, trained_pieces, settings))
    held_out = {}
    if len(stores) == 2:
        held_out["validation"] = rows(stores[1], np.arange(stores[1].num_pieces))
    elif len(held):
        held_out["validation"] = rows(store, held)
    else:
        notes.append("nothing is held out, so overfitting will not show; give --eval-data")
    held_out["probe"] = trained
    samples = {name: _sampled(each, settings) for name, each in held_out.items()}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    if store.num_cut or store.num_dropped:
        notes.append(
            f"{store.num_cut} records were cut at {sequence_length} tokens, {store.num_dropped} had nothing to train"
        )
    return RunData(trained, samples, Collator(int(pad), flatten=flatten, with_index=True), stores, packed, tuple(notes))


def drawn(pieces: Numbers, count: int, seed: int | Sequence[int]) -> Numbers:
    """Return `count` of the pieces, ascending, drawn by a seed."""
    return np.sort(np.random.default_rng(seed).permutation(pieces)[:count])


def only(data: RunData, pieces: ArrayLike, settings: Settings, *, sequence_length: int) -> RunData:
    """Return the data of a run that trains no other than these pieces; what is held out stays the same."""
    store = data.stores[0]
    seen = _seen(store, np.asarray(pieces, np.int64), settings)
    rows = _rows(store, seen, settings=settings, sequence_length=sequence_length, packed=data.packed)
    return replace(data, rows=rows, held_out={**data.held_out, "probe": _sampled(rows, settings)})


def _seen(store: TokenStore, pieces: Numbers, settings: Settings) -> Numbers:
    """Return the pieces, each as often as an epoch has it. Raises DataError where none is left."""
    passes = settings.weights(len(store.sources))
    seen = repeat(store.piece_sources[pieces], passes, seed=settings.seed)
    if not len(seen):
        raise DataError("no piece of the data is left to train", hint="Raise --data-weights, or give more data.")
    return pieces[seen]


def _rows(store: TokenStore, pieces: Numbers, *, settings: Settings, sequence_length: int, packed: bool) -> RowDataset:
    """Return pieces in rows, several in one where they are `packed`."""
    lengths = store.lengths[pieces]
    made = pack(lengths, sequence_length, seed=settings.seed) if packed else one_per_row(lengths)
    return RowDataset(store, made.of(pieces))


def _sampled(rows: RowDataset, settings: Settings) -> RowDataset:
    """Return at most `eval_rows` rows, drawn by the seed."""
    chosen = np.random.default_rng(settings.seed).permutation(len(rows))[: settings.eval_rows]
    return rows.chosen(np.sort(chosen))


def _some(numbers: Sequence[str]) -> str:
    return ", ".join(numbers[:5]) + (f" and {len(numbers) - 5} more" if len(numbers) > 5 else "")
