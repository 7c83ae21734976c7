"""Writing a result: the output directory, which appears whole or not at all, and the weight files in it.

The directory: everything is written under a hidden temporary name beside the target, config.json last, then synced and
renamed. A killed process leaves only that hidden directory, without a config.json; the next run with the same output
removes it.

A weight file: the header first, then each tensor at its offset. The kernel copies each tensor that is only moved.
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

from surgeon.checkpoint.header import CHANGED_HINT, FilePart, FileRange, TensorSpec, format_header
from surgeon.checkpoint.source import CONFIG
from surgeon.errors import CheckpointError, OutputError
from surgeon.options import Reads

# The output directory

SPARE = 1.05  # free space to require, relative to the bytes that will be written


def check_target(target: Path, *, overwrite: bool, reads: Reads) -> None:
    """Refuse an output that must not be written, before anything is read.

    Raises OutputError when replacing it would change something that is read, when it exists and is not empty without
    `overwrite`, or when it holds something that is no checkpoint.
    """
    try:
        is_other = target.is_symlink() or (target.exists() and not target.is_dir())
        is_empty = not target.is_dir() or not any(target.iterdir())
    except OSError as error:  # a name that is too long, or a directory that must not be read
        raise as_output_error(error, target) from error
    if is_other:
        raise OutputError(f"{target} exists and is not a directory", hint="Choose another place with -o.")
    check_apart(target, reads)
    if is_empty:
        return
    if not overwrite:
        raise OutputError(f"{target} exists and is not empty", hint="Replace it with --overwrite, or choose -o.")
    if not (target / CONFIG).is_file():
        raise OutputError(
            f"{target} is not a checkpoint, so it is not replaced", hint="Remove it yourself, or choose -o."
        )


def check_apart(target: Path, reads: Reads) -> None:
    """Raises OutputError where something that is read lies in `target`, or in what a killed run left beside it."""
    begun = f".{target.name}.surgeon-"  # the next run with this target removes what is named so
    try:
        beside = [path for path in target.parent.iterdir() if path.name.startswith(begun)]
    except OSError:
        beside = []
    replaced = [target] if target.is_dir() and any(target.iterdir()) else []
    if not replaced and not beside:
        return
    from surgeon.checkpoint.overlap import check_replaced

    for path in replaced:
        check_replaced(path, reads)
    for path in beside:
        hint = f"This command removes it; rename it first: mv {path} NAME"
        check_replaced(path, reads, what="what a killed run has left,", hint=hint)


def check_space(target: Path, needed: int) -> None:
    """Raises OutputError when the file system of `target` does not have `needed` bytes and a little more free."""
    place = _existing_parent(target)
    free = shutil.disk_usage(place).free
    if needed * SPARE > free:
        raise OutputError(
            f"{place} has {free / 1e9:.2f} GB free, the result needs {needed * SPARE / 1e9:.2f} GB",
            hint="Free some space, or choose another disk with -o.",
        )


def _existing_parent(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


@contextmanager
def staged(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield an empty directory to fill. On success it becomes `target`; on any failure it is removed.

    Raises OutputError when the disk is full or cannot be written.
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
            with suppress(OSError):  # not empty: it holds the result, or another file
                parent.rmdir()


def _lock_of(stage: Path) -> Path:
    """Return the file, beside its stage, that a running process locks."""
    return stage.with_name(f"{stage.name}.lock")


def _remove_leftovers(target: Path) -> None:
    """Remove the stages of killed runs beside `target`. A running process holds its lock."""
    from filelock import FileLock, Timeout

    leftover = re.compile(rf"\.{re.escape(target.name)}\.surgeon-(old-)?(\d+)(\.lock)?")
    for path in sorted(target.parent.iterdir()):
        if not (match := leftover.fullmatch(path.name)):
            continue
        if match[1] and not target.exists():
            continue  # the run was killed between its two renames: this is the only copy of the old output
        lock = _lock_of(target.parent / f".{target.name}.surgeon-{match[2]}")
        try:
            with FileLock(lock, blocking=False):
                if path != lock:
                    shutil.rmtree(path, ignore_errors=True)
                lock.unlink(missing_ok=True)
        except Timeout:
            continue


def sync_tree(directory: Path) -> None:
    """Sync every file and directory below. A file that was synced already costs nothing."""
    for path in directory.rglob("*"):
        _sync(path)
    _sync(directory)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish(stage: Path, target: Path, *, overwrite: bool) -> None:
    """Rename `stage` to `target`. With `overwrite` an old target is removed once the new one has its name."""
    if target.exists() and any(target.iterdir()):
        if not overwrite:
            raise OutputError(f"{target} appeared while its new content was written", hint="Choose another -o.")
        old = target.parent / f".{target.name}.surgeon-old-{os.getpid()}"
        try:
            target.rename(old)
            stage.rename(target)
        finally:
            if old.exists() and not target.exists():  # Ctrl-C between the two renames, or the second one failed
                old.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        stage.rename(target)  # an empty target is replaced
    _sync(target.parent)


def as_output_error(error: OSError, target: Path) -> OutputError:
    """Return the error for a user whose `target` could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(f"the disk of {target} is full", hint="Free some space, or choose another disk with -o.")
    where = error.filename or target
    return OutputError(f"cannot write {where}: {error.strerror or error}", hint="Choose another place with -o.")


def copy_files(directory: Path, files: Mapping[str, Path]) -> None:
    """Copy files to their relative paths in `directory`. Raises CheckpointError when one cannot be read."""
    for relative, source in files.items():
        target = directory / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as file:
            copy_range(FilePart(source).range(0, source.stat().st_size), file.fileno(), 0, lambda count: None)


