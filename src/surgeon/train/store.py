"""The token store: the examples of a run's data as tokens, in files that are mapped into memory.

Each token is stored once, one after another. A piece is a stretch of tokens that a model reads by itself: an example,
or a part of a text that is longer than a row. The last token of a part predicts the first token of the next part, so
every token of a text but its first is predicted exactly once, and a row has at most `sequence_length` tokens.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from surgeon.data.rows import begin_of_text
from surgeon.errors import DataError
from surgeon.text import place_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 2
HEADER = "store.json"
IGNORED = -100  # the label of tokens that are not trained
# Everything is little-endian. Per token: its id, and whether it is trained. Per piece: the place of its first token
# (and one more number, the end of the last piece), its document, and the data argument of that document.
ARRAYS = {
    "tokens.bin": "<u4",
    "trained.bin": "|b1",
    "offsets.bin": "<i8",
    "documents.bin": "<i8",
    "sources.bin": "<u2",
}


@dataclass(frozen=True)
class StoreRequest:
    """The content of a store: which data, in which tokenizer's tokens, cut how. Equal requests give equal stores."""

    specs: tuple[str, ...]
    tokenizer: str  # its fingerprint
    sequence_length: int
    train_on: str
    max_tokens: int | None = None
    task: str | None = None  # its fingerprint
    columns: str | None = None  # that the user has chosen


@dataclass(frozen=True)
class SourceCounts:
    """The counts of one data argument, and the `sha256` of the texts that were read from it.

    `files` has the name, size and times of each local file, so that changes are noticed. Of the `num_documents` that
    were read, `num_cut` were cut at the right, and `num_dropped` had no token to train. `notes` say what of the records
    was not read.
    """

    data: str
    sha256: str
    files: tuple[tuple[str, int, int, int], ...]
    num_documents: int
    num_pieces: int
    num_tokens: int
    num_trained: int
    num_cut: int
    num_dropped: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class TokenStore:
    """Tokens on disk, and their sources. `digest` is over the content of all files: equal for equal stores only.

    It can be pickled: each process maps the files when it first reads.
    """

    directory: Path
    request: StoreRequest
    digest: str
    sources: tuple[SourceCounts, ...]
    largest_id: int

    @property
    def num_tokens(self) -> int:
        return sum(source.num_tokens for source in self.sources)

    @property
    def num_trained(self) -> int:
        """How many tokens are predicted in one pass over all pieces."""
        return sum(source.num_trained for source in self.sources)

    @property
    def num_pieces(self) -> int:
        return sum(source.num_pieces for source in self.sources)

    @property
    def num_cut(self) -> int:
        return sum(source.num_cut for source in self.sources)

    @property
    def num_dropped(self) -> int:
        return sum(source.num_dropped for source in self.sources)

    @cached_property
    def tokens(self) -> "NDArray[np.uint32]":
        """The ids, shape (num_tokens,)."""
        return self._mapped("tokens.bin")

    @cached_property
    def trained(self) -> "NDArray[np.bool_]":
        """Whether each token is trained, shape (num_tokens,)."""
        return self._mapped("trained.bin")

    @cached_property
    def offsets(self) -> "NDArray[np.int64]":
        """The place of each piece's first token, shape (num_pieces + 1,)."""
        return self._mapped("offsets.bin")

    @cached_property
    def documents(self) -> "NDArray[np.int64]":
        """The number of each piece's document, shape (num_pieces,), ascending in the order of reading."""
        return self._mapped("documents.bin")

    @cached_property
    def piece_sources(self) -> "NDArray[np.uint16]":
        """The index in `sources` of each piece, shape (num_pieces,)."""
        return self._mapped("sources.bin")

    @property
    def lengths(self) -> "NDArray[np.int64]":
        """How many tokens each piece has, shape (num_pieces,)."""
        offsets = np.asarray(self.offsets)
        return offsets[1:] - offsets[:-1]

    def piece(self, number: int) -> "tuple[NDArray[np.uint32], NDArray[np.int64], int]":
        """Return a piece's ids, its labels (the id that each token predicts, or -100), and its first token's place."""
        start, end = int(self.offsets[number]), int(self.offsets[number + 1])
        ids = self.tokens[start:end]
        labels = np.full(end - start, IGNORED, np.int64)
        goes_on = number + 1 < self.num_pieces and self.documents[number] == self.documents[number + 1]
        last = end + 1 if goes_on else end  # after the last token that this piece predicts
        targets = self.tokens[start + 1 : last]
        np.copyto(labels[: len(targets)], targets, where=self.trained[start + 1 : last])
        return ids, labels, start

    def _mapped(self, name: str) -> NDArray[Any]:
        return np.memmap(self.directory / name, dtype=ARRAYS[name], mode="r")

    def __getstate__(self) -> dict[str, Any]:
        names = {item.name for item in fields(self)}
        return {name: value for name, value in self.__dict__.items() if name in names}  # without the mapped arrays


