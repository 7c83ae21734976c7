"""Writing a result: the output directory, which appears whole or not at all, and bytes copied or shared into it.

The directory: everything is written under a hidden temporary name beside the target, config.json last, then synced and
renamed. A killed process leaves only that hidden directory, without a config.json; the next run with the same output
removes it.

Bytes of other files are copied by the kernel. Where the file system can share blocks between files (btrfs, XFS), whole
blocks are shared instead.
"""

import errno
import fcntl
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from surgeon.checkpoint.header import CHANGED_HINT, FilePart, FileRange
from surgeon.checkpoint.source import CONFIG, is_adapter
from surgeon.errors import CheckpointError, OutputError
from surgeon.options import Reads
from surgeon.text import size

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
    if not (target / CONFIG).is_file() and not is_adapter(target):
        raise OutputError(
            f"{target} is not a checkpoint, so it is not replaced", hint="Remove it yourself, or choose -o."
        )


LOCK = "lock"  # the file in a directory that one process at a time may have


@contextmanager
def alone_in(directory: Path, *, doing: str) -> Iterator[None]:
    """Return a context that has a directory, made where there is none, to itself.

    Raises OutputError where another process has it, `doing` something there.
    """
    from filelock import FileLock, Timeout

    with guarded(directory):
        directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(directory / LOCK, timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            hint = "Wait for it, or choose another -o."
            raise OutputError(f"another process is {doing} {directory}", hint=hint) from error
    try:
        yield
    finally:
        lock.release()


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
    place = existing_parent(target)
    free = shutil.disk_usage(place).free
    if needed * SPARE > free:
        raise OutputError(
            f"{place} has {size(free)} free, the result needs {size(needed * SPARE)}",
            hint="Free some space, or choose another disk with -o.",
        )


def existing_parent(path: Path) -> Path:
    """Return the path, or the nearest directory above it that exists."""
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
        is_back = _restore(target)
        _remove_leftovers(target)
        if is_back and not overwrite:  # the user takes the output to be missing
            raise OutputError(
                f"{target} was being replaced by a run that was killed; it is there again, as it was",
                hint="Replace it with --overwrite, or choose -o.",
            )
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


def _restore(target: Path) -> bool:
    """Return whether an old output was put back: one whose replacement was killed between its two renames."""
    from filelock import FileLock, Timeout

    old = [path for path, match in _leftovers(target) if match["old"] and not match["lock"]]
    if not old or target.exists():
        return False
    newest = max(old, key=lambda path: path.stat().st_ctime_ns)  # a rename sets it
    try:
        with FileLock(_lock_of(target.parent / newest.name.replace(".surgeon-old-", ".surgeon-")), blocking=False):
            newest.rename(target)
    except Timeout:  # the run is alive, and between its renames just now
        return False
    return True


def _leftovers(target: Path) -> list[tuple[Path, re.Match[str]]]:
    """Return what runs have or had beside `target`: stages, old outputs and locks, each with its name's parts."""
    name = re.compile(rf"\.{re.escape(target.name)}\.surgeon-(?P<old>old-)?(?P<process>\d+)(?P<lock>\.lock)?")
    found = ((path, name.fullmatch(path.name)) for path in sorted(target.parent.iterdir()))
    return [(path, match) for path, match in found if match]


def _remove_leftovers(target: Path) -> None:
    """Remove the stages of killed runs beside `target`. A running process holds its lock."""
    from filelock import FileLock, Timeout

    for path, match in _leftovers(target):
        if match["old"] and not target.exists():
            continue  # of a run that is between its two renames just now: this is the only copy of the old output
        lock = _lock_of(target.parent / f".{target.name}.surgeon-{match['process']}")
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
    """Rename `stage` to `target`. With `overwrite` an old target is removed once the new one has its name.

    Where the file system can swap two names, one of the two has the name at any moment. Elsewhere the old one is
    renamed away just before, and a run that is killed right then leaves it there: the next one restores it.
    """
    if not target.exists() or not any(target.iterdir()):
        stage.rename(target)  # an empty target is replaced
        with _undone(lambda: target.rename(stage)):
            _sync(target.parent)
        return
    if not overwrite:
        raise OutputError(f"{target} appeared while its new content was written", hint="Choose another -o.")
    if exchange(stage, target):
        with _undone(lambda: exchange(stage, target)):
            _sync(target.parent)
    else:
        old = target.parent / f".{target.name}.surgeon-old-{os.getpid()}"
        try:
            target.rename(old)
            stage.rename(target)
        finally:
            if old.exists() and not target.exists():  # Ctrl-C between the two renames, or the second one failed
                old.rename(target)
        old.rename(stage)  # what is called old is whole
        _sync(target.parent)
    shutil.rmtree(stage, ignore_errors=True)


@contextmanager
def _undone(undo: Callable[[], object]) -> Iterator[None]:
    """Return a context that calls `undo` where the disk fails in it: after an error all is as it was."""
    try:
        yield
    except OSError:
        undo()
        raise


def exchange(one: Path, other: Path) -> bool:
    """Return whether two names were swapped, at once: that takes Linux, and a file system that can."""
    import ctypes

    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    here, swap = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of the system's headers
    if rename(here, os.fsencode(one), here, os.fsencode(other), swap) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(other))


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
        part = FilePart(source)
        with part.opened() as opened:
            size = os.fstat(opened.descriptor).st_size
        with target.open("xb") as file:
            copy_range(part.range(0, size), file.fileno(), 0, lambda count: None)


