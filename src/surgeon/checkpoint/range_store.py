"""Ranges of files on the Hub, kept on this machine in a form that nobody can take for whole files.

For each file of a commit there is a sparse file with a suffix that no loader takes, and a map of the blocks that are in
it. A block is in the map only after its bytes are on the disk, with their digest, so that a killed process leaves a
store that is right. A sparse file has a name of its own and only ever gains blocks; to forget ranges is to remove it.
So a reader that holds it open never sees a byte change, whatever other processes do. Locks save work, not correctness.

The store lies beside huggingface_hub's cache (HF_ASSETS_CACHE/surgeon), where `hf cache` and loaders do not look.
"""

import errno
import hashlib
import json
import os
import secrets
import shutil
import time
import weakref
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from surgeon import text
from surgeon.checkpoint.header import FilePart
from surgeon.checkpoint.output import existing_parent
from surgeon.errors import CheckpointError, HubError

Span = tuple[int, int]

FORMAT = 1
DATA_SUFFIX = ".sparse"
MAP_SUFFIX = ".map.json"
CHUNK = 1 << 20
SIZE_VARIABLE = "SURGEON_CACHE_SIZE"
USUAL_SIZE = 100_000_000_000  # bytes of ranges that are kept, where the disk has room for twice as many
UNUSED_DAYS = 30  # ranges that no run has used for so long are removed
ORPHAN_SECONDS = 86_400  # a sparse file without a map may be another process's, which is about to write one


# Spans: half-open, sorted, apart


def merged(spans: Iterable[Span]) -> list[Span]:
    """Return the same bytes as sorted spans that do not touch."""
    result: list[Span] = []
    for start, end in sorted(spans):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        elif start < end:
            result.append((start, end))
    return result


def without(spans: Sequence[Span], present: Sequence[Span]) -> list[Span]:
    """Return the bytes of `spans` that are not in `present`; both are merged."""
    result: list[Span] = []
    for start, end in spans:
        for here, there in present:
            if there <= start or here >= end:
                continue
            if start < here:
                result.append((start, here))
            start = there
        if start < end:
            result.append((start, end))
    return result


def total(spans: Iterable[Span]) -> int:
    """Return the number of bytes."""
    return sum(end - start for start, end in spans)


def digest_of() -> Any:
    """Return a new digest of a block."""
    return hashlib.blake2b(digest_size=16)


# One file


@dataclass(frozen=True, slots=True)
class Block:
    """Bytes that arrived together, and their digest in hexadecimal."""

    start: int
    end: int
    digest: str


class _Descriptor:
    """An open file, which is closed when nothing refers to it any more."""

    def __init__(self, path: Path, flags: int) -> None:
        try:
            self._descriptor = os.open(path, flags, 0o666)
        except OSError as error:
            if flags & os.O_CREAT or error.errno not in (errno.EROFS, errno.EACCES):
                raise
            self._descriptor = os.open(path, os.O_RDONLY)  # what is there can be read where nothing can be added
        weakref.finalize(self, os.close, self._descriptor)

    def fileno(self) -> int:
        return self._descriptor