def write_files(directory: Path, files: Mapping[str, bytes]) -> None:
    """Write small files into `directory`."""
    for name, content in files.items():
        (directory / name).write_bytes(content)


# One weight file

PAGE = 4096
STEP = 64 * 1024 * 1024  # bytes for each call into the kernel: often enough for a progress bar and for Ctrl-C
BUFFER = 4 * 1024 * 1024
# The errors of copy_file_range where the file system or the kernel does not support it.
_UNSUPPORTED = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.ETXTBSY}

CountBytes = Callable[[int], object]  # called with the number of bytes written since the last call


@dataclass(frozen=True, slots=True)
class TensorWrite:
    """A tensor to write: bytes of a file, or a function that makes them."""

    name: str
    spec: TensorSpec
    content: FileRange | Callable[[], Iterable[memoryview]]


@dataclass(frozen=True, slots=True)
class CopyRun:
    """Tensors that follow each other both in a source file and in the result: one copy.

    `target` is the offset in the result, counted from the start of its data.
    """

    source: FileRange
    target: int


def write_safetensors(path: Path, writes: Sequence[TensorWrite], *, progress: CountBytes | None = None) -> int:
    """Return the size of the new file `path` after writing `writes` to it in their order and syncing it."""
    count_bytes = progress or (lambda count: None)
    runs = _copy_runs(writes)
    header = format_header({write.name: write.spec for write in writes}, align=_best_alignment(runs))
    size = len(header) + sum(write.spec.nbytes for write in writes)
    target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        _allocate(target, size)
        os.pwrite(target, header, 0)
        for run in runs:
            copy_range(run.source, target, len(header) + run.target, count_bytes)
        offset = len(header)
        for write in writes:
            if not isinstance(write.content, FileRange):
                _write_computed(target, write, offset, count_bytes)
            offset += write.spec.nbytes
        os.fsync(target)
    finally:
        os.close(target)
    return size


def _copy_runs(writes: Sequence[TensorWrite]) -> list[CopyRun]:
    runs: list[CopyRun] = []
    target = 0
    for write in writes:
        if isinstance(source := write.content, FileRange) and source.end > source.start:
            last = runs[-1] if runs else None
            if (
                last
                and last.source.path == source.path
                and last.source.end == source.start
                and last.target + (last.source.end - last.source.start) == target
            ):
                runs[-1] = CopyRun(last.source.until(source.end), last.target)
            else:
                runs.append(CopyRun(source, target))
        target += write.spec.nbytes
    return runs


def _best_alignment(runs: Sequence[CopyRun]) -> int:
    """Return where, modulo a page, the data should begin so that most bytes keep their place within a page."""
    votes: Counter[int] = Counter()
    for run in runs:
        votes[(run.source.start - run.target) % PAGE] += run.source.end - run.source.start
    return next((phase for phase, _ in votes.most_common() if phase % 8 == 0), 0)


def _allocate(target: int, size: int) -> None:
    """Give an open file its size, and its blocks where the system can: a full disk is then known at once."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(target, 0, size)
    else:
        os.ftruncate(target, size)


def _write_computed(target: int, write: TensorWrite, offset: int, count_bytes: CountBytes) -> None:
    assert not isinstance(write.content, FileRange)
    end = offset + write.spec.nbytes
    unsent = offset  # the kernel has not begun to write the bytes from here to `offset` to the disk
    for chunk in write.content():
        view = memoryview(chunk)
        view = view.cast("B") if view.nbytes else memoryview(b"")  # an empty view cannot be cast
        while view:
            done = os.pwrite(target, view[:STEP], offset)
            offset, view = offset + done, view[done:]
            count_bytes(done)
            if offset - unsent >= STEP:
                _start_writeback(target, unsent, offset - unsent)
                unsent = offset
    assert offset == end, f"{write.name} was planned {write.spec.nbytes} bytes long, made {offset - end:+d}"


def copy_range(source: FileRange, target: int, offset: int, count_bytes: CountBytes) -> None:
    """Copy `source` to `offset` of the open file `target`, by the kernel where it can.

    Raises CheckpointError when the file cannot be opened, or has become shorter since its header was read.
    """
    handle = source.file.open()
    try:
        position = source.start
        copy = _copy_file_range if hasattr(os, "copy_file_range") else _read_write
        while position < source.end:
            count = min(STEP, source.end - position)
            try:
                done = copy(handle, target, count, position, offset)
            except OSError as error:
                if copy is _read_write or error.errno not in _UNSUPPORTED:
                    raise
                copy = _read_write
                continue
            if done == 0:
                if copy is not _read_write:  # some file systems return 0 where they cannot copy
                    copy = _read_write
                    continue
                raise CheckpointError(
                    f"{source.path} became shorter while it was read: it ends at byte {position}", hint=CHANGED_HINT
                )
            _start_writeback(target, offset, done)
            position += done
            offset += done
            count_bytes(done)
    finally:
        os.close(handle)


def _copy_file_range(source: int, target: int, count: int, position: int, offset: int) -> int:
    return os.copy_file_range(source, target, count, position, offset)


def _read_write(source: int, target: int, count: int, position: int, offset: int) -> int:
    return os.pwrite(target, os.pread(source, min(count, BUFFER), position), offset)


def _start_writeback(target: int, offset: int, count: int) -> None:
    """Let the kernel begin to write these bytes to the disk, so that little is left for the sync at the end.

    On Linux this advice starts the writing of dirty pages; they stay in memory until they are written.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(target, offset, count, os.POSIX_FADV_DONTNEED)
