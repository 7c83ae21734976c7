"""Numbers of rows on disk as they are computed: an attribution that was killed goes on where it was."""

import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgeon.checkpoint.begun import begin
from surgeon.checkpoint.output import alone_in, check_space, guarded, write_whole

REQUEST = "request.json"
DONE = ".done"  # the suffix of the file that says how many rows of a ledger are done
# What an attribution that goes on must have been begun with, in words; all other entries of a request are options.
_WORDS = {
    "format": "another version of surgeon",
    "model": "another MODEL",
    "checkpoints": "other checkpoints",
    "data": "other data",
    "query": "other queries",
}
EVERY = 2.0  # seconds between two times that what is written is forced to the disk, and counted as done


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """Return a context that has a directory to itself, which goes at its end where no row is on the disk.

    Raises OutputError where another process has it.
    """
    with alone_in(directory, doing="writing"):
        try:
            yield
        finally:
            if not _has_rows(directory):
                remove(directory)


def remove(directory: Path) -> None:
    """Remove the directory of an attribution that is written."""
    shutil.rmtree(directory, ignore_errors=True)


def _has_rows(directory: Path) -> bool:
    """Return whether some row was computed."""
    return any(file.read_bytes() != b"0" for file in directory.glob(f"*{DONE}"))


def check_request(directory: Path, request: Mapping[str, Any]) -> None:
    """Write the request of a new attribution. Raises OutputError where the directory holds one of another."""
    path = directory / REQUEST
    is_new = not path.exists() or not _has_rows(directory)
    begin(path, request, what="an attribution", words=_WORDS, is_new=is_new)


class Ledger:
    """Rows of `width` numbers in float32, appended to a file in their order; `done` are on the disk.

    Of a file that was left by a killed process what was not yet counted as done is cut off and computed again.
    """

    def __init__(self, file: Path, *, rows: int, width: int) -> None:
        self.file, self.rows, self.width = file, rows, width
        self._count = file.with_suffix(DONE)
        self.done = self._written = self._read_count()
        check_space(file, 4 * width * (rows - self.done))
        with guarded(file):
            self._open = file.open("r+b" if file.exists() else "w+b")
            self._open.truncate(4 * width * self.done)
            self._open.seek(0, os.SEEK_END)
        self._counted_at = time.monotonic()

    def add(self, numbers: NDArray[np.float32]) -> None:
        """Append rows. Raises OutputError where the disk refuses."""
        assert numbers.shape[1] == self.width, numbers.shape
        assert numbers.dtype == np.float32, numbers.dtype
        with guarded(self.file):
            self._open.write(np.ascontiguousarray(numbers).tobytes())
        self._written += len(numbers)
        if time.monotonic() - self._counted_at > EVERY:
            self.count()

    def count(self) -> None:
        """Force what is written to the disk, and count it as done."""
        with guarded(self.file):
            self._open.flush()
            os.fsync(self._open.fileno())
            write_whole(self._count, [str(self._written).encode()])
        self.done = self._written
        self._counted_at = time.monotonic()

    def close(self) -> None:
        """Count what is written, and close the file."""
        self.count()
        self._open.close()

    def read(self) -> NDArray[np.float32]:
        """Return all rows, (rows, width), mapped into memory."""
        return np.memmap(self.file, np.float32, "r", shape=(self.rows, self.width))

    def remove(self) -> None:
        """Remove the file."""
        self._count.unlink(missing_ok=True)
        self.file.unlink(missing_ok=True)

    def _read_count(self) -> int:
        """Return how many rows a former process counted, as far as the file has them."""
        try:
            counted = int(self._count.read_bytes())
            held = self.file.stat().st_size // (4 * self.width)
        except (OSError, ValueError):
            return 0
        return max(0, min(counted, held, self.rows))
