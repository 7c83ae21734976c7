"""Progress: what a call is doing, how much of that there is and how much is done, and the bars that show it.

Work announces itself, wherever it is done, and whoever watches the call decides what becomes of that:

    with stage("tokenising", total=len(rows), unit="rows") as count:
        for row in rows:
            ...
            count(1)

    with watched(my_progress):      # an object with begin(what, total, unit); False for silence
        surgeon.evaluate("gpt2", data=["text.txt"])

Without a watcher there are bars on a terminal and in a notebook, and nothing elsewhere.
"""

import atexit
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from surgeon.text import duration, printable, size

if TYPE_CHECKING:
    from rich.progress import TaskID

DELAY = 0.2  # seconds: work that is over by then is not shown
BYTES, TOKENS = "bytes", "tokens"
LIBRARIES = {"torch": "PyTorch", "transformers": "transformers"}  # whose import alone takes seconds


class Stage(Protocol):
    """A piece of work that has begun."""

    def __call__(self, count: float) -> None:
        """Count so much more of it as done; parts of a unit count too."""

    def done(self) -> None:
        """End it. May be called twice."""


class Progress(Protocol):
    """What watches a call."""

    def begin(self, what: str, total: float | None = None, unit: str = "") -> Stage:
        """Begin a piece of work: its name, how much of it there is (None: nobody knows), and in what that is counted.

        Pieces may lie inside each other. It is called in the thread that works.
        """


class Silence:
    """A watcher that shows nothing."""

    def begin(self, what: str, total: float | None = None, unit: str = "") -> Stage:
        """Return a stage that counts for nobody."""
        return self

    def __call__(self, count: float) -> None:
        return

    def done(self) -> None:
        """End nothing."""


_CURRENT: ContextVar[Progress | None] = ContextVar("progress", default=None)


def current() -> Progress:
    """Return what watches this call: the watcher that was given, else bars where someone may see them."""
    return _CURRENT.get() or usual()


@cache
def usual() -> Progress:
    """Return bars on a terminal and in a notebook; elsewhere silence."""
    return Bars() if sys.stderr.isatty() or _in_notebook() else Silence()


def _in_notebook() -> bool:
    shell = sys.modules.get("IPython")
    made = None if shell is None else shell.get_ipython()
    return type(made).__name__ == "ZMQInteractiveShell"


@contextmanager
def watched(progress: Progress | bool | None) -> Iterator[None]:
    """Return a context whose work is watched by `progress`; False: by nobody; True: by bars; None: as outside of it."""
    if progress is None and _CURRENT.get() is not None:
        yield
        return
    named: dict[object, Callable[[], Progress]] = {None: usual, False: Silence, True: Bars}
    chosen = named[progress]() if progress is None or isinstance(progress, bool) else progress
    before = _CURRENT.set(chosen)
    try:
        with _imports_announced():
            yield
    finally:
        _CURRENT.reset(before)


@contextmanager
def stage(what: str, total: float | None = None, unit: str = "") -> Iterator[Stage]:
    """Return a context of a piece of work, and what counts it."""
    begun = current().begin(what, total, unit)
    try:
        yield begun
    finally:
        begun.done()


def meter(what: str, tokens: int, layers: int) -> Callable[[int], None]:
    """Begin work on so many tokens, each through so many layers, and return what counts their product.

    It ends with its last token.
    """
    begun, left = current().begin(what, tokens, TOKENS), tokens * layers

    def count(number: int) -> None:
        nonlocal left
        left -= number
        begun(number / layers)
        if left <= 0:
            begun.done()

    return count


# --- bars ---------------------------------------------------------------------------------------------------------


