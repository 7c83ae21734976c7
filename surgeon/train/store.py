"""The token store: the examples of a run's data as tokens, in files that are mapped into memory.

Tokens lie one behind the other, each once. A piece is a stretch of them that a model reads by itself: a whole example,
or where a text is longer than a row a part of it. The last token of a part predicts the first one of the next part, so
every token of a text but its first is predicted exactly once, and in one row at most `sequence_length` are.
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

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 1
HEADER = "store.json"
# Everything is little-endian. Of each token: its id, and whether it is trained. Of each piece: where its tokens begin
# (one more number says where the last one ends), which document it is of, and of which data argument that is.
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


@dataclass(frozen=True)
class SourceCounts:
    """What one data argument gave: `sha256` of the texts that were read of it, and what they came to.

    `files` has the name, size and times of each file, by which one that was changed is known; none of the Hub's.
    Of `num_documents` that were read, `num_cut` were cut at the right, `num_dropped` had nothing to train (any more).
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


@dataclass(frozen=True)
class TokenStore:
    """Tokens on disk, and what they are of. `digest` is over the content of all files: equal for equal stores only.

    It may be pickled: each process maps the files by itself, when it first reads.
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
        """How many tokens are predicted when every piece is seen once."""
        return sum(source.num_trained for source in self.sources)

    @property
    def num_pieces(self) -> int:
        return sum(source.num_pieces for source in self.sources)

    @property
    def num_documents(self) -> int:
        return sum(source.num_documents for source in self.sources)

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
        """Which tokens a model is to predict, shape (num_tokens,)."""
        return self._mapped("trained.bin")

    @cached_property
    def offsets(self) -> "NDArray[np.int64]":
        """Where each piece begins, shape (num_pieces + 1,)."""
        return self._mapped("offsets.bin")

    @cached_property
    def documents(self) -> "NDArray[np.int64]":
        """Of which document each piece is, shape (num_pieces,), ascending: they are counted as they were read."""
        return self._mapped("documents.bin")

    @cached_property
    def piece_sources(self) -> "NDArray[np.uint16]":
        """Of which of `sources` each piece is, shape (num_pieces,)."""
        return self._mapped("sources.bin")

    @property
    def lengths(self) -> "NDArray[np.int64]":
        """How many tokens each piece has, shape (num_pieces,)."""
        offsets = np.asarray(self.offsets)
        return offsets[1:] - offsets[:-1]

    def piece(self, number: int) -> "tuple[NDArray[np.uint32], NDArray[np.int64], int]":
        """Return a piece's ids, its labels (the id that each token is to predict, or -100), and where it begins."""
        start, end = int(self.offsets[number]), int(self.offsets[number + 1])
        ids = self.tokens[start:end]
        labels = np.full(end - start, -100, np.int64)
        goes_on = number + 1 < self.num_pieces and self.documents[number] == self.documents[number + 1]
        last = end + 1 if goes_on else end  # behind the last token that this piece predicts
        targets = self.tokens[start + 1 : last]
        np.copyto(labels[: len(targets)], targets, where=self.trained[start + 1 : last])
        return ids, labels, start

    def _mapped(self, name: str) -> NDArray[Any]:
        return np.memmap(self.directory / name, dtype=ARRAYS[name], mode="r")

    def __getstate__(self) -> dict[str, Any]:
        names = {item.name for item in fields(self)}
        return {name: value for name, value in self.__dict__.items() if name in names}  # without the mapped arrays


def open_store(directory: Path) -> TokenStore:
    """Return the store in a directory. Raises DataError where there is none, or one that is not whole.

    Looks at the sizes of its files only; `damage` reads them.
    """
    hint = "Run the command again without --resume: the data are tokenised anew."
    try:
        header = json.loads((directory / HEADER).read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{directory} has no tokenised data", hint=hint) from error
    names = {item.name for item in fields(StoreRequest)}
    if not isinstance(header, dict) or header.get("format") != FORMAT or set(header["request"]) != names:
        raise DataError(f"{directory / HEADER} is of another version of surgeon", hint=hint)
    for name, file in header["files"].items():
        found = (directory / name).stat().st_size if (directory / name).exists() else 0
        if found != file["bytes"]:
            raise DataError(f"{directory / name} has {found} bytes, not {file['bytes']}", hint=hint)
    return TokenStore(
        directory,
        StoreRequest(**header["request"] | {"specs": tuple(header["request"]["specs"])}),
        header["digest"],
        tuple(SourceCounts(**source | {"files": _tuples(source["files"])}) for source in header["sources"]),
        header["largest_id"],
    )


def matches(store: TokenStore, request: StoreRequest) -> bool:
    """Return whether a store holds what is asked for, of data that have not changed since.

    Changed is a file whose size or times have, as in make; of what lies on the Hub only the name is compared.
    """
    return store.request == request and all(stamps(source.data) == source.files for source in store.sources)


def damage(store: TokenStore) -> str | None:
    """Return the name of a file whose content is not what was written, None where all are whole."""
    header = json.loads((store.directory / HEADER).read_bytes())
    for name, file in header["files"].items():
        with (store.directory / name).open("rb") as opened:
            if hashlib.file_digest(opened, "sha256").hexdigest() != file["sha256"]:
                return str(name)
    return None


def fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return a SHA-256 over all of a tokenizer that decides which ids a document has: 64 hex digits."""
    if tokenizer.is_fast:
        model = json.loads(tokenizer.backend_tokenizer.to_str())
        model.pop("truncation", None)  # what it was last called with
        model.pop("padding", None)
    else:
        model = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    parts = [model, tokenizer.special_tokens_map, begin_of_text(tokenizer), tokenizer.chat_template]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def stamps(spec: str) -> tuple[tuple[str, int, int, int], ...]:
    """Return the name, size, and times of change of each file of a data argument; nothing for a dataset on the Hub."""
    path = Path(os.path.expanduser(spec))  # noqa: PTH111  # Path.expanduser raises for someone who has no home here
    try:
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        found = [(file.name, file.stat()) for file in files if file.is_file()]
    except OSError:
        return ()
    return tuple((name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in found)


def _tuples(rows: Sequence[Sequence[Any]]) -> tuple[Any, ...]:
    return tuple(tuple(row) for row in rows)
