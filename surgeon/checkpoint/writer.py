"""Write a safetensors file in one pass: its header first, then every tensor straight to its place.

Bytes that only move are copied by the kernel from file to file. Measured on ext4, what makes that as fast as `cp` is
to allocate first, to merge neighbours into long runs, to give the runs the same offset modulo the page size in both
files (the header's padding does that), and not to let all the writing wait for the sync at the end.
"""

import errno
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from surgeon.checkpoint.header import format_header
from surgeon.checkpoint.spec import TensorSpec
from surgeon.errors import CheckpointError

PAGE = 4096
STEP = 64 * 1024 * 1024  # bytes for each call into the kernel: often enough for a progress bar and for Ctrl-C
BUFFER = 4 * 1024 * 1024
# What copy_file_range and sendfile say where the file system or the kernel cannot.
_UNSUPPORTED = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.ETXTBSY}
CHANGED_HINT = "Something else changed the source; let it finish, then run the command again."

Progress = Callable[[int], object]  # is told how many more bytes are written


@dataclass(frozen=True, slots=True)
class Extent:
    """The bytes [start, end) of a file."""

    path: Path
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor to write: bytes that lie in a file, or a function that makes them."""

    name: str
    spec: TensorSpec
    content: Extent | Callable[[], Iterable[memoryview]]


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring extents that are neighbours in the result too: one copy. `target` counts from the data's start."""

    extent: Extent
    target: int


def write_safetensors(path: Path, pieces: Sequence[Piece], *, progress: Progress | None = None) -> int:
    """Return the size of the file written: `pieces` in their order, synced to disk. `path` must not exist."""
    report = progress or (lambda _: None)
    runs = _runs(pieces)
    header = format_header({piece.name: piece.spec for piece in pieces}, align=_best_alignment(runs))
    size = len(header) + sum(piece.spec.nbytes for piece in pieces)
    target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        _allocate(target, size)
        os.pwrite(target, header, 0)
        for run in runs:
            copy_range(run.extent, target, len(header) + run.target, report)
        offset = len(header)
        for piece in pieces:
            if not isinstance(piece.content, Extent):
                _write_all(target, piece, offset, report)
            offset += piece.spec.nbytes
        os.fsync(target)
    finally:
        os.close(target)
    return size


def copy_range(extent: Extent, target: int, offset: int, report: Progress) -> None:
    """Copy `extent` to `offset` of the open file `target`, by the kernel where it can.

    Raises CheckpointError when the file cannot be opened, or has become shorter since its header was read.
    """
    try:
        source = os.open(extent.path, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"cannot read {extent.path}: {error.strerror}", hint=CHANGED_HINT) from error
    try:
        position = extent.start
        copy = _copy_file_range if hasattr(os, "copy_file_range") else _read_write
        while position < extent.end:
            count = min(STEP, extent.end - position)
            try:
                done = copy(source, target, count, position, offset)
            except OSError as error:
                if copy is _read_write or error.errno not in _UNSUPPORTED:
                    raise
                copy = _read_write
                continue
            if done == 0:
                if copy is not _read_write:  # some file systems answer 0 for what they cannot copy
                    copy = _read_write
                    continue
                raise CheckpointError(
                    f"{extent.path} became shorter while it was read: it ends at byte {position}", hint=CHANGED_HINT
                )
            _start_writeback(target, offset, done)
            position += done
            offset += done
            report(done)
    finally:
        os.close(source)


def _allocate(target: int, size: int) -> None:
    """Give an open file its size, and its blocks where the system can: a full disk is then known at once."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(target, 0, size)
    else:
        os.ftruncate(target, size)


def _start_writeback(target: int, offset: int, count: int) -> None:
    """Let the kernel begin to write these bytes to the disk, so that the sync at the end finds little left to do.

    That is what the advice does on Linux for pages that are dirty; they stay in memory until they are written.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(target, offset, count, os.POSIX_FADV_DONTNEED)


def _copy_file_range(source: int, target: int, count: int, position: int, offset: int) -> int:
    return os.copy_file_range(source, target, count, position, offset)


def _read_write(source: int, target: int, count: int, position: int, offset: int) -> int:
    return os.pwrite(target, os.pread(source, min(count, BUFFER), position), offset)


def _write_all(target: int, piece: Piece, offset: int, report: Progress) -> None:
    assert not isinstance(piece.content, Extent)
    end = offset + piece.spec.nbytes
    waiting = offset  # what lies between here and `offset` is not on its way to the disk yet
    for chunk in piece.content():
        view = memoryview(chunk)
        view = view.cast("B") if view.nbytes else memoryview(b"")  # nothing cannot be cast
        while view:
            done = os.pwrite(target, view[:STEP], offset)
            offset, view = offset + done, view[done:]
            report(done)
            if offset - waiting >= STEP:
                _start_writeback(target, waiting, offset - waiting)
                waiting = offset
    assert offset == end, f"{piece.name} was planned {piece.spec.nbytes} bytes long, made {offset - end:+d}"


def _runs(pieces: Sequence[Piece]) -> list[Run]:
    runs: list[Run] = []
    target = 0
    for piece in pieces:
        if isinstance(extent := piece.content, Extent) and extent.end > extent.start:
            last = runs[-1] if runs else None
            if (
                last
                and last.extent.path == extent.path
                and last.extent.end == extent.start
                and last.target + (last.extent.end - last.extent.start) == target
            ):
                runs[-1] = Run(Extent(extent.path, last.extent.start, extent.end), last.target)
            else:
                runs.append(Run(extent, target))
        target += piece.spec.nbytes
    return runs


def _best_alignment(runs: Sequence[Run]) -> int:
    """Return where, modulo a page, the data should begin so that most bytes keep their place within a page."""
    votes: Counter[int] = Counter()
    for run in runs:
        votes[(run.extent.start - run.target) % PAGE] += run.extent.end - run.extent.start
    return next((phase for phase, _ in votes.most_common() if phase % 8 == 0), 0)
