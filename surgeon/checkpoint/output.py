"""The output directory: it appears at once and whole, or not at all.

Everything is written beside the target under a hidden temporary name, config.json last, then synced and renamed. What
a killed process leaves behind is hidden, has no config.json, and is removed by the next run with the same output.
"""

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from surgeon.checkpoint.source import CONFIG
from surgeon.checkpoint.writer import Extent, copy_range
from surgeon.errors import OutputError

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
    stats = os.statvfs(place)
    free = stats.f_bavail * stats.f_frsize
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
    stage = target.parent / f".{target.name}.surgeon-{os.getpid()}"
    made = [parent for parent in target.parents if not parent.exists()]
    lock = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        lock = _make_locked(stage)
        yield stage
        sync_tree(stage)
        publish(stage, target, overwrite=overwrite)
    except OSError as error:
        raise as_output_error(error, target) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        if lock is not None:
            os.close(lock)
        for parent in made:
            with suppress(OSError):  # holds the result, or something of another's
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


def _make_locked(stage: Path) -> int:
    """Make a directory and return a handle that locks it. Another run may see it unlocked and remove it: then again."""
    while True:
        stage.mkdir(exist_ok=True)
        try:
            lock = os.open(stage, os.O_RDONLY)
        except FileNotFoundError:
            continue
        fcntl.flock(lock, fcntl.LOCK_EX)
        if stage.exists() and stage.stat().st_ino == os.fstat(lock).st_ino:
            return lock
        os.close(lock)


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


def _remove_leftovers(target: Path) -> None:
    """Remove what runs that were killed have left beside `target`; a run that lives holds a lock on its own."""
    leftover = re.compile(rf"\.{re.escape(target.name)}\.surgeon-(old-)?\d+")
    for path in list(target.parent.iterdir()):
        if not (match := leftover.fullmatch(path.name)):
            continue
        if match[1] and not target.exists():
            continue  # a run died between its two renames: this is the only copy of the old output
        try:
            lock = os.open(path, os.O_RDONLY)
        except FileNotFoundError:  # a run that lives has just finished
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except BlockingIOError:
            pass
        finally:
            os.close(lock)


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
