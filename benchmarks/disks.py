"""Disks of their own, in files and mounted by root, whose blocks files can share: for benchmarks and tests."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

KINDS = {
    "xfs": ["mkfs.xfs", "-q"],
    "xfs with blocks of 16 KiB": ["mkfs.xfs", "-q", "-b", "size=16384"],
    "btrfs": ["mkfs.btrfs", "-q"],
}


class NoDiskError(Exception):
    """Such a disk cannot be made or mounted on this machine; the message says why."""


@contextmanager
def disk(directory: Path, kind: str, *, size: int) -> Iterator[Path]:
    """Yield a new directory that is a disk of `size` bytes. Raises NoDiskError."""
    if shutil.which(KINDS[kind][0]) is None:
        raise NoDiskError(f"{KINDS[kind][0]} is not installed")
    image, place = directory / "image", directory / "disk"
    place.mkdir(parents=True)
    with image.open("wb") as file:
        file.truncate(size)
    try:
        for step in ([*KINDS[kind], image], ["mount", "-o", "loop", image, place]):
            done = subprocess.run(step, capture_output=True, text=True, check=False)
            if done.returncode:
                raise NoDiskError(f"cannot mount {kind}: {done.stderr.strip()}")
        try:
            yield place
        finally:
            subprocess.run(["umount", "-l", place], check=True)
    finally:
        image.unlink()


def used(place: Path) -> int:
    """Return the bytes that are in use on a disk, once everything is written."""
    subprocess.run(["sync", "-f", place], check=True)
    stats = os.statvfs(place)
    return (stats.f_blocks - stats.f_bfree) * stats.f_frsize
