"""How commands print: results on standard output, everything else on standard error."""

import atexit
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from surgeon.cli import clock
from surgeon.errors import LONGEST, DataError
from surgeon.text import printable

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


def emit(text: str) -> None:
    """Print a result."""
    sys.stdout.write(text + "\n")


def log(text: str) -> None:
    """Print a line of progress, a note and the like, without what a hostile checkpoint could put into it."""
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


def emit_json(content: Mapping[str, Any]) -> None:
    """Print one JSON object. Its `seconds` become those of the whole process, with the parts as `timings`."""
    timed = clock.timings() if "seconds" in content else {}
    sys.stdout.write(json.dumps({**content, **timed}, indent=2) + "\n")


def read_text(path: Path) -> str:
    """Return the content of a file. Raises DataError where it cannot be read, or is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", hint=f"Look: ls -l {path}") from error
    except UnicodeDecodeError as error:
        hint = f"Convert it: iconv -f LATIN1 -t UTF-8 {path}"
        raise DataError(f"{path} is not UTF-8 at byte {error.start}", hint=hint) from error


PATIENCE = 1.0  # seconds before a bar appears


class ByteProgress:
    """Counts bytes towards `total`; call it with how many more are done. Shows nothing without a terminal."""

    def __init__(self, total: int, *, quiet: bool) -> None:
        self._total = total
        self._done = 0
        self._silent = quiet or not sys.stderr.isatty()
        self._began = time.monotonic()
        self._bar: tuple[Progress, TaskID] | None = None

    def __enter__(self) -> Self:
        return self

    def __call__(self, count: int) -> None:
        self._done += count
        if self._silent or time.monotonic() - self._began < PATIENCE:
            return
        progress, task = self._bar or self._start()
        progress.update(task, completed=self._done)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar[0].stop()

    def _start(self) -> "tuple[Progress, TaskID]":
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        progress = Progress(*columns, console=Console(stderr=True), transient=True)
        progress.start()
        self._bar = (progress, progress.add_task("", total=self._total, completed=self._done))
        return self._bar


class TokenMeter:
    """Shows a bar with tokens a second for each piece of work in turn; nothing where there is no terminal."""

    def __init__(self, *, quiet: bool) -> None:
        self._silent = quiet or not sys.stderr.isatty()
        self._bar: Progress | None = None

    def __call__(self, what: str, tokens: int, layers: int) -> Callable[[int], None] | None:
        """Begin work on so many tokens, each through so many layers, and return what counts their product."""
        self.stop()
        if self._silent:
            return None
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        bar = self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        atexit.register(bar.stop)  # whatever ends the work, the terminal gets its cursor back
        task = bar.add_task(what, total=tokens * layers, rate="")
        began, done = time.monotonic(), 0

        def count(number: int) -> None:
            nonlocal done
            done += number
            seconds = time.monotonic() - began
            if seconds >= PATIENCE and bar is self._bar:
                bar.start()
                bar.update(task, completed=done, rate=f"{done / layers / seconds:,.0f} tokens/s")
            if done >= tokens * layers:
                self.stop()

        return count

    def stop(self) -> None:
        """Take the bar away."""
        if self._bar:
            self._bar.stop()
            self._bar = None
