"""Downloads byte ranges of a file on the Hub: in parallel, resumed at the byte reached, and never a byte unchecked.

One HEAD tells where the file is; its ranges are then asked for there, which spends none of the Hub's rate limit where
that is a CDN. The token goes to the Hub alone. An answer counts only if it is exactly the range that was asked for, of
a file of the right size, uncompressed. huggingface_hub has no ranges; its HfFileSystem reads up to 80 times as much,
and takes the beginning of a file for the range where a server ignores ranges.
"""

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NoReturn
from urllib.parse import urlsplit

from surgeon.checkpoint.hub_http import (
    BACKOFF,
    SLOWEST,
    TRIES,
    WrongAnswer,
    explained,
    failures,
    http_library,
    not_too_slowly,
    passes,
    passes_at_first,
    patiently,
    seconds_asked,
)
from surgeon.checkpoint.range_store import Block, RangeFile, Span, digest_of, merged, total
from surgeon.errors import HubError, SurgeonError

NUM_CONNECTIONS = 8
LARGEST_PART = 16 << 20
SMALLEST_PART = 32 << 10
PARTS = 128  # of a download, where its size allows: an answer that is thrown away is less than a hundredth of it
JOINED_GAP = 256 << 10  # a gap that costs less time to read than a request takes
JOINED_SHARE = 0.02  # of the bytes that are wanted: gaps add no more
WRONG_ANSWERS = 6  # in a row, until the server is held to be one without ranges; twice as many where it has given some
IGNORED = 3  # as many wrong answers is a whole file in place of a range
NEW_ADDRESSES = 4  # in a row that are not accepted either
LAST_WORDS = 1.0  # seconds for workers to end where one has failed
ADDED_EVERY = 0.5  # seconds between two additions to the map: a killed process loses no more


class RangesRefused(Exception):  # noqa: N818  # the caller fetches the whole file then
    """The server does not answer ranges as it should."""


class _Expired(Exception):  # noqa: N818
    """A signed address that is no longer accepted."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where the bytes of a file are: on the Hub, or at another host, which gets no token."""

    url: str
    etag: str
    is_foreign: bool


@dataclass
class _Piece:
    """A range that one request asks for; `at` is the byte reached."""

    start: int
    end: int
    at: int
    digest: Any = field(default_factory=digest_of)
    error: Exception | None = None

    def block(self) -> Block | None:
        """Return the bytes that arrived."""
        return Block(self.start, self.at, self.digest.hexdigest()) if self.at > self.start else None


# Which ranges are asked for


def joined(spans: Sequence[Span]) -> list[Span]:
    """Return the spans with small gaps filled, the smallest first, as long as they add few bytes."""
    spans = merged(spans)
    allowed = int(total(spans) * JOINED_SHARE)
    gaps = [(before[1], after[0]) for before, after in pairwise(spans)]
    filled = []
    for start, end in sorted(gaps, key=lambda gap: gap[1] - gap[0]):
        if end - start >= JOINED_GAP or end - start > allowed:
            break
        allowed -= end - start
        filled.append((start, end))
    return merged([*spans, *filled])