class Bars:
    """Shows each piece of work as a bar, or as a sign that something moves where its size is not known.

    Drawn on standard error, or on `stream`, and taken away at the end; nothing with `quiet`, without a terminal, and by
    other processes of a run than its first. `line`, if it is set, is told the innermost piece as text instead: another
    line is on the terminal then.
    """

    def __init__(self, *, quiet: bool = False, stream: TextIO | None = None, delay: float = DELAY) -> None:
        self._stream = sys.stderr if stream is None else stream
        is_first = os.environ.get("RANK", "0") == "0"
        self._silent = quiet or not is_first or not (self._stream.isatty() or _in_notebook())
        self._delay, self._lock = delay, threading.RLock()
        self._begun: list[_Bar] = []
        self._timer: threading.Timer | None = None
        self._drawn: Any = None  # rich's progress, while one is on the terminal
        self.line: Callable[[str], None] | None = None

    def begin(self, what: str, total: float | None = None, unit: str = "") -> Stage:
        """Begin a piece of work; it is shown when it has lasted for a moment."""
        if self._silent:
            return Silence()
        bar = _Bar(self, printable(what), total, unit)
        with self._lock:
            self._begun.append(bar)
            if self._drawn is not None:
                self._add(bar)
            elif self.line is not None:
                self.line(bar.text())
            elif self._timer is None:
                self._timer = threading.Timer(self._delay, self._draw)
                self._timer.daemon = True
                self._timer.start()
        return bar

    def _draw(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

        with self._lock:
            self._timer = None
            if not self._begun or self.line is not None:
                return
            columns = (
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[told]}", markup=False),
            )
            self._drawn = Progress(*columns, console=Console(file=self._stream), transient=True)
            atexit.register(self.stop)  # whatever ends the work, the terminal gets its cursor back
            for bar in self._begun:
                self._add(bar)
            self._drawn.start()

    def _add(self, bar: "_Bar") -> None:
        bar.task = self._drawn.add_task(bar.what, total=bar.total, completed=bar.count, told=bar.told())

    def moved(self, bar: "_Bar") -> None:
        """Show how far a bar is."""
        with self._lock:
            if self._drawn is not None and bar.task is not None:
                self._drawn.update(bar.task, completed=bar.count, told=bar.told())
            elif self.line is not None and self._begun and bar is self._begun[-1]:
                self.line(bar.text())

    def over(self, bar: "_Bar") -> None:
        """Take a bar away, and all bars with the last one."""
        with self._lock:
            if bar not in self._begun:
                return
            self._begun.remove(bar)
            if self._drawn is not None and bar.task is not None:
                self._drawn.remove_task(bar.task)
            if self.line is not None:
                self.line(self._begun[-1].text() if self._begun else "")
            if not self._begun:
                self.stop()

    def stop(self) -> None:
        """Take all bars off the terminal."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            if self._drawn is not None:
                self._drawn.stop()
                self._drawn = None
                atexit.unregister(self.stop)


class _Bar:
    """A piece of work on the terminal."""

    def __init__(self, bars: Bars, what: str, total: float | None, unit: str) -> None:
        self.bars, self.what, self.total, self.unit = bars, what, total, unit
        self.count, self.began = 0.0, time.monotonic()
        self.task: TaskID | None = None

    def __call__(self, count: float) -> None:
        self.count += count
        self.bars.moved(self)

    def done(self) -> None:
        """Take it away."""
        self.bars.over(self)

    def told(self) -> str:
        """Return how much is done, how fast, and what is left, as far as that is known."""
        seconds = time.monotonic() - self.began
        rate = self.count / seconds if seconds > 0 else 0.0
        if not self.count or self.unit == "":
            return ""
        is_bytes = self.unit == BYTES
        done = size(self.count) if is_bytes else f"{self.count:,.0f}"
        if self.total is not None:
            done += f" of {size(self.total) if is_bytes else f'{self.total:,.0f}'}"
        words = [done if is_bytes else f"{done} {self.unit}"]
        words += [f"{size(rate)}/s" if is_bytes else f"{rate:,.3g} {self.unit}/s"] if rate >= 1 else []
        if self.total is not None and rate and self.count < self.total:
            words.append(f"{duration((self.total - self.count) / rate)} left")
        return ", ".join(words)

    def text(self) -> str:
        """Return it as a few words for a line of someone else."""
        share = "" if not self.total or not self.count else f" {min(1.0, self.count / self.total):.0%}"
        return f"{self.what}{share}"


# --- libraries whose import takes seconds -------------------------------------------------------------------------


@contextmanager
def _imports_announced() -> Iterator[None]:
    """Return a context in which the import of a large library is a piece of work of its own."""
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class _Finder(MetaPathFinder):
    """Finds the large libraries as Python would, with a loader that announces them."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return where a library is; None for all others, which the other finders find."""
        spec = PathFinder.find_spec(name, path) if name in LIBRARIES else None
        if spec is not None and spec.loader is not None:
            spec.loader = _Announced(spec.loader, LIBRARIES[name])
        return spec


class _Announced(Loader):
    """Loads a module with its own loader, as a piece of work."""

    def __init__(self, loader: Loader, label: str) -> None:
        self._loader, self._label = loader, label

    def __getattr__(self, name: str) -> Any:  # of whoever only looks where a library lies
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader  # nothing of this is left behind
        with stage(f"loading {self._label}"):
            self._loader.exec_module(module)
