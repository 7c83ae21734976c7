"""The output directory: it appears at once and whole, or not at all.

Everything is written beside the target under a hidden temporary name, config.json last, then synced and renamed. What
a killed process leaves behind is hidden, has no config.json, and is removed by the next run with the same output.
"""

import errno
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from surgeon.checkpoint.header import TensorSpec, format_header
from surgeon.checkpoint.source import CONFIG
from surgeon.errors import CheckpointError, OutputError

SPARE = 1.05  # free space asked for, relative to what will be written


def check_target(target: Path, *, overwrite: bool, source: Path | None = None) -> None:
    """Refuse an output that must not be written, before anything is read.

    Raises OutputError when it exists and is not empty without `overwrite`, when it holds something that is no
    checkpoint, or when replacing it would remove `source`, the directory that is read.
    """
    try:
        taken = target.is_symlink() or (target.exists() and not target.is_dir())
        empty = not target.is_dir() or not any(target.iterdir())
    except OSError as error:  # a name that is too long, or a directory that must not be read
        raise as_output_error(error, target) from error
    if taken:
        raise OutputError(f"{target} exists and is not a directory", hint="Choose another place with -o.")
    if source is not None and target.resolve() in (source.resolve(), *source.resolve().parents):
        raise OutputError(f"{target} holds the source itself", hint="Choose another place with -o.")
    if empty:
        return
    if not overwrite:
        raise OutputError(f"{target} exists and is not empty", hint="Replace it with --overwrite, or choose -o.")
    if not (target / CONFIG).is_file():
        raise OutputError(
            f"{target} is not a checkpoint, so it is not replaced", hint="Remove it yourself, or choose -o."
        )


def check_space(target: Path, needed: int) -> None:
    """Raises OutputError when the file system of `target` has not `needed` bytes and a little more free."""
    place = _existing_parent(target)
    free = shutil.disk_usage(place).free
    if needed * SPARE > free:
        raise OutputError(
            f"{place} has {free / 1e9:.2f} GB free, the result needs {needed * SPARE / 1e9:.2f} GB",
            hint="Free some space, or choose another disk with -o.",
        )


@contextmanager
def staged(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield an empty directory to fill; on success it becomes `target`, on any failure nothing is left of it.

    Raises OutputError when the disk is full or refuses.
    """
    from filelock import FileLock

    stage = target.parent / f".{target.name}.surgeon-{os.getpid()}"
    new_parents = [parent for parent in target.parents if not parent.exists()]
    lock = FileLock(_lock_of(stage))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        with lock:
            stage.mkdir()
            yield stage
            sync_tree(stage)
            publish(stage, target, overwrite=overwrite)
    except OSError as error:
        raise as_output_error(error, target) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        with suppress(OSError):
            _lock_of(stage).unlink(missing_ok=True)
        for parent in new_parents:
            with suppress(OSError):  # holds the result, or a file of somebody else
                parent.rmdir()


def copy_files(directory: Path, files: Mapping[str, Path]) -> None:
    """Copy files to their relative paths in `directory`. Raises CheckpointError when one cannot be read."""
    for relative, source in files.items():
        target = directory / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as file:
            copy_range(Extent(source, 0, source.stat().st_size), file.fileno(), 0, lambda _: None)


def write_files(directory: Path, files: Mapping[str, bytes]) -> None:
    """Write small files into `directory`."""
    for name, content in files.items():
        (directory / name).write_bytes(content)


def publish(stage: Path, target: Path, *, overwrite: bool) -> None:
    if target.exists() and any(target.iterdir()):
        if not overwrite:
            raise OutputError(f"{target} appeared while its new content was written", hint="Choose another -o.")
        old = target.parent / f".{target.name}.surgeon-old-{os.getpid()}"
        try:
            target.rename(old)
            stage.rename(target)
        finally:
            if old.exists() and not target.exists():  # Ctrl-C between the two, or the disk refused the second
                old.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        stage.rename(target)  # an empty target gives way
    _sync(target.parent)


def sync_tree(directory: Path) -> None:
    """Sync every file and directory below, files that were synced when written included: that costs nothing."""
    for path in directory.rglob("*"):
        _sync(path)
    _sync(directory)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _lock_of(stage: Path) -> Path:
    """Return the file that a run locks while it lives, beside its stage."""
    return stage.with_name(f"{stage.name}.lock")


def _remove_leftovers(target: Path) -> None:
    """Remove what killed runs have left beside `target`; a living run holds its lock."""
    from filelock import FileLock, Timeout

    leftover = re.compile(rf"\.{re.escape(target.name)}\.surgeon-(old-)?(\d+)(\.lock)?")
    for path in sorted(target.parent.iterdir()):
        if not (match := leftover.fullmatch(path.name)):
            continue
        if match[1] and not target.exists():
            continue  # a run died between its two renames: this is the only copy of the old output
        lock = _lock_of(target.parent / f".{target.name}.surgeon-{match[2]}")
        try:
            with FileLock(lock, blocking=False):
                if path != lock:
                    shutil.rmtree(path, ignore_errors=True)
                lock.unlink(missing_ok=True)
        except Timeout:
            continue


def _existing_parent(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def as_output_error(error: OSError, target: Path) -> OutputError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(f"the disk of {target} is full", hint="Free some space, or choose another disk with -o.")
    where = error.filename or target
    return OutputError(f"cannot write {where}: {error.strerror or error}", hint="Choose another place with -o.")


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