def _pieces(spans: Sequence[Span]) -> list[_Piece]:
    size = min(LARGEST_PART, max(SMALLEST_PART, total(spans) // PARTS))
    cuts = [(at, min(at + size, end)) for start, end in spans for at in range(start, end, size)]
    return [_Piece(start, end, start) for start, end in cuts]


# One download


class RangeDownload:
    """The download of ranges of one file of `size` bytes at a commit."""

    def __init__(self, repo_id: str, file: str, *, commit: str, size: int, count: Callable[[int], None]) -> None:
        self._repo_id, self._file, self._commit, self._size = repo_id, file, commit, size
        self._count = count  # is told of every byte that arrives
        self._address: Address | None = None
        self._addressing = threading.Lock()
        self._stop = threading.Event()
        self._has_ranges = False  # the server has answered one as it should
        self._not_before = 0.0  # the Hub asked for no requests until then

    def find(self) -> Address:
        """Return where the file is. Raises HubError."""
        with explained(f"{self._file} of {self._repo_id}", repo_id=self._repo_id, revision=self._commit):
            return self._addressed(None)

    def run(self, spans: Sequence[Span], store: RangeFile) -> None:
        """Download spans into the store. What arrived before a failure is kept.

        Raises HubError, and RangesRefused where the server does not answer ranges.
        """
        todo: queue.SimpleQueue[_Piece] = queue.SimpleQueue()
        done: queue.SimpleQueue[_Piece] = queue.SimpleQueue()
        pieces = _pieces(spans)
        for piece in pieces:
            todo.put(piece)
        # Daemons: Ctrl-C need not wait for them.
        workers = [
            threading.Thread(target=self._work, args=(todo, done, store), daemon=True)
            for _ in range(min(NUM_CONNECTIONS, len(pieces)))
        ]
        for worker in workers:
            worker.start()
        arrived: list[Block] = []
        added = time.monotonic()
        try:
            for _ in pieces:
                piece = done.get()
                if block := piece.block():
                    arrived.append(block)
                if piece.at < piece.end:
                    self._raise(piece.error)
                if time.monotonic() - added > ADDED_EVERY:
                    ready, arrived = arrived, []
                    store.add(ready)
                    added = time.monotonic()
        finally:
            self._stop.set()
            deadline = time.monotonic() + LAST_WORDS
            for worker in workers:  # one that waits for bytes writes none of them later
                worker.join(max(0.0, deadline - time.monotonic()))
            while not done.empty():
                if block := done.get().block():
                    arrived.append(block)
            store.add(arrived)

    def _raise(self, error: Exception | None) -> NoReturn:
        if isinstance(error, (SurgeonError, RangesRefused)):
            raise error
        assert error is not None, "a worker ended without an error"
        with explained(f"{self._file} of {self._repo_id}", repo_id=self._repo_id, revision=self._commit):
            raise error
        raise AssertionError from error

    def _work(self, todo: "queue.SimpleQueue[_Piece]", done: "queue.SimpleQueue[_Piece]", store: RangeFile) -> None:
        while not self._stop.is_set():
            try:
                piece = todo.get_nowait()
            except queue.Empty:
                return
            try:
                self._fetch(piece, store)
            except _endings() as error:
                piece.error = error
            finally:
                done.put(piece)

    # --- one range -------------------------------------------------------------------------------------------

    def _fetch(self, piece: _Piece, store: RangeFile) -> None:
        """Ask for a piece until all of it is there."""
        tries = wrong = renewed = 0
        while piece.at < piece.end and not self._stop.is_set():
            before, address = piece.at, None
            try:
                time.sleep(max(0.0, self._not_before - time.monotonic()))
                address = self._addressed(None)
                self._ask(piece, address, store)
            except WrongAnswer as error:
                wrong += IGNORED if error.is_ignored else 1
                if wrong >= WRONG_ANSWERS * (2 if self._has_ranges else 1):
                    raise RangesRefused(str(error)) from error
            except _Expired as error:
                renewed += 1
                if renewed == NEW_ADDRESSES:
                    raise RangesRefused(str(error)) from error
                self._addressed(address)
            except failures() as error:
                enough = SMALLEST_PART if isinstance(error, http_library().TimeoutException) else SLOWEST
                tries = 1 if piece.at - before >= enough else tries + 1
                if tries == TRIES or not passes(error):
                    raise
                self._delay(error, 0.0 if piece.at > before else BACKOFF[tries - 1])
            if piece.at > before:
                wrong = renewed = 0

    def _ask(self, piece: _Piece, address: Address, store: RangeFile) -> None:
        """Make one request for the rest of a piece, and write what arrives to its place."""
        from huggingface_hub import constants, get_session
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

        start, end = piece.at, piece.end
        headers = build_hf_headers(token=False if address.is_foreign else None)
        headers |= {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream(
            "GET", address.url, headers=headers, timeout=timeout, follow_redirects=True
        ) as answer:
            if answer.status_code in (401, 403) and address.is_foreign:
                raise _Expired(f"status {answer.status_code}")
            if answer.status_code != 416:
                hf_raise_for_status(answer)
            _check(answer.status_code, answer.headers, start, end, self._size)
            self._has_ranges = True
            digest = piece.digest.copy()
            for chunk in not_too_slowly(answer.iter_raw(), timeout):
                if self._stop.is_set():
                    return
                self._count(len(chunk))
                if len(chunk) > end - piece.at:  # who sends too much may have sent other bytes
                    piece.at, piece.digest = start, digest
                    raise WrongAnswer(f"more than the bytes {start} to {end}")
                store.write(chunk, piece.at)
                piece.digest.update(chunk)
                piece.at += len(chunk)
        if piece.at < end:
            raise http_library().RemoteProtocolError("the answer ended early")

    def _addressed(self, spent: Address | None) -> Address:
        """Return the address, asked for once, and again where it is the one that is `spent`."""
        with self._addressing:
            if self._address is None or self._address is spent:
                self._address = self._ask_address()
            return self._address

    def _ask_address(self) -> Address:
        from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

        url = hf_hub_url(self._repo_id, self._file, revision=self._commit, endpoint=constants.ENDPOINT)
        may_pass = passes_at_first if self._address is None else passes
        found = patiently(
            lambda: get_hf_file_metadata(url, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT), may_pass=may_pass
        )
        where = f"{self._file} of {self._repo_id}"
        if found.commit_hash != self._commit or found.etag is None:
            raise HubError(
                f"{constants.ENDPOINT} does not answer as the Hub does for {where}",
                hint="Unset HF_ENDPOINT, or set it to an endpoint that answers as the Hub does.",
            )
        if found.size is not None and found.size != self._size:
            raise HubError(
                f"{where} has {found.size} bytes; its header promised {self._size}",
                hint="Run the command again; if that is no help, the file is damaged on the Hub.",
            )
        return Address(found.location, found.etag, _origin(found.location) != _origin(constants.ENDPOINT))

    def _delay(self, error: Exception, seconds: float) -> None:
        """Wait before a request is made again; where the Hub says how long, no other request is made meanwhile."""
        asked = seconds_asked(error)
        if asked is None:
            time.sleep(seconds)
        else:
            self._not_before = max(self._not_before, time.monotonic() + asked)


def _check(status: int, headers: Mapping[str, str], start: int, end: int, size: int) -> None:
    """Raise WrongAnswer for an answer that is not exactly the bytes [start, end) of a file of `size` bytes."""
    if status != 206:
        raise WrongAnswer(f"status {status} for a range", is_ignored=status == 200)
    if headers.get("Content-Encoding", "identity") != "identity":
        raise WrongAnswer(f"a range compressed by {headers['Content-Encoding']}")
    if headers.get("Content-Range") != f"bytes {start}-{end - 1}/{size}":
        raise WrongAnswer(f"{headers.get('Content-Range')!r} for the bytes {start} to {end}")
    if headers.get("Content-Length", str(end - start)) != str(end - start):
        raise WrongAnswer(f"{headers['Content-Length']} bytes for the bytes {start} to {end}")


def _endings() -> tuple[type[Exception], ...]:
    """Return what a worker can end with."""
    return (SurgeonError, RangesRefused, *failures())


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc
