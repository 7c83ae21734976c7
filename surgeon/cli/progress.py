"""Progress bars over bytes and over tokens, on a terminal, for what takes more than a second."""

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

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


def token_meter(*, quiet: bool) -> Callable[[str, int], Callable[[int], None] | None]:
    """Return what begins a bar for each piece of work, counted in tokens times layers; None where nothing is shown."""

    def begin(what: str, total: int) -> Callable[[int], None] | None:
        if quiet or not sys.stderr.isatty():
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
        bar = Progress(*columns, console=Console(stderr=True), transient=True)
        task = bar.add_task(what, total=total, rate="")
        began, done = time.monotonic(), 0

        def count(number: int) -> None:
            nonlocal done
            done += number
            seconds = time.monotonic() - began
            if seconds < PATIENCE:
                return
            bar.start()
            bar.update(task, completed=done, rate=f"{done / seconds:,.0f} tokens x layers / s")
            if done >= total:
                bar.stop()

        return count

    return begin