def open_store(directory: Path) -> TokenStore:
    """Return the store in a directory. Raises DataError where there is none, or an incomplete one.

    Checks only the sizes of its files; `damage` reads them.
    """
    hint = "Run the command again without --resume: the data are tokenised anew."
    try:
        header = json.loads((directory / HEADER).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{directory} has no tokenised data", hint=hint) from error
    names = {item.name for item in fields(StoreRequest)}
    if not isinstance(header, dict) or header.get("format") != FORMAT or set(header["request"]) != names:
        raise DataError(f"{directory / HEADER} is of another version of surgeon", hint=hint)
    for name, file in header["files"].items():
        size = (directory / name).stat().st_size if (directory / name).exists() else 0
        if size != file["bytes"]:
            raise DataError(f"{directory / name} has {size} bytes, not {file['bytes']}", hint=hint)
    return TokenStore(
        directory,
        StoreRequest(**header["request"] | {"specs": tuple(header["request"]["specs"])}),
        header["digest"],
        tuple(
            SourceCounts(**source | {"files": _tuples(source["files"]), "notes": tuple(source["notes"])})
            for source in header["sources"]
        ),
        header["largest_id"],
    )


def matches(store: TokenStore, request: StoreRequest) -> bool:
    """Return whether a store matches a request, of data that have not changed since.

    A file counts as changed where its size or times differ, as in make; of a Hub dataset only the name is compared.
    """
    return store.request == request and all(stamps(source.data) == source.files for source in store.sources)


def damage(store: TokenStore) -> str | None:
    """Return the name of a file whose content has changed since it was written, None where there is none."""
    header = json.loads((store.directory / HEADER).read_bytes())
    for name, file in header["files"].items():
        with (store.directory / name).open("rb") as opened:
            if hashlib.file_digest(opened, "sha256").hexdigest() != file["sha256"]:
                return str(name)
    return None


def fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return a SHA-256 over the parts of a tokenizer that decide the ids of a document: 64 hex digits."""
    if tokenizer.is_fast:
        model = json.loads(tokenizer.backend_tokenizer.to_str())
        model.pop("truncation", None)  # an option of its last call
        model.pop("padding", None)
    else:
        model = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    parts = [model, tokenizer.special_tokens_map, begin_of_text(tokenizer), tokenizer.chat_template]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def stamps(spec: str) -> tuple[tuple[str, int, int, int], ...]:
    """Return the name, size, and change times of each file of a data argument; nothing for a dataset on the Hub."""
    path = Path(os.path.expanduser(place_of(spec)))  # noqa: PTH111  # Path.expanduser raises without a home
    try:
        below = path.rglob("*.arrow") if path.is_dir() else ()  # of a saved dataset
        files = sorted({*path.iterdir(), *below}) if path.is_dir() else [path]
        stats = [(file.name, file.stat()) for file in files if file.is_file()]
    except OSError:
        return ()
    return tuple((name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in stats)


def _tuples(rows: Sequence[Sequence[Any]]) -> tuple[Any, ...]:
    return tuple(tuple(row) for row in rows)
