"""Tokenising data into a token store: streamed, checked on the way, and written whole or not at all."""

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from surgeon.data.documents import Reading
from surgeon.data.records import Document
from surgeon.data.rows import by_template, check_shape, hashed
from surgeon.errors import DataError, OutputError
from surgeon.train.examples import Example
from surgeon.train.settings import Settings
from surgeon.train.store import (
    ARRAYS,
    FORMAT,
    HEADER,
    SourceCounts,
    StoreRequest,
    TokenStore,
    damage,
    fingerprint,
    matches,
    open_store,
    stamps,
)
from surgeon.train.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_DOCUMENTS, BATCH_CHARACTERS = 1024, 1 << 20  # tokenised together; a longer document is a batch by itself
TokenProgress = Callable[[int], object]  # called with the number of new tokens


def prepare(
    specs: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    directory: Path,
    sequence_length: int,
    task: Task | None = None,
    max_tokens: int | None = None,
    progress: TokenProgress | None = None,
) -> TokenStore:
    """Return the store of some data in `directory`: the existing one if it matches and is whole, else a new one.

    `task` makes the examples of documents, by default of texts, prompts with answers, and chats. Every document is read
    and so checked. With `max_tokens`, which the data share in equal parts, documents are read until a part is reached;
    tokens that one argument leaves go to the next ones. A text longer than a row is cut into pieces. A prompt with its
    answer, or a chat, is cut to a row, and dropped when no trained token is left. Memory is that of a batch of
    documents, and of one .txt, however large the data.
    Raises DataError for data that cannot be read or have no token to train, OutputError when the disk is full or
    refuses; then no store is left. One process may do this at a time.
    """
    assert not isinstance(specs, str)
    check_shape(1, sequence_length)
    task = task or Task(Settings())
    settings = task.settings
    readings = [Reading(settings.columns) for _ in specs]
    streams = [reading.documents(spec) for reading, spec in zip(readings, specs, strict=True)]  # a wrong name is an
    # error before any file is written
    request = StoreRequest(
        specs=tuple(specs),
        tokenizer=fingerprint(tokenizer),
        sequence_length=sequence_length,
        train_on=settings.train_on,
        max_tokens=max_tokens,
        task=task.fingerprint,
        columns=settings.columns,
    )
    if (store := _reusable(directory, request)) is not None:
        return store
    with _writing(directory) as writer:
        sources: list[SourceCounts] = []
        for number, (spec, stream) in enumerate(zip(specs, streams, strict=True)):
            files = stamps(spec)  # before it is read, so that a file that changes meanwhile does not match later
            done = sum(source.num_tokens for source in sources)
            limit = None if max_tokens is None else -(-(max_tokens - done) // (len(specs) - number))
            first = sum(source.num_documents for source in sources)
            reader = _Reader(tokenizer, writer, number, sequence_length, first, task)
            reader.read(stream, limit, progress)
            notes = readings[number].notes(by_template(tokenizer))
            sources.append(reader.counts(spec, files, notes))
        if not sum(source.num_trained for source in sources):
            raise DataError(
                f"there is no token to train in {', '.join(specs) or 'no data'}, in rows of {sequence_length} tokens",
                hint="Give more --data; where prompts alone fill a row, raise --sequence-length.",
            )
        writer.finish(request, sources)
    return open_store(directory)


def _reusable(directory: Path, request: StoreRequest) -> TokenStore | None:
    """Return the store in a directory if it matches the request and is whole."""
    if not (directory / HEADER).exists():
        return None
    try:
        store = open_store(directory)
    except DataError:
        return None
    return store if matches(store, request) and damage(store) is None else None


class _Writer:
    """The files of a store that is being written, and their hashes."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.directory = directory
        self.files: dict[str, IO[bytes]] = {}
        self.hashes = {name: hashlib.sha256() for name in ARRAYS}
        self.num_tokens = self.largest_id = 0
        for name in ARRAYS:
            self.files[name] = stack.enter_context((directory / name).open("wb"))
        self._append("offsets.bin", [0])

    def add(self, example: Example, lengths: Sequence[int], *, document: int, source: int) -> None:
        """Write an example in pieces of these lengths."""
        ends = self.num_tokens + np.cumsum(lengths)
        self._append("tokens.bin", example.ids)
        self._append("trained.bin", example.trained)
        self._append("offsets.bin", ends)
        self._append("documents.bin", [document] * len(lengths))
        self._append("sources.bin", [source] * len(lengths))
        self.num_tokens = int(ends[-1])
        self.largest_id = max(self.largest_id, max(example.ids))

    def finish(self, request: StoreRequest, sources: Sequence[SourceCounts]) -> None:
        """Write the header, after all other files are on the disk."""
        files = {}
        for name, file in self.files.items():
            file.flush()
            os.fsync(file.fileno())
            files[name] = {"bytes": file.tell(), "sha256": self.hashes[name].hexdigest()}
        digest = hashlib.sha256("".join(f"{name} {file['sha256']}\n" for name, file in files.items()).encode())
        header = {
            "format": FORMAT,
            "digest": digest.hexdigest(),
            "files": files,
            "request": asdict(request),
            "sources": [asdict(source) for source in sources],
            "largest_id": self.largest_id,
        }
        part = self.directory / f"{HEADER}.part"
        with part.open("wb") as file:
            file.write(json.dumps(header, indent=1).encode())
            file.flush()
            os.fsync(file.fileno())
        part.replace(self.directory / HEADER)

    def _append(self, name: str, values: Any) -> None:
        raw = np.asarray(values, dtype=ARRAYS[name]).tobytes()
        self.hashes[name].update(raw)
        self.files[name].write(raw)


@contextmanager
def _writing(directory: Path) -> Iterator[_Writer]:
    """Yield a writer of a store. Without a header at the end its files are removed. Raises OutputError."""
    names = [*ARRAYS, f"{HEADER}.part"]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / HEADER).unlink(missing_ok=True)  # first, so that an incomplete store has no header
        with ExitStack() as stack:
            yield _Writer(directory, stack)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = "Free some space, or choose another disk with --run-dir."
            raise OutputError(f"the disk of {directory} is full", hint=hint) from error
        where = error.filename or directory
        hint = "Choose another place with --run-dir."
        raise OutputError(f"cannot write {where}: {error.strerror or error}", hint=hint) from error
    finally:
        if not os.path.exists(directory / HEADER):  # noqa: PTH110  # Path.exists raises for a name that is too long
            for name in names:
                with suppress(OSError):
                    (directory / name).unlink(missing_ok=True)


@dataclass
class _Reader:
    """Reads one data argument into a store, and counts its documents, pieces and tokens."""

    tokenizer: "PreTrainedTokenizerBase"
    writer: _Writer
    source: int
    sequence_length: int
    first: int  # how many documents were read before
    task: Task
    sha256: Any = field(default_factory=hashlib.sha256)
    num_documents: int = 0
    num_pieces: int = 0
    num_tokens: int = 0
    num_trained: int = 0
    num_cut: int = 0
    num_dropped: int = 0

    def read(self, stream: Iterator[Document], limit: int | None, progress: TokenProgress | None) -> None:
        """Read all documents, or with `limit` until there are so many tokens."""
        if limit is not None and limit <= 0:
            return
        for batch in _batches(stream):
            before = self.num_tokens
            first = self.first + self.num_documents
            examples = self.task.examples(batch, self.tokenizer, first=first, length=self.sequence_length)
            for document, example in zip(batch, examples, strict=True):
                self.sha256.update(hashed(document, self.num_documents))
                self._add(example)
                if limit is not None and self.num_tokens >= limit:
                    break
            if progress:
                progress(self.num_tokens - before)
            if limit is not None and self.num_tokens >= limit:
                return

    def counts(self, spec: str, files: tuple[tuple[str, int, int, int], ...], notes: tuple[str, ...]) -> SourceCounts:
        counted = {name: value for name, value in vars(self).items() if name.startswith("num_")}
        return SourceCounts(spec, self.sha256.hexdigest(), files, **counted, notes=notes)

    def _add(self, example: Example) -> None:
        """Write an example, cut to a row, if it has tokens to train."""
        number = self.first + self.num_documents
        self.num_documents += 1
        size = self.sequence_length
        is_cut = not example.is_text and len(example.ids) > size
        if is_cut:  # a task that cuts its examples did so before
            example = Example(example.ids[:size], example.trained[:size], is_text=False)
        num_trained = sum(example.trained)
        if not num_trained:
            self.num_dropped += 1
            return
        lengths = piece_lengths(len(example.ids), size)
        self.writer.add(example, lengths, document=number, source=self.source)
        self.num_pieces += len(lengths)
        self.num_tokens += len(example.ids)
        self.num_trained += num_trained
        self.num_cut += is_cut or example.is_cut


def piece_lengths(num_tokens: int, sequence_length: int) -> list[int]:
    """Return the lengths of the pieces into which so many tokens are cut: full ones, and a rest.

    A rest of one token predicts nothing, so it takes another token from the piece before it.
    """
    full, rest = divmod(num_tokens, sequence_length)
    lengths = [sequence_length] * full + [rest] * bool(rest)
    if rest == 1 and full:
        lengths[-2:] = [sequence_length - 1, 2]
    return lengths


def _batches(stream: Iterator[Document]) -> Iterator[list[Document]]:
    """Yield batches of documents, limited in number and in characters."""
    batch: list[Document] = []
    size = 0
    for document in stream:
        batch.append(document)
        size += sum(map(len, document.parts)) + sum(len(str(message["content"])) for message in document.messages)
        if len(batch) == BATCH_DOCUMENTS or size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