class RangeFile:
    """The stored ranges of one file of `size` bytes, whose contents the Hub names `etag`."""

    def __init__(
        self, directory: Path, file: str, size: int, etag: str, data: str, blocks: Iterable[Block], *, flags: int = 0
    ) -> None:
        self.directory, self.file, self.size, self.etag = directory, file, size, etag
        self.path = directory / data
        self._held = _Descriptor(self.path, os.O_RDWR | flags)
        self._blocks = list(blocks)
        self._read_back: set[Block] = set()
        self.is_verified = False

    @classmethod
    def find(cls, directory: Path, file: str, *, size: int) -> Self | None:
        """Return the stored ranges of a file, None where there are none that can be used."""
        known = _read_map(directory, file)
        if known is None or known["size"] != size:
            return None
        try:
            if (directory / known["data"]).stat().st_size != size:
                return None
            found = cls(directory, file, size, known["etag"], known["data"], known["blocks"])
        except OSError:
            return None
        with suppress(OSError):
            os.utime(_map_of(directory, file))  # it is used
        found.is_verified = known["verified"]
        return found

    @classmethod
    def create(cls, directory: Path, file: str, *, size: int, etag: str) -> Self:
        """Return an empty store for a file; what was stored of it before is forgotten. Raises OSError."""
        directory.mkdir(parents=True, exist_ok=True)
        with _locked(directory, file):
            if (found := cls.find(directory, file, size=size)) is not None and found.etag == etag:
                return found  # another process has just made it
            _forget(directory, file)
            made = cls(directory, file, size, etag, f"{file}.{secrets.token_hex(4)}{DATA_SUFFIX}", [], flags=os.O_CREAT)
            os.ftruncate(made._held.fileno(), size)
            made._write_map()
        return made

    @property
    def present(self) -> list[Span]:
        """The bytes that are there."""
        return merged((block.start, block.end) for block in self._blocks)

    def part(self) -> FilePart:
        """Return what is there, for readers."""
        return FilePart(self.path, tuple(self.present), self._held)

    def write(self, content: memoryview | bytes, at: int) -> None:
        """Write bytes to their place; they are there once their block is added. Raises HubError."""
        view = memoryview(content)
        while view:
            try:
                done = os.pwrite(self._held.fileno(), view, at)
            except OSError as error:
                raise as_hub_error(error, self.file, self.directory) from error
            view, at = view[done:], at + done

    def add(self, blocks: Sequence[Block]) -> None:
        """Add blocks that were written, in this process and in the map. Raises HubError where they cannot be synced."""
        if not blocks:
            return
        try:
            os.fdatasync(self._held.fileno()) if hasattr(os, "fdatasync") else os.fsync(self._held.fileno())
            self._blocks += blocks
            self._read_back.update(blocks)
            self._update_map()
        except OSError as error:
            raise as_hub_error(error, self.file, self.directory) from error

    @contextmanager
    def downloading(self) -> Iterator[None]:
        """Return a context in which no other process downloads to this file, with what others have added to it.

        So no process writes where another one reads, be it the same bytes or, for a moment, those of a wrong answer.
        """
        with _locked(self.directory, f"{self.file}.download"):
            if (known := self._known()) is not None:
                self._blocks = list(dict.fromkeys([*known["blocks"], *self._blocks]))
            yield

    def check(self, spans: Sequence[Span]) -> None:
        """Read back every block of an earlier run that meets `spans`, and drop those that changed on the disk."""
        used = [block for block in self._blocks if block not in self._read_back and _meets(block, spans)]
        spoilt = {block for block in used if self._digest(block.start, block.end, digest_of()) != block.digest}
        self._read_back.update(set(used) - spoilt)
        if spoilt:
            self._blocks = [block for block in self._blocks if block not in spoilt]
            self.is_verified = False
            with suppress(OSError):
                self._update_map(without=spoilt)

    def verify(self) -> None:
        """Compare the SHA-256 with the one that the Hub names, where all bytes are there and it names one.

        Raises CheckpointError where they differ; the bytes are forgotten then.
        """
        if self.is_verified or self.present != [(0, self.size)] or len(self.etag) != 64:
            return
        if self._digest(0, self.size, hashlib.sha256()) != self.etag:
            self.forget()
            raise CheckpointError(
                f"the bytes of {self.file} that arrived do not have the SHA-256 that the Hub names",
                hint="Run the command again: it downloads the file anew.",
            )
        self.is_verified = True
        with suppress(OSError):
            self._update_map()

    def forget(self) -> None:
        """Remove the file from the store. Who holds it open can still read it."""
        with suppress(OSError), _locked(self.directory, self.file):
            _forget(self.directory, self.file)

    def _digest(self, start: int, end: int, digest: Any) -> str:
        """Return the digest of bytes on the disk, "" where they cannot be read."""
        try:
            for at in range(start, end, CHUNK):
                digest.update(os.pread(self._held.fileno(), min(CHUNK, end - at), at))
        except OSError:
            return ""
        return str(digest.hexdigest())

    def _known(self) -> dict[str, Any] | None:
        """Return the map, None where it is no longer of this sparse file, which was forgotten meanwhile."""
        known = _read_map(self.directory, self.file)
        return known if known is not None and known["data"] == self.path.name else None

    def _update_map(self, *, without: Container[Block] = ()) -> None:
        """Write the map: what other processes have added, and what this one has."""
        with _locked(self.directory, self.file):
            if (known := self._known()) is not None:
                both = dict.fromkeys([*known["blocks"], *self._blocks])
                self._blocks = [block for block in both if block not in without]
                self._write_map()

    def _write_map(self) -> None:
        content = {
            "format": FORMAT,
            "size": self.size,
            "etag": self.etag,
            "data": self.path.name,
            "verified": self.is_verified,
            "present": [[block.start, block.end, block.digest] for block in self._blocks],
        }
        partial = self.directory / f"{self.file}.{os.getpid()}.{secrets.token_hex(4)}"
        try:
            with partial.open("w", encoding="utf-8") as file:
                json.dump(content, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(_map_of(self.directory, self.file))
        finally:
            partial.unlink(missing_ok=True)


def _meets(block: Block, spans: Sequence[Span]) -> bool:
    return any(start < block.end and end > block.start for start, end in spans)


def _map_of(directory: Path, file: str) -> Path:
    return directory / f"{file}{MAP_SUFFIX}"


def _read_map(directory: Path, file: str) -> dict[str, Any] | None:
    """Return the map of a file, None where there is none that is right in form."""
    try:
        content = json.loads(_map_of(directory, file).read_bytes())
        size, data = content["size"], content["data"]
        blocks = [Block(start, end, digest) for start, end, digest in content["present"]]
        is_right = (
            content["format"] == FORMAT
            and type(size) is int
            and data.startswith(file)
            and data.endswith(DATA_SUFFIX)
            and "/" not in data
            and all(0 <= block.start < block.end <= size and isinstance(block.digest, str) for block in blocks)
        )
        known = {"size": size, "data": data, "etag": str(content["etag"]), "blocks": blocks}
        return known | {"verified": content["verified"] is True} if is_right else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # not there, or damaged: nothing is known
        return None


def _forget(directory: Path, file: str) -> None:
    """Remove the map of a file, then its data."""
    known = _read_map(directory, file)
    _map_of(directory, file).unlink(missing_ok=True)
    if known is not None:
        (directory / known["data"]).unlink(missing_ok=True)


@contextmanager
def _locked(directory: Path, file: str) -> Iterator[None]:
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]  # exported by __getattr__

    with WeakFileLock(directory / f"{file}.lock"):
        yield