def write_files(directory: Path, files: Mapping[str, bytes]) -> None:
    """Write small files into `directory`."""
    for name, content in files.items():
        (directory / name).write_bytes(content)


def write_whole(path: Path, parts: Iterable[bytes]) -> None:
    """Write a file, all of it or nothing: a crash leaves what was there, or the new content. Raises OSError."""
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with staged.open("wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


@contextmanager
def guarded(path: Path) -> Iterator[None]:
    """Turn an error of the disk in this block into an OutputError that names the file."""
    try:
        yield
    except OSError as error:
        hint = f"Is the disk full, or not yours?  df -h {path.parent}"
        raise OutputError(f"cannot write {path}: {error.strerror}", hint=hint) from error


# Copying bytes of files

PAGE = 4096
STEP = 64 * 1024 * 1024  # bytes for each call into the kernel: often enough for a progress bar and for Ctrl-C
BUFFER = 4 * 1024 * 1024
# The errors of copy_file_range after which bytes are read and written: where the file system or the kernel does not
# support it, and a failing disk (EIO), of which only reading and writing say which of the two it is.
_UNSUPPORTED = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.ETXTBSY, errno.EIO}

CountBytes = Callable[[int], object]  # called with the number of bytes written since the last call


def copy_range(source: FileRange, target: int, offset: int, count_bytes: CountBytes) -> None:
    """Copy `source` to `offset` of the open file `target`, by the kernel where it can.

    Raises CheckpointError when the file cannot be read, or has become shorter since its header was read.
    """
    with source.file.opened() as opened:
        handle, position = opened.descriptor, source.start
        by_kernel = hasattr(os, "copy_file_range")
        while position < source.end:
            count = min(STEP, source.end - position)
            if by_kernel:
                try:
                    done = os.copy_file_range(handle, target, count, position, offset)
                except OSError as error:
                    if error.errno not in _UNSUPPORTED:
                        raise
                    done = 0
                by_kernel = done > 0  # some file systems return 0 where they cannot copy
                if not by_kernel:
                    continue
            else:
                done = os.pwrite(target, _read(source.path, handle, min(count, BUFFER), position), offset)
            start_writeback(target, offset, done)
            position += done
            offset += done
            count_bytes(done)


def _read(path: Path, handle: int, count: int, position: int) -> bytes:
    """Return some of the next bytes of a file that is copied from. Raises CheckpointError where there are none."""
    try:
        content = os.pread(handle, count, position)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}", hint=f"Look at it: ls -l {path}") from error
    if not content:
        raise CheckpointError(f"{path} became shorter while it was read: it ends at byte {position}", hint=CHANGED_HINT)
    return content


def start_writeback(target: int, offset: int, count: int) -> None:
    """Let the kernel begin to write these bytes to the disk, so that little is left for the sync at the end.

    On Linux this advice starts the writing of dirty pages; they stay in memory until they are written.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(target, offset, count, os.POSIX_FADV_DONTNEED)


# Sharing blocks

# The request of ioctl, which Python names from 3.12 on. The few processors with another number refuse this one.
_FICLONERANGE: int = getattr(fcntl, "FICLONERANGE", 0x4020940D)


def shareable(files: Mapping[str, FilePart], target: Path) -> dict[str, int]:
    """Return the files whose blocks an output `target` can share, each with the size of a block. Leaves no trace."""
    import tempfile

    try:
        with tempfile.TemporaryFile(dir=existing_parent(target.parent)) as probe:
            blocks = {file: shared_block(part, probe.fileno()) for file, part in files.items()}
    except OSError:  # no place to write to: nothing will be shared there, and writing says why
        return {}
    return {file: block for file, block in blocks.items() if block}


def shared_block(source: FilePart, target: int) -> int:
    """Return the size of the blocks of `source` that the empty open file `target` can share; 0 if it cannot.

    It is found out by sharing the first one, for a moment.
    """
    with source.opened() as opened:
        handle = opened.descriptor
        block = max(os.fstatvfs(handle).f_bsize, os.fstatvfs(target).f_bsize)
        if block & (block - 1) or not 512 <= block <= 65536:
            block = PAGE  # a network's transfer size, not a block
        can = _share(handle, target, block, 0, 0)
    if can:
        os.ftruncate(target, 0)
    return block if can else 0


def share_range(source: FileRange, target: int, offset: int, count_bytes: CountBytes) -> int:
    """Return how many of the bytes of `source` the open file `target` shares at `offset` now. It stops at a refusal."""
    with source.file.opened() as opened:
        handle, done = opened.descriptor, 0
        while (count := min(STEP, source.size - done)) and _share(
            handle, target, count, source.start + done, offset + done
        ):
            done += count
            count_bytes(count)
    return done


def _share(source: int, target: int, count: int, position: int, offset: int) -> bool:
    """Return whether two open files share these blocks now. Where not, the caller copies, and meets any real fault."""
    try:
        fcntl.ioctl(target, _FICLONERANGE, struct.pack("qQQQ", source, position, count, offset))
    except OSError:
        return False
    return True
