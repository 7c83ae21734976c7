"""How commands print: results on standard output, everything else on standard error."""

import io
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgeon.cli import clock
from surgeon.errors import LONGEST, DataError
from surgeon.mistyped import hint_beside
from surgeon.processes import speaks
from surgeon.text import printable

if TYPE_CHECKING:
    pass


def emit(text: str) -> None:
    """Print a result. Of processes that measure together only the first prints."""
    if not speaks():
        return
    sys.stdout.write(text + "\n")


def log(text: str) -> None:
    """Print a line of progress, a note and the like, without what a hostile checkpoint could put into it."""
    if not speaks():
        return
    sys.stderr.write(printable(text[:LONGEST]) + "\n")


@contextmanager
def results_alone() -> Iterator[None]:
    """Return a context in which the output of libraries (DeepSpeed's log, gloo's greetings) goes to standard error."""
    try:
        handle = sys.stdout.fileno()
    except io.UnsupportedOperation:  # not a file of the system: its reader is in this process
        with redirect_stdout(sys.stderr):
            yield
        return
    sys.stdout.flush()
    stdout = os.dup(handle)
    os.dup2(sys.stderr.fileno(), handle)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(stdout, handle)
        os.close(stdout)


def emit_json(content: Mapping[str, Any], *, estimated: bool = False) -> None:
    """Print one JSON object. Its `seconds`, if not `estimated`, become the whole process's, with parts as `timings`."""
    if not speaks():
        return
    timed = clock.timings() if "seconds" in content and not estimated else {}
    sys.stdout.write(json.dumps({**content, **timed}, indent=2) + "\n")


def read_text(path: Path) -> str:
    """Return the content of a file. Raises DataError where it cannot be read, or is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror}", hint=hint_beside(path, f"Look: ls -l {path}")
        ) from error
    except UnicodeDecodeError as error:
        hint = f"Convert it: iconv -f LATIN1 -t UTF-8 {path}"
        raise DataError(f"{path} is not UTF-8 at byte {error.start}", hint=hint) from error