def as_hub_error(error: OSError, file: str, directory: Path) -> HubError:
    """Return the error for a user whose store could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return HubError(
            f"the disk is full: no room for {file} in {directory}",
            hint="Free some space, or set HF_HOME to a directory on a larger disk.",
        )
    return HubError(
        f"cannot write {error.filename or directory}: {error.strerror or error}",
        hint="Check that path; HF_HOME moves it.",
    )


# All files


def budget(root: Path) -> int:
    """Return how many bytes of ranges are kept: as the environment says, else 100 GB or half of what the disk has."""
    given = os.environ.get(SIZE_VARIABLE)
    if given is not None:
        size = text.parse_size(given)
        if size is None:
            raise HubError(f"cannot read {SIZE_VARIABLE}={given!r} as a size", hint="Write 20GB, 500MB or 2GiB.")
        return size
    free = shutil.disk_usage(existing_parent(root)).free
    return min(USUAL_SIZE, (free + _used(root)) // 2)


def has_budget() -> bool:
    """Return whether the environment says how many bytes are kept."""
    return SIZE_VARIABLE in os.environ


def make_room(root: Path, needed: int) -> None:
    """Remove ranges of the store in `root`: those long unused, then the least recently used until `needed` bytes fit.

    What one run needs at once may exceed the budget. Raises HubError where the disk has no room for it.
    """
    now = time.time()
    maps = sorted(
        ((_modified(path), path) for path in root.glob(f"*/*/ranges/*{MAP_SUFFIX}")), key=lambda item: item[0]
    )
    room = budget(root) - needed - _used(root)
    for modified, path in maps:
        if room >= 0 and now - modified < UNUSED_DAYS * 86_400:
            break
        file = path.name.removesuffix(MAP_SUFFIX)
        known = _read_map(path.parent, file)
        if known is not None:
            room += _allocated(path.parent / known["data"])
        with suppress(OSError), _locked(path.parent, file):
            _forget(path.parent, file)
    for path in root.glob(f"*/*/ranges/*{DATA_SUFFIX}"):
        file = path.name.removesuffix(DATA_SUFFIX).rpartition(".")[0]
        known = _read_map(path.parent, file)
        if (known is None or known["data"] != path.name) and now - _modified(path) > ORPHAN_SECONDS:
            with suppress(OSError):
                path.unlink()

    free = shutil.disk_usage(existing_parent(root)).free
    if needed > free:
        raise HubError(
            f"{root} has {text.size(free)} free, and what is read of the model needs {text.size(needed)}",
            hint="Free some space, or set HF_HOME to a directory on a larger disk.",
        )


def _used(root: Path) -> int:
    return sum(_allocated(path) for path in root.glob(f"*/*/ranges/*{DATA_SUFFIX}"))


def _allocated(path: Path) -> int:
    try:
        status = path.stat()
        return min(status.st_blocks * 512, status.st_size)  # some file systems count more blocks than a file can have
    except OSError:
        return 0


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
